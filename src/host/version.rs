//! Version numbers as tools print them.

use std::fmt;
use std::str::FromStr;

/// Dotted numbers, compared number by number; a missing part counts as zero.
#[derive(Clone, Debug)]
pub struct Version {
    text: String,
    parts: Vec<u64>,
}

impl Version {
    /// The first dotted number in the text: `7.2.22` of `QEMU emulator version 7.2.22 (Debian ...)`.
    ///
    /// A number without a dot is no version, so that copyright years and the like are passed over.
    pub fn find(text: &str) -> Option<Self> {
        text.split(|c: char| c.is_whitespace() || matches!(c, '(' | ')' | ',')).find_map(|word| {
            let end = word.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(word.len());
            let number = word[..end].trim_end_matches('.');
            number.contains('.').then(|| number.parse().ok())?
        })
    }
}

impl FromStr for Version {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.split('.').map(str::parse).collect::<Result<Vec<u64>, _>>()?;
        while parts.last() == Some(&0) {
            parts.pop();
        }
        Ok(Self { text: text.into(), parts })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl PartialEq for Version {
    fn eq(&self, other: &Self) -> bool {
        self.parts == other.parts
    }
}

impl Eq for Version {}

impl PartialOrd for Version {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Version {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.parts.cmp(&other.parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn versions_are_found_in_what_tools_really_print() {
        for (text, version) in [
            (
                "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright (c) 2003-2022",
                "7.2.22",
            ),
            ("QEMU emulator version 6.2.0 (Debian 1:6.2+dfsg-2ubuntu6.24)", "6.2.0"),
            ("QEMU emulator version 8.2.2 (Debian 1:8.2.2+ds-0ubuntu1.4)", "8.2.2"),
            ("QEMU emulator version 9.1.3 (qemu-9.1.3-2.fc41)", "9.1.3"),
            ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1)", "10.0.2"),
            ("qemu-img version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", "7.2.22"),
            ("mmdebstrap 1.3.5\n", "1.3.5"),
            ("sqfstar version 4.5.1 (2022/03/17)\ncopyright (C) 2022 Phillip Lougher", "4.5.1"),
            ("sqfstar version 4.6.1 (2023/03/25)", "4.6.1"),
            ("sqfstar version 4.5 (2021/07/22)", "4.5"),
            ("xorriso 1.5.4 : RockRidge filesystem manipulator, libburnia project.\n", "1.5.4"),
            ("grub-mkimage (GRUB) 2.06-13+deb12u2\n", "2.06"),
            ("grub-mkimage (GRUB) 2.12-1ubuntu7.3\n", "2.12"),
            ("mformat (GNU mtools) 4.0.32\nconfigured with the following options:", "4.0.32"),
        ] {
            assert_eq!(Version::find(text).map(|v| v.to_string()), Some(version.into()), "{text}");
        }
        assert_eq!(Version::find("Copyright (c) 2003-2022 Fabrice Bellard"), None);
        assert_eq!(Version::find("usage: newuidmap <pid> <uid> ..."), None);
    }

    #[test]
    fn versions_compare_by_number() {
        let version = |text: &str| text.parse::<Version>().expect("a version");
        assert!(version("10.0.2") > version("7.1"));
        assert!(version("4.5.1") > version("4.5"));
        assert_eq!(version("4.5"), version("4.5.0"));
        assert!(version("6.2.0") < version("7.1"));
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "\\PC*") {
            let _ = Version::find(&text);
        }

        #[test]
        fn a_version_among_words_is_found(parts in prop::collection::vec(0u64..10_000, 2..5)) {
            let text = parts.iter().map(u64::to_string).collect::<Vec<_>>().join(".");
            let found = Version::find(&format!("tool (Some {text}-1ubuntu2) 1999"));
            prop_assert_eq!(found.map(|v| v.to_string()), Some(text));
        }
    }
}
