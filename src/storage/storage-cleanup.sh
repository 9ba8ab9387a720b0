#!/bin/sh
# Takes away all that stands on the given disks: what is in use first, then the leaves of the block
# graph, and the disks last. An array, a volume group or a cached disk that stands on other disks too
# goes as a whole, with what these say of it: give all of them. Nothing else is touched. Made by
# Shakedown; asks nothing.
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

# Written with what the shell has in it where that is possible: starting programs takes the time here.

is_mounted() {
    # Btrfs is mounted by a number of its own, and by the name of one of its devices.
    while read -r _ _ number _ rest; do
        case "$number $rest " in "$1 "* | *" - "*" $2 "* | *" - "*" $3 "*) return 0 ;; esac
    done </proc/self/mountinfo
    return 1
}

is_swap() {
    while read -r node _; do
        case $node in "$1" | "$2") return 0 ;; esac
    done </proc/swaps
    return 1
}

# A node after all that stands on it.
seen=" "
tear() {
    case $seen in *" $1 "*) return ;; esac
    seen="$seen$1 "
    for above in /sys/class/block/"$1"/holders/* /sys/class/block/"$1"/"$1"*/partition; do
        [ -e "$above" ] || continue
        above=${above%/partition}
        tear "${above##*/}"
    done
    [ ! -e "/sys/class/block/$1" ] || act "$1"
}

# The group of a physical volume, by its numbers, and the group's id; none when it is gone already.
asked='' gone=" "
find_group() {
    [ -n "$asked" ] || physical=$(pvs --noheadings --separator '|' -o pv_major,pv_minor,vg_name,vg_uuid 2>/dev/null)
    asked=yes group='' id=''
    for line in $physical; do
        case $line in "$1|$2|"*) line=${line#*|*|} group=${line%|*} id=${line#*|} ;; esac
    done
    case $gone in *" $group "*) group='' ;; esac
}

# The group's volumes on other disks may have holders, too. The kernel has the group's id without dashes.
tear_volumes() {
    prefix=LVM- rest=$1-
    while [ -n "$rest" ]; do
        prefix=$prefix${rest%%-*} rest=${rest#*-}
    done
    for volume in /sys/class/block/dm-*; do
        [ -e "$volume/dm/uuid" ] && read -r uuid <"$volume/dm/uuid" || continue
        case $uuid in "$prefix"*) tear "${volume##*/}" ;; esac
    done
    exit "$failed"
}

act() {
    dev=/dev/$1 sys=/sys/class/block/$1 mapped=/dev/$1 uuid=''
    read -r numbers <"$sys/dev"
    if [ -e "$sys/dm/uuid" ]; then
        read -r mapped <"$sys/dm/name" && mapped=/dev/mapper/$mapped
        read -r uuid <"$sys/dm/uuid"
    fi
    case $uuid in
        # What is below a volume is LVM's own, and goes with the group.
        LVM-*) set -- "$sys"/holders/* && [ -e "$1" ] && return ;;
    esac
    if is_mounted "$numbers" "$dev" "$mapped"; then try do_unmount "$dev"; fi
    if is_swap "$dev" "$mapped"; then try do_swapoff "$dev"; fi
    case $(blkid -p -o value -s TYPE "$dev" 2>/dev/null) in
        LVM2_member)
            find_group "${numbers%:*}" "${numbers#*:}"
            if [ -n "$group" ]; then
                # In a shell of its own, which has variables of its own.
                (tear_volumes "$id") || failed=1
                try do_remove_vg "$group"
                gone="$gone$group "
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

disks=''
for disk; do
    [ ! -L "$disk" ] || disk=$(readlink -f "$disk")
    [ -b "$disk" ] || { echo "storage-cleanup: $disk is no disk" >&2 && exit 2; }
    disks="$disks $disk"
done
for disk in $disks; do
    tear "${disk##*/}"
done
for disk in $disks; do
    try do_forget "$disk"
    case $action in
        discard) try do_discard "$disk" ;;
        overwrite) try do_overwrite "$disk" ;;
    esac
done
! command -v udevadm >/dev/null || udevadm settle
exit "$failed"
