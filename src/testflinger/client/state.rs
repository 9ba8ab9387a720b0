//! The state of a job out of its result, which carries all of the job's logs: reading stops there.

use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};
use std::fmt;
use std::io::{self, BufReader, Read};

/// Reads a result up to its `job_state`; `None` where there is none.
pub(super) fn find(reader: impl Read) -> io::Result<Option<String>> {
    let mut found = None;
    let mut json = serde_json::Deserializer::from_reader(BufReader::with_capacity(4 << 10, reader));
    match Seek(&mut found).deserialize(&mut json) {
        // What follows the state was not read: that the object has no end is no error then.
        Err(error) if found.is_none() => Err(error.into()),
        _ => Ok(found),
    }
}

struct Seek<'a>(&'a mut Option<String>);

impl<'de> DeserializeSeed<'de> for Seek<'_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Seek<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the result of a job")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if key == "job_state" {
                *self.0 = Some(map.next_value()?);
                return Ok(());
            }
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_stops_at_the_state() {
        let read = |text: &'static str| find(text.as_bytes());
        let broken_after = r#"{"allocate_output": "x", "job_state": "test", "test_output": "..."#;
        assert_eq!(read(broken_after).expect("found").as_deref(), Some("test"));
        assert_eq!(read("{}").expect("reads"), None);
        assert!(read(r#"{"allocate_output": "x"#).is_err());
        assert!(read("[]").is_err());
    }

    #[test]
    fn the_log_behind_the_state_is_not_loaded() {
        struct Never;
        impl Read for Never {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("read too far"))
            }
        }
        let start = br#"{"job_state": "cancelled", "#.chain(&[b' '; 8 << 10][..]).chain(Never);
        assert_eq!(find(start).expect("found").as_deref(), Some("cancelled"));
    }
}
