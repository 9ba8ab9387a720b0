//! The bearer token: made from a file that others renew, kept fresh, and never given up on.

use super::Error;
use serde::Deserialize;
use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Where the refresh token is: JSON with `refresh_token`. Others write it; it is read each time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenFile(pub PathBuf);

impl TokenFile {
    /// `None` while there is no usable file: the server may let anybody in.
    fn read(&self) -> Option<String> {
        #[derive(Deserialize)]
        struct Content {
            refresh_token: String,
        }
        let content: Content = serde_json::from_slice(&fs::read(&self.0).ok()?).ok()?;
        Some(content.refresh_token)
    }
}

/// What a refresh gives.
#[derive(Deserialize)]
pub(super) struct Fresh {
    access_token: String,
    expires_in: u64,
}

#[derive(Debug)]
struct Held {
    bearer: String,
    /// From here on a new one is asked for, while this one still works.
    renew: Instant,
    expires: Instant,
}

/// Tokens are per server and agent; threads of one agent share one.
#[derive(Debug)]
pub(super) struct Token {
    file: Option<TokenFile>,
    held: Mutex<Option<Held>>,
}

impl Token {
    pub(super) fn new(file: Option<TokenFile>) -> Self {
        Self { file, held: Mutex::new(None) }
    }

    /// The token to use now, refreshed where it is time; `None` for anybody.
    ///
    /// A failed refresh is an error only when nothing that still works is held.
    pub(super) fn get(
        &self,
        refresh: impl FnOnce(&str) -> Result<Fresh, Error>,
    ) -> Result<Option<String>, Error> {
        let Some(file) = &self.file else { return Ok(None) };
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if let Some(token) = held.as_ref().filter(|token| now < token.renew) {
            return Ok(Some(token.bearer.clone()));
        }
        let usable = held.as_ref().filter(|token| now < token.expires).map(|token| token.bearer.clone());
        let Some(refresh_token) = file.read() else { return Ok(usable) };
        match refresh(&refresh_token) {
            Ok(fresh) => {
                let life = Duration::from_secs(fresh.expires_in.min(30 * 24 * 3600));
                let token = Held {
                    bearer: fresh.access_token.clone(),
                    renew: now + life * 4 / 5,
                    expires: now + life,
                };
                *held = Some(token);
                Ok(Some(fresh.access_token))
            }
            Err(error) => match usable {
                Some(bearer) => {
                    // Not at every request: the next try is when a tenth of what is left has passed.
                    if let Some(token) = held.as_mut() {
                        token.renew = now + (token.expires - now) / 10;
                    }
                    Ok(Some(bearer))
                }
                // A server that knows no tokens.
                None if error.status() == Some(404) => Ok(None),
                None => Err(Error::NoToken { source: Box::new(error) }),
            },
        }
    }

    /// Drops `bearer`, unless another thread has replaced it already.
    pub(super) fn forget(&self, bearer: Option<&str>) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.as_ref().is_some_and(|token| Some(token.bearer.as_str()) == bearer) {
            *held = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(content: &str) -> (tempfile::TempDir, Token) {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("token");
        fs::write(&path, content).expect("writes");
        (dir, Token::new(Some(TokenFile(path))))
    }

    fn fresh(name: &str, expires_in: u64) -> Result<Fresh, Error> {
        Ok(Fresh { access_token: name.into(), expires_in })
    }

    fn down() -> Result<Fresh, Error> {
        Err(Error::Refused { url: "refresh".into(), status: 503, message: String::new() })
    }

    #[test]
    fn it_is_refreshed_once_and_again_after_a_failure() {
        let (_dir, token) = token(r#"{"refresh_token": "R"}"#);
        assert!(token.get(|_| down()).is_err());
        let first = token.get(|refresh| {
            assert_eq!(refresh, "R");
            fresh("A", 600)
        });
        assert_eq!(first.expect("refreshed").as_deref(), Some("A"), "a failure is not for ever");
        let second = token.get(|_| panic!("still fresh"));
        assert_eq!(second.expect("held").as_deref(), Some("A"));
        token.forget(Some("older"));
        assert_eq!(token.get(|_| panic!("still fresh")).expect("held").as_deref(), Some("A"));
        token.forget(Some("A"));
        assert_eq!(token.get(|_| fresh("B", 600)).expect("refreshed").as_deref(), Some("B"));
    }

    #[test]
    fn it_is_renewed_early_and_the_old_one_used_while_that_fails() {
        let (_dir, token) = token(r#"{"refresh_token": "R"}"#);
        token.get(|_| fresh("A", 600)).expect("refreshed");
        if let Some(held) = token.held.lock().expect("lock").as_mut() {
            held.renew = Instant::now();
        }
        let mut asked = false;
        let still = token.get(|_| {
            asked = true;
            down()
        });
        assert!(asked, "four fifths of its life are over");
        assert_eq!(still.expect("held").as_deref(), Some("A"));
    }

    #[test]
    fn without_a_file_one_is_anybody_until_it_appears() {
        let (dir, token) = token("no JSON");
        assert_eq!(token.get(|_| panic!("nothing to refresh with")).expect("anybody"), None);
        fs::write(dir.path().join("token"), r#"{"refresh_token": "R", "obtained_at": "x"}"#).expect("writes");
        assert_eq!(token.get(|_| fresh("A", 600)).expect("refreshed").as_deref(), Some("A"));
    }
}
