//! The bearer token: made from a file that others renew or from a login, kept fresh, and never given
//! up on.

use super::Error;
use crate::host::setting::Invalid;
use serde::Deserialize;
use std::fmt;
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

/// Who a user is to the server.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    pub(super) client_id: String,
    pub(super) secret_key: String,
}

const CLIENT_ID: &str = "TESTFLINGER_CLIENT_ID";
const SECRET_KEY: &str = "TESTFLINGER_SECRET_KEY";

impl Login {
    /// A client id and its secret key.
    ///
    /// # Errors
    /// [`Invalid`] for an id with a colon, which HTTP Basic cannot say.
    pub fn new(client_id: &str, secret_key: &str) -> Result<Self, Invalid> {
        if client_id.contains(':') {
            let wants = "an id without `:`".into();
            return Err(Invalid::Value { name: CLIENT_ID, value: client_id.into(), wants });
        }
        Ok(Self { client_id: client_id.into(), secret_key: secret_key.into() })
    }

    /// What `TESTFLINGER_CLIENT_ID` and `TESTFLINGER_SECRET_KEY` say; `None` when neither is set.
    ///
    /// # Errors
    /// [`Invalid`] when one is without the other, and as of [`Self::new`].
    pub fn from_environment() -> Result<Option<Self>, Invalid> {
        let get = |name| std::env::var_os(name).unwrap_or_default().to_string_lossy().into_owned();
        Self::of(&get(CLIENT_ID), &get(SECRET_KEY))
    }

    fn of(client_id: &str, secret_key: &str) -> Result<Option<Self>, Invalid> {
        let lacks = |name, other| Invalid::Value {
            name,
            value: String::new(),
            wants: format!("a value where {other} has one"),
        };
        match (client_id.is_empty(), secret_key.is_empty()) {
            (true, true) => Ok(None),
            (true, false) => Err(lacks(CLIENT_ID, SECRET_KEY)),
            (false, true) => Err(lacks(SECRET_KEY, CLIENT_ID)),
            (false, false) => Self::new(client_id, secret_key).map(Some),
        }
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Login").field("client_id", &self.client_id).finish_non_exhaustive()
    }
}

/// Where tokens come from.
#[derive(Debug)]
pub(super) enum Source {
    File(TokenFile),
    Login(Login),
}

/// What a token is asked for with.
pub(super) enum Grant<'a> {
    Refresh(&'a str),
    Login(&'a Login),
}

/// What a server grants.
#[derive(Deserialize)]
pub(super) struct Fresh {
    access_token: String,
    expires_in: u64,
    /// For a login: with it the next token costs the server less, and sends no secret.
    #[serde(default)]
    refresh_token: Option<String>,
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
    source: Option<Source>,
    held: Mutex<Option<Held>>,
    /// Of a login.
    refresh: Mutex<Option<String>>,
}

impl Token {
    pub(super) fn new(source: Option<Source>) -> Self {
        Self { source, held: Mutex::new(None), refresh: Mutex::new(None) }
    }

    /// The token to use now, refreshed where it is time; `None` for anybody.
    ///
    /// A failed refresh is an error only when nothing that still works is held.
    pub(super) fn get(
        &self,
        ask: impl Fn(Grant<'_>) -> Result<Fresh, Error>,
    ) -> Result<Option<String>, Error> {
        let Some(source) = &self.source else { return Ok(None) };
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if let Some(token) = held.as_ref().filter(|token| now < token.renew) {
            return Ok(Some(token.bearer.clone()));
        }
        let usable = held.as_ref().filter(|token| now < token.expires).map(|token| token.bearer.clone());
        let asked = match source {
            Source::File(file) => match file.read() {
                Some(refresh) => ask(Grant::Refresh(&refresh)),
                None => return Ok(usable),
            },
            Source::Login(login) => self.log_in(login, ask),
        };
        match asked {
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
                // A server that knows no tokens. Who has a login wants it to count.
                None if matches!(source, Source::File(_)) && error.status() == Some(404) => Ok(None),
                None => Err(Error::NoToken { source: Box::new(error) }),
            },
        }
    }

    /// By the refresh token of the last login where there is one that works.
    fn log_in(&self, login: &Login, ask: impl Fn(Grant<'_>) -> Result<Fresh, Error>) -> Result<Fresh, Error> {
        let mut refresh = self.refresh.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(token) = refresh.take() {
            let fresh = ask(Grant::Refresh(&token));
            if !matches!(&fresh, Err(Error::Refused { status: 400..500, .. })) {
                *refresh = Some(token);
                return fresh;
            }
        }
        let fresh = ask(Grant::Login(login))?;
        refresh.clone_from(&fresh.refresh_token);
        Ok(fresh)
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
    use std::cell::{Cell, RefCell};

    fn token(content: &str) -> (tempfile::TempDir, Token) {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("token");
        fs::write(&path, content).expect("writes");
        (dir, Token::new(Some(Source::File(TokenFile(path)))))
    }

    fn fresh(name: &str, expires_in: u64) -> Result<Fresh, Error> {
        Ok(Fresh { access_token: name.into(), expires_in, refresh_token: None })
    }

    fn down() -> Result<Fresh, Error> {
        Err(Error::Refused { url: "refresh".into(), status: 503, message: String::new() })
    }

    #[test]
    fn it_is_refreshed_once_and_again_after_a_failure() {
        let (_dir, token) = token(r#"{"refresh_token": "R"}"#);
        assert!(token.get(|_| down()).is_err());
        let first = token.get(|grant| {
            assert!(matches!(grant, Grant::Refresh("R")));
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
        let asked = Cell::new(false);
        let still = token.get(|_| {
            asked.set(true);
            down()
        });
        assert!(asked.get(), "four fifths of its life are over");
        assert_eq!(still.expect("held").as_deref(), Some("A"));
    }

    #[test]
    fn without_a_file_one_is_anybody_until_it_appears() {
        let (dir, token) = token("no JSON");
        assert_eq!(token.get(|_| panic!("nothing to refresh with")).expect("anybody"), None);
        fs::write(dir.path().join("token"), r#"{"refresh_token": "R", "obtained_at": "x"}"#).expect("writes");
        assert_eq!(token.get(|_| fresh("A", 600)).expect("refreshed").as_deref(), Some("A"));
    }

    #[test]
    fn a_login_is_sent_once_and_again_when_its_refresh_token_is_refused() {
        let login = Login::of("me", "key").expect("valid");
        let token = Token::new(login.map(Source::Login));
        let asked = RefCell::new(Vec::new());
        let renew = |refuse: u16| {
            token.forget(token.get(|_| down()).ok().flatten().as_deref());
            let given = token.get(|grant| match grant {
                Grant::Refresh(token) => {
                    asked.borrow_mut().push(format!("refresh {token}"));
                    if refuse != 0 {
                        return Err(Error::Refused {
                            url: String::new(),
                            status: refuse,
                            message: String::new(),
                        });
                    }
                    fresh("A", 600)
                }
                Grant::Login(login) => {
                    asked.borrow_mut().push(format!("login {}", login.client_id));
                    Ok(Fresh { refresh_token: Some("R".into()), ..fresh("A", 600)? })
                }
            });
            (given.is_ok(), asked.take())
        };
        assert_eq!(renew(0), (true, vec!["login me".to_owned()]));
        assert_eq!(renew(0), (true, vec!["refresh R".to_owned()]));
        assert_eq!(renew(503), (false, vec!["refresh R".to_owned()]), "the server is down");
        assert_eq!(renew(400), (true, vec!["refresh R".to_owned(), "login me".to_owned()]));
    }

    #[test]
    fn half_a_login_is_an_error_and_none_is_shown() {
        assert_eq!(Login::of("", ""), Ok(None));
        for (id, key) in [("me", ""), ("", "key"), ("m:e", "key")] {
            assert!(Login::of(id, key).is_err(), "{id}:{key}");
        }
        let login = Login::of("me", "sesame").expect("valid");
        assert!(!format!("{login:?}").contains("sesame"));
    }
}
