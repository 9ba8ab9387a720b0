# The probe guest: from the reset vector through what every 64-bit kernel lives on.
#
# It is its own firmware, so it needs no file but QEMU. Each stage that worked writes one letter to
# the debug console (port 0xe9):
#
#   R  real mode, after reset         B  a breakpoint trap was handled (IDT, iretq)
#   P  32-bit protected mode          F  a page fault was handled by mapping the page
#   L  long mode with paging          U  ring 3 ran and came back by an interrupt gate
#
# L alone proves too little: on a host whose KVM emulates privileged code, long mode is reached and
# the first trap or the first step into ring 3 hangs.
#
# Memory: page tables at 0x1000-0x3fff, stacks below 0x7000 (boot), 0x7400 (interrupts from ring 3)
# and 0x7800 (ring 3), this code copied to 0x8000. The first 2 MiB are mapped one to one; the rest
# is mapped by the page fault handler.

.set PROBE_ROM, 0xffff0000          # QEMU puts 64 KiB of firmware right below 4 GiB
.set PROBE_RAM, 0x8000

.macro probe_stage letter
    movb $\letter, %al
    outb %al, $0xe9
.endm

# An interrupt gate (Intel SDM volume 3, figure 7-8) to a handler below 64 KiB.
.macro probe_gate handler, privilege
    .word \handler - probe_start + PROBE_RAM
    .word 0x18
    .byte 0, 0x8e | (\privilege << 5)
    .word 0
    .quad 0
.endm

.pushsection .rodata.shakedown_probe, "a"
.globl shakedown_probe_start
.globl shakedown_probe_end
shakedown_probe_start:
probe_start:

# CS holds base 0xffff0000 until its first reload, so offsets are from the start of the ROM.
.code16
    probe_stage 'R'
    lgdtl %cs:(probe_gdtr32 - probe_start)
    movl %cr0, %eax
    orl $1, %eax                     # CR0.PE
    movl %eax, %cr0
    ljmpl $0x08, $(PROBE_ROM + probe_protected - probe_start)

.code32
probe_protected:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $0x7000, %esp
    probe_stage 'P'
    cld
    movl $PROBE_ROM, %esi
    movl $PROBE_RAM, %edi
    movl $(probe_end - probe_start), %ecx
    rep movsb
    ljmpl $0x08, $(probe_copied - probe_start + PROBE_RAM)
probe_copied:
    lgdtl probe_gdtr - probe_start + PROBE_RAM
    xorl %eax, %eax
    movl $0x1000, %edi
    movl $0xc00, %ecx
    rep stosl
    movl $0x2007, 0x1000             # PML4[0]: present, writable, user
    movl $0x3007, 0x2000             # PDPT[0]
    movl $0x0087, 0x3000             # PD[0]: a 2 MiB page at 0
    movl %cr4, %eax
    orl $0x20, %eax                  # CR4.PAE
    movl %eax, %cr4
    movl $0x1000, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx           # EFER
    rdmsr
    orl $0x100, %eax                 # EFER.LME
    wrmsr
    movl %cr0, %eax
    andl $0x9fffffff, %eax           # caches on: CR0.CD and CR0.NW are set at reset
    orl $0x80000000, %eax            # CR0.PG
    movl %eax, %cr0
    ljmpl $0x18, $(probe_long - probe_start + PROBE_RAM)

.code64
probe_long:
    probe_stage 'L'
    lidt probe_idtr - probe_start + PROBE_RAM
    int3
    probe_stage 'B'
    movl 0x400000, %eax
    probe_stage 'F'
    movw $0x30, %ax
    ltr %ax
    pushq $0x23                      # SS, RSP, RFLAGS, CS, RIP of ring 3
    pushq $0x7800
    pushq $0x2
    pushq $0x2b
    pushq $(probe_user - probe_start + PROBE_RAM)
    iretq

# Ring 3 traps and faults too before it comes back.
probe_user:
    int3
    movl 0x600000, %eax
    int $0x14

probe_back:
    probe_stage 'U'
probe_halt:
    hlt
    jmp probe_halt

probe_on_breakpoint:
    iretq

probe_on_page_fault:
    pushq %rax
    pushq %rbx
    movq %cr2, %rax
    movq %rax, %rbx
    shrq $21, %rbx                   # the index into the page directory, below 1 GiB
    andl $0xffe00000, %eax
    orl $0x87, %eax                  # present, writable, user, 2 MiB
    movq %rax, 0x3000(,%rbx,8)
    popq %rbx
    popq %rax
    addq $8, %rsp                    # the error code
    iretq

.balign 16
probe_gdt:
    .quad 0
    .quad 0x00cf9b000000ffff         # 08 code, 32 bits
    .quad 0x00cf93000000ffff         # 10 data
    .quad 0x00af9b000000ffff         # 18 code, 64 bits
    .quad 0x00cff3000000ffff         # 20 data, ring 3
    .quad 0x00affb000000ffff         # 28 code, 64 bits, ring 3
    .word 0x67, probe_tss - probe_start + PROBE_RAM   # 30 TSS, 16 bytes
    .byte 0, 0x89, 0, 0
    .quad 0
probe_gdt_end:

.balign 16
probe_idt:
    .fill 3 * 16, 1, 0
    probe_gate probe_on_breakpoint, 3    # 3
    .fill 10 * 16, 1, 0
    probe_gate probe_on_page_fault, 0    # 14
    .fill 5 * 16, 1, 0
    probe_gate probe_back, 3             # 20
probe_idt_end:

probe_gdtr32:
    .word probe_gdt_end - probe_gdt - 1
    .long PROBE_ROM + probe_gdt - probe_start
probe_gdtr:
    .word probe_gdt_end - probe_gdt - 1
    .quad probe_gdt - probe_start + PROBE_RAM
probe_idtr:
    .word probe_idt_end - probe_idt - 1
    .quad probe_idt - probe_start + PROBE_RAM

.balign 16
probe_tss:
    .long 0
    .quad 0x7400                     # RSP0
    .fill 92, 1, 0
probe_end:
shakedown_probe_end:
.popsection
