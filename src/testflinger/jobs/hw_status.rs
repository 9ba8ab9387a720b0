//! The status of a machine's hardware, as the test printed it: the first `"status"` in its output.

use regex::Regex;
use serde_json::{Deserializer, Value};
use std::sync::LazyLock;

/// What is written where the output has no status.
pub const UNKNOWN: &str = "Unknown";

#[allow(clippy::unwrap_used)] // It is a constant, and a test uses it.
static PLAIN: LazyLock<Regex> = LazyLock::new(|| Regex::new(r#""status"\s*:\s*"([^"]+)""#).unwrap());

/// The first status in `output`: of a JSON object, however it is laid out, or of text that looks like
/// a part of one. Empty ones do not count.
pub fn find(output: &str) -> Option<String> {
    let plain = PLAIN.captures(output).and_then(|found| Some((found.get(0)?.start(), found.get(1)?)));
    let mut at = 0;
    while let Some(open) = output[at..].find('{').map(|found| at + found) {
        if plain.as_ref().is_some_and(|(start, _)| *start < open) {
            break;
        }
        let mut objects = Deserializer::from_str(&output[open..]).into_iter::<Value>();
        match objects.next() {
            Some(Ok(object)) => {
                if let Some(status) = in_value(&object) {
                    return Some(status.to_owned());
                }
                at = open + objects.byte_offset();
            }
            _ => at = open + 1,
        }
    }
    plain.map(|(_, status)| status.as_str().to_owned())
}

/// In the order of the text.
fn in_value(value: &Value) -> Option<&str> {
    match value {
        Value::Object(fields) => fields.iter().find_map(|(name, value)| match value {
            Value::String(status) if name == "status" && !status.is_empty() => Some(status.as_str()),
            other => in_value(other),
        }),
        Value::Array(values) => values.iter().find_map(in_value),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_first_status_counts_wherever_it_is() {
        for (output, expected) in [
            (r#"log {x} {"status": "Certified", "url": "u"} {"status": "Other"}"#, Some("Certified")),
            ("{\n  \"status\"\n  :\n  \"Related\"\n}", Some("Related")),
            ("cut off: {\"status\"\n  :\n  \"Related\"", Some("Related")),
            ("{\n  \"a\": {\"b\": [1, {\n \"status\" : \"Seen \\u0041\"}]}\n}", Some("Seen A")),
            (r#"Response: "status":  "Not Seen" and {"status": "later"}"#, Some("Not Seen")),
            (r#"{"status": "cut off", "#, Some("cut off")),
            (r#"{"status": 200} {"status": ""} {"status": "Certified"}"#, Some("Certified")),
            (r#"{"error": "status"}"#, None),
            (r"status: Certified", None),
            ("", None),
        ] {
            assert_eq!(find(output).as_deref(), expected, "{output}");
        }
    }

    #[test]
    fn output_made_of_braces_takes_no_time() {
        let output = "{\"a\":[1,".repeat(10_000) + "{\"status\" : \"x\"}";
        assert_eq!(find(&output).as_deref(), Some("x"));
    }

    proptest! {
        #[test]
        fn what_the_original_finds_on_one_line_is_found(
            before in "[a-z {}:]{0,20}", status in "[a-zA-Z ]{1,12}", after in "[a-z {}:\"]{0,20}",
        ) {
            let output = format!("{before}\"status\": \"{status}\"{after}");
            prop_assert_eq!(find(&output), Some(status));
        }

        #[test]
        fn nothing_makes_it_panic(output in "[{}\\[\\]\":, \\\\status\u{e9}1]{0,60}") {
            let _ = find(&output);
        }
    }
}
