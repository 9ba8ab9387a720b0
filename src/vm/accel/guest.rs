//! The probe guest as a firmware image for `qemu -bios`.
//!
//! Owns the bytes and the meaning of its letters. `guest.s` is assembled by rustc with the crate,
//! so there is no binary in the repository whose source one would have to trust.

/// What the guest writes to the debug console, a letter a stage, and what the stage proves.
pub(super) const STAGES: [(u8, &str); 6] = [
    (b'R', "real mode"),
    (b'P', "protected mode"),
    (b'L', "long mode"),
    (b'B', "a handled trap"),
    (b'F', "a handled page fault"),
    (b'U', "user mode and back"),
];

/// QEMU's `-bios` takes multiples of 64 KiB and maps their end at 4 GiB.
const ROM_SIZE: usize = 0x1_0000;
/// Where an x86 CPU starts: 16 bytes below 4 GiB.
const RESET_VECTOR: usize = 0xfff0;
const HLT: u8 = 0xf4;

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod code {
    // The assembly only adds bytes to a read-only section; nothing of it runs on the host.
    core::arch::global_asm!(include_str!("guest.s"), options(att_syntax, raw));

    unsafe extern "C" {
        static shakedown_probe_start: u8;
        static shakedown_probe_end: u8;
    }

    pub(super) fn bytes() -> &'static [u8] {
        let (start, end) = (&raw const shakedown_probe_start, &raw const shakedown_probe_end);
        // SAFETY: both labels are in one section of `guest.s`, the end after the start, and the
        // bytes between them are read-only data for as long as the program runs.
        unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
    }
}

/// Other hosts have no KVM for x86 machines, so there is nothing to probe.
#[cfg(not(target_arch = "x86_64"))]
mod code {
    pub(super) fn bytes() -> &'static [u8] {
        &[]
    }
}

/// The whole ROM: the guest at its start, and at the reset vector a jump there.
pub(super) fn rom() -> Vec<u8> {
    let code = code::bytes();
    let mut rom = vec![HLT; ROM_SIZE];
    rom[..code.len()].copy_from_slice(code);
    // `jmp rel16`: the 16-bit instruction pointer wraps from the end of the ROM to its start.
    let offset = (ROM_SIZE - RESET_VECTOR - 3) as u16;
    rom[RESET_VECTOR] = 0xe9;
    rom[RESET_VECTOR + 1..RESET_VECTOR + 3].copy_from_slice(&offset.to_le_bytes());
    rom
}
