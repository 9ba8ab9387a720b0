#!/bin/sh
# Takes away all that stands on the given disks: what is in use first, then the leaves of the block
# graph, and the disks last. Nothing else is touched. Made by Shakedown; asks nothing.
set -u
usage="usage: storage-cleanup [--action wipe-signatures|discard|overwrite] DISK..."
action=wipe-signatures
case ${1-} in
    --action) action=${2-} && shift 2 ;;
    --action=*) action=${1#*=} && shift ;;
    -*) echo "$usage" >&2 && exit 2 ;;
esac
case $action in
    wipe-signatures | discard | overwrite) ;;
    *) echo "$usage" >&2 && exit 2 ;;
esac
[ $# -gt 0 ] || { echo "$usage" >&2 && exit 2; }
exec </dev/null
# LVM's complaints about descriptors are not about us.
export LVM_SUPPRESS_FD_WARNINGS=1

@ACTIONS@
failed=0
try() {
    # All is tried, whatever fails: the more is gone the better.
    "$@" || { echo "storage-cleanup: $* failed" >&2 && failed=1; }
}

# A node after all that stands on it. Its arguments are its own in a subshell.
tear() {
    for holder in /sys/class/block/"$1"/holders/*; do
        [ ! -e "$holder" ] || (tear "${holder##*/}") || failed=1
    done
    for part in /sys/class/block/"$1"/"$1"*; do
        [ ! -e "$part/partition" ] || (tear "${part##*/}") || failed=1
    done
    [ ! -e "/sys/class/block/$1" ] || act "$1"
    return "$failed"
}

act() {
    # By what the shell has in it where it can: starting programs is what takes time here.
    dev=/dev/$1 sys=/sys/class/block/$1 mapped=$dev uuid=
    read -r number <"$sys/dev"
    if [ -e "$sys/dm/uuid" ]; then
        read -r mapped <"$sys/dm/name" && mapped=/dev/mapper/$mapped
        read -r uuid <"$sys/dm/uuid"
    fi
    case $uuid in
        # What is below a volume is LVM's own, and goes with the group.
        LVM-*) set -- "$sys"/holders/* && [ -e "$1" ] && return 0 ;;
    esac
    # Btrfs is mounted by a number of its own.
    if grep -q -e " $number " -e "^$dev " /proc/self/mountinfo /proc/self/mounts; then try do_unmount "$dev"; fi
    if grep -q -e "^$dev " -e "^$mapped " /proc/swaps; then try do_swapoff "$dev"; fi
    case $(blkid -p -o value -s TYPE "$dev" 2>/dev/null) in
        LVM2_member)
            group=$(pvs --noheadings -o vg_name "$dev" 2>/dev/null | tr -d ' ')
            if [ -n "$group" ]; then
                # Its volumes on other disks may have holders, too.
                for volume in $(lvs --noheadings -o lv_dm_path "$group" 2>/dev/null); do
                    [ ! -e "$volume" ] || { volume=$(readlink -f "$volume") && (tear "${volume##*/}") || failed=1; }
                done
                try do_remove_vg "$group"
            fi
            try do_remove_pv "$dev"
            ;;
        crypto_LUKS) try do_erase_keys "$dev" ;;
        linux_raid_member) try do_zero_superblock "$dev" ;;
    esac
    try do_wipe "$dev"
    case $uuid in
        LVM-*) return ;;
        ?*) try do_close "$mapped" && return ;;
    esac
    if [ -e "$sys/md" ]; then
        try do_stop_md "$dev"
    elif [ -e "$sys/bcache/dirty_data" ] && [ ! -e "$sys/partition" ] && [ "${dev#/dev/bcache}" != "$dev" ]; then
        try do_stop_bcache "$dev"
    fi
}

for disk; do
    disk=$(readlink -f "$disk")
    [ -b "$disk" ] || { echo "storage-cleanup: $disk is no disk" >&2 && exit 2; }
    tear "${disk##*/}"
done
for disk; do
    disk=$(readlink -f "$disk")
    try do_forget "$disk"
    case $action in
        discard) try do_discard "$disk" ;;
        overwrite) try do_overwrite "$disk" ;;
    esac
done
! command -v udevadm >/dev/null || udevadm settle
exit "$failed"
