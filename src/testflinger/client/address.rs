//! Where a server is, as its users write it.

use base64::Engine;
use std::net::IpAddr;

/// An address, taken apart.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Address {
    /// Scheme and host, without a slash at the end. What is kept in files and said in errors.
    pub(super) base: String,
    /// By the user and the password in it, which some server in front of the real one may want.
    pub(super) authorization: Option<String>,
    /// The scheme is in it, and not put there by us.
    has_scheme: bool,
}

impl std::fmt::Debug for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.base)
    }
}

impl Address {
    /// The scheme is put in front where it is missing; a path is lost, since all of ours are absolute.
    pub(super) fn of(text: &str) -> Self {
        let text = text.trim();
        let is_scheme = |start: &str| ["http", "https"].iter().any(|known| start.eq_ignore_ascii_case(known));
        let given = text.split_once("://").filter(|(start, _)| is_scheme(start));
        let (scheme, rest) = given.unwrap_or(("http", text));
        let (scheme, has_scheme) = (scheme.to_ascii_lowercase(), given.is_some());
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let (user, host) = match authority.rsplit_once('@') {
            Some((user, host)) => (Some(user), host),
            None => (None, authority),
        };
        let authorization = user.filter(|user| !user.is_empty()).map(|user| basic(&decoded(user)));
        Self { base: format!("{scheme}://{host}"), authorization, has_scheme }
    }

    /// Host and port.
    pub(super) fn host(&self) -> &str {
        self.base.split_once("://").map_or(self.base.as_str(), |(_, host)| host)
    }

    /// Whether nobody said that it be spoken to in clear text, and it is: not on this host.
    pub(super) fn is_guess(&self) -> bool {
        !self.has_scheme && !is_loopback(self.host())
    }
}

fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost" || name.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

/// For HTTP's Basic: RFC 7617.
pub(super) fn basic(pair: &str) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair))
}

/// `%3A` is `:`. What is no such escape stays as it is.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let digits = after.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        let is_hex = |text: &&str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let byte = digits.filter(is_hex).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match (first, byte) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_completed_and_their_paths_dropped() {
        for (address, expected) in [
            ("localhost:5000", "http://localhost:5000"),
            ("https://tf.example/", "https://tf.example"),
            ("HTTP://tf.example/lab?x", "http://tf.example"),
            (" 10.0.0.1 ", "http://10.0.0.1"),
            ("tf.example/http://x", "http://tf.example"),
            ("httpd.example", "http://httpd.example"),
        ] {
            assert_eq!(Address::of(address).base, expected, "{address}");
        }
    }

    #[test]
    fn who_we_are_is_sent_and_never_shown() {
        let address = Address::of("https://me:p%40ss:w%rd@tf.example:8000/x");
        assert_eq!(address.base, "https://tf.example:8000");
        assert_eq!(address.authorization.as_deref(), Some(basic("me:p@ss:w%rd").as_str()));
        assert_eq!(format!("{address:?}"), "https://tf.example:8000");
        assert_eq!(Address::of("me@tf.example").base, "http://tf.example");
        assert_eq!(Address::of("https://tf.example/a@b").authorization, None);
    }

    #[test]
    fn clear_text_that_nobody_asked_for_stays_on_this_host() {
        for local in ["localhost:8000", "127.0.0.1", "127.1.2.3:80", "[::1]:8000", "http://tf.example"] {
            assert!(!Address::of(local).is_guess(), "{local}");
        }
        for guess in [
            "tf.example",
            "10.0.0.1:8000",
            "localhost.example",
            "127.0.0.1.example",
            "me@tf.example",
            "httpd",
        ] {
            assert!(Address::of(guess).is_guess(), "{guess}");
        }
    }
}
