//! What an idle agent keeps in memory: of its program, what polling touches.
//!
//! The start and each job touch several megabytes of code that an agent, which waits most of its life, needs
//! for a moment only. The kernel keeps such pages with a process as long as nobody is short of memory.

use rustix::mm::{Advice, madvise};
use std::fs;

/// Gives back the code that was run so far. What is run again is mapped again from the page cache, where
/// it stays.
pub(super) fn forget_code() {
    advise(Advice::LinuxDontNeed);
}

fn advise(advice: Advice) {
    for (start, end) in fs::read_to_string("/proc/self/maps").unwrap_or_default().lines().filter_map(code) {
        let start = std::ptr::with_exposed_provenance_mut(start);
        // SAFETY: the mapping is of a file, private, and cannot be written: what is there is what the file
        // has, and what is dropped is read from it again.
        #[allow(unsafe_code)]
        let _ = unsafe { madvise(start, end - start.addr(), advice) };
    }
}

/// From where to where code of a file is mapped, for a line of `/proc/self/maps`.
///
/// Data is left alone even where it is for reading alone: it may have been written before.
fn code(line: &str) -> Option<(usize, usize)> {
    let mut words = line.split_whitespace();
    let (range, rights) = (words.next()?, words.next()?);
    let is_file = words.nth(3).is_some_and(|path| path.starts_with('/'));
    let (start, end) = range.split_once('-')?;
    let bounds = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    (is_file && rights == "r-xp").then_some(bounds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_of_files_is_meant() {
        let meant = "5581d0000-5581d9000 r-xp 0039f000 fe:00 42                  /usr/bin/shakedown";
        assert_eq!(code(meant), Some((0x5_581d_0000, 0x5_581d_9000)));
        for line in [
            "55810000-55819000 r--p 00eb8000 fe:00 42 /usr/bin/shakedown",
            "55810000-55819000 rw-p 00eb8000 fe:00 42 /usr/bin/shakedown",
            "55810000-55819000 r-xp 00000000 00:00 0 [vdso]",
            "55810000-55819000 rwxp 00000000 00:00 0",
            "",
        ] {
            assert_eq!(code(line), None, "{line}");
        }
    }

    #[test]
    fn code_runs_on_after_it_was_forgotten() {
        // Of the mapping that this function is in.
        let here = code_runs_on_after_it_was_forgotten as fn() as usize;
        let resident = || -> u64 {
            let smaps = fs::read_to_string("/proc/self/smaps").expect("reads");
            let mut lines = smaps
                .lines()
                .skip_while(|line| !code(line).is_some_and(|(start, end)| (start..end).contains(&here)));
            let rss = lines.find_map(|line| line.strip_prefix("Rss:")?.trim().strip_suffix(" kB"));
            rss.expect("a size").parse().expect("a number")
        };
        advise(Advice::LinuxPopulateRead);
        let before = resident();
        forget_code();
        assert!(resident() < before, "{before} kB of code, and as much after it was given back");
    }
}
