#!/usr/bin/env bash
# Removes all RAID and LVM from the disks it is given. What lies on top goes first: an array that is
# stopped takes its volume group out of sight, and leaves it on the disks. A volume group that has one of
# the disks goes as a whole.
set -euo pipefail

[ $# -gt 0 ] || {
    echo "usage: cleanup-storage DISK..." >&2
    exit 2
}

# The disks and all that is made of them, each before what it lies on; but an array is listed only
# once, below the first of its disks.
devices() { lsblk --noheadings --list --paths --output NAME "$@" | tac; }
is_array() {
    case $(lsblk --noheadings --nodeps --output TYPE "$1") in
        raid* | linear | md) return 0 ;;
        *) return 1 ;;
    esac
}

# While these are held, udev does not put an array together again that is being taken apart:
# https://systemd.io/BLOCK_DEVICE_LOCKING/
export LVM_SUPPRESS_FD_WARNINGS=1
for disk in "$@"; do
    exec {lock}<"$disk"
    flock "$lock"
done

for device in $(devices "$@"); do
    umount --all-targets --quiet "$device" || true
    swapoff "$device" 2>/dev/null || true
done
for device in $(devices "$@"); do
    # Fails where there is no physical volume.
    group=$(pvs --noheadings --options vg_name "$device" 2>/dev/null | tr -d ' ') || continue
    [ -z "$group" ] || vgremove --force --force --yes "$group"
    pvremove --force --force --yes "$device"
done
for device in $(devices "$@"); do
    if is_array "$device"; then
        wipefs --all --quiet "$device"
        mdadm --stop --quiet "$device"
    fi
done
for device in $(devices "$@"); do
    mdadm --zero-superblock --force --quiet "$device" 2>/dev/null || true
    wipefs --all --quiet "$device"
done
for disk in "$@"; do
    # 2: there was no partition table.
    sgdisk --zap-all "$disk" >/dev/null || [ $? -eq 2 ]
    wipefs --all --quiet "$disk"
done
