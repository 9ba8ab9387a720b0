//! HTTP with a Testflinger server: one method per endpoint, the token, and what an answer means.
//!
//! Does not retry, but for a token that expired: whether a request may be sent twice is known to
//! the caller alone. [`Error::is_outage`] says when trying again later makes sense.

mod address;
mod agent;
mod body;
mod error;
mod result;
mod token;
mod user;

pub use error::Error;
pub use result::{JobResult, PhaseResult};
pub use token::{Login, TokenFile};
pub use user::{Found, LogPart};

use address::Address;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::Duration;
use token::{Grant, Token};
use ureq::http::{Method, Request, Response, StatusCode, header};
use ureq::tls::{RootCerts, TlsConfig, TlsProvider};
use ureq::{Body, SendBody};

/// A server that is away for longer does not come back for this run.
pub(super) const OUTAGE: Duration = Duration::from_secs(3600);
/// How long one request may take, unless its endpoint has a limit of its own.
const USUAL: Duration = Duration::from_secs(30);
/// For logs: they may be large.
const LOGS: Duration = Duration::from_secs(60);
/// For attachments and artifacts.
const FILES: Duration = Duration::from_secs(600);
/// The server calls the webhook while we wait.
const EVENTS: Duration = Duration::from_secs(15);
/// The server takes no document of 16 MiB and gives none.
const LARGEST_ANSWER: u64 = 32 << 20;

type Result<T> = std::result::Result<T, Error>;

/// A connection to a server, with the right to use it.
#[derive(Debug)]
pub struct Client {
    http: ureq::Agent,
    address: Address,
    /// Sent with every request: the server tells agents apart by it when it hands out jobs.
    cookie: Option<String>,
    token: Token,
}

impl Client {
    /// A client of the server at `address`, which need not say `http://`.
    pub fn new(address: &str, token: Option<TokenFile>) -> Self {
        Self::with(address, Token::new(token.map(token::Source::File)), 2)
    }

    /// A client for who submits jobs and reads their results; without a login, for anybody.
    pub fn for_user(address: &str, login: Option<Login>) -> Self {
        Self::with(address, Token::new(login.map(token::Source::Login)), 8)
    }

    fn with(address: &str, token: Token, connections: usize) -> Self {
        let tls = TlsConfig::builder()
            .provider(TlsProvider::NativeTls)
            // A lab's server may have a certificate that only its hosts trust.
            .root_certs(RootCerts::PlatformVerifier)
            .build();
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(3)
            .max_idle_connections(connections)
            .max_idle_connections_per_host(connections)
            .input_buffer_size(16 << 10)
            .output_buffer_size(16 << 10)
            .user_agent(concat!("shakedown/", env!("CARGO_PKG_VERSION")))
            .timeout_global(Some(USUAL))
            .tls_config(tls)
            .build();
        Self { http: config.into(), address: Address::of(address), cookie: None, token }
    }

    /// Speaks as the agent of this name.
    #[must_use]
    pub fn as_agent(mut self, agent: &str) -> Self {
        self.cookie = Some(format!("agent_name={agent}"));
        self
    }

    /// Where the server is: scheme and host, without a slash at the end, and without who we are to it.
    pub fn base(&self) -> &str {
        &self.address.base
    }

    /// Whether the server is there.
    ///
    /// # Errors
    /// When it is not, or answers 500 and above.
    pub fn ping(&self) -> Result<()> {
        match self.call(Method::GET, "/v1", Payload::None, Duration::from_secs(10)) {
            Err(Error::Refused { status: ..500, .. }) => Ok(()),
            other => other.map(drop),
        }
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.get_optional(path)?.ok_or_else(|| self.garbled(path, "nothing"))
    }

    /// `None` for 204.
    fn get_optional<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>> {
        let mut response = self.call(Method::GET, path, Payload::None, USUAL)?;
        self.json(path, &mut response)
    }

    fn json<T: DeserializeOwned>(&self, path: &str, response: &mut Response<Body>) -> Result<Option<T>> {
        if response.status() == StatusCode::NO_CONTENT {
            return Ok(None);
        }
        let body = response.body_mut().with_config().limit(LARGEST_ANSWER).read_to_vec();
        let body = body.map_err(|error| match error {
            ureq::Error::BodyExceedsLimit(limit) => self.garbled(path, format!("more than {limit} bytes")),
            source => Error::Unreachable { url: self.url(path), source: Box::new(source) },
        })?;
        serde_json::from_slice(&body).map(Some).map_err(|error| self.garbled(path, error))
    }

    fn post(&self, path: &str, body: &impl Serialize, limit: Duration) -> Result<()> {
        let body = serde_json::to_vec(body).map_err(|error| self.garbled(path, error))?;
        let mut response = self.call(Method::POST, path, Payload::Json(&body), limit)?;
        // Read to its end, so that the connection can be used again.
        let _ = response.body_mut().with_config().limit(64 << 10).read_to_vec();
        Ok(())
    }

    /// Writes an answer to `file`; false for 204.
    fn download(&self, path: &str, file: &mut File, limit: u64) -> Result<bool> {
        let mut response = self.call(Method::GET, path, Payload::None, FILES)?;
        if response.status() == StatusCode::NO_CONTENT {
            return Ok(false);
        }
        let mut reader = endless(&mut response);
        let mut chunk = vec![0; 64 << 10];
        let mut left = limit;
        loop {
            let size = reader.read(&mut chunk).map_err(|error| self.broken(path, error))?;
            if size == 0 {
                return Ok(true);
            }
            left = left
                .checked_sub(size as u64)
                .ok_or_else(|| self.garbled(path, format!("more than {limit} bytes")))?;
            file.write_all(&chunk[..size])
                .map_err(|source| Error::Here { what: "cannot write what was downloaded".into(), source })?;
        }
    }

    /// Sends a request with the token; once more with a new one if the server does not like it.
    fn call(&self, method: Method, path: &str, body: Payload<'_>, limit: Duration) -> Result<Response<Body>> {
        let bearer = self.token.get(|grant| self.grant(grant))?;
        let response = self.send(&method, path, &body, limit, bearer.as_deref().map(bearer_header))?;
        let renew = match response.status().as_u16() {
            401 => true,
            // Who has no token is anybody, and anybody may do little.
            403 => bearer.is_none(),
            _ => false,
        };
        if renew {
            self.token.forget(bearer.as_deref());
            if let Some(bearer) = self.token.get(|grant| self.grant(grant))? {
                let response = self.send(&method, path, &body, limit, Some(bearer_header(&bearer)))?;
                return self.checked(path, response);
            }
        }
        self.checked(path, response)
    }

    fn grant(&self, grant: Grant<'_>) -> Result<token::Fresh> {
        let limit = Duration::from_secs(15);
        let (path, response) = match grant {
            Grant::Refresh(token) => {
                let path = "/v1/oauth2/refresh";
                let body = serde_json::json!({"refresh_token": token}).to_string();
                (path, self.send(&Method::POST, path, &Payload::Json(body.as_bytes()), limit, None)?)
            }
            Grant::Login(Login { client_id, secret_key }) => {
                if self.address.is_guess() {
                    return Err(Error::Unsafe { host: self.address.host().to_owned() });
                }
                let path = "/v1/oauth2/token";
                let basic = address::basic(&format!("{client_id}:{secret_key}"));
                (path, self.send(&Method::POST, path, &Payload::None, limit, Some(basic))?)
            }
        };
        let mut response = self.checked(path, response)?;
        let answer = response.body_mut().with_config().limit(1 << 20).read_to_vec();
        let answer = answer.map_err(|error| self.garbled(path, error))?;
        serde_json::from_slice(&answer).map_err(|error| self.garbled(path, error))
    }

    fn send(
        &self,
        method: &Method,
        path: &str,
        body: &Payload<'_>,
        limit: Duration,
        authorization: Option<String>,
    ) -> Result<Response<Body>> {
        let url = self.url(path);
        let mut request = Request::builder().method(method.clone()).uri(&url);
        if let Some(authorization) = authorization.or_else(|| self.address.authorization.clone()) {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        if let Some(cookie) = &self.cookie {
            request = request.header(header::COOKIE, cookie);
        }
        let unreachable = |source| Error::Unreachable { url: url.clone(), source: Box::new(source) };
        let sent = match body {
            Payload::None => {
                if *method == Method::POST {
                    // Unsaid, it would be chunked, which small servers do not read.
                    request = request.header(header::CONTENT_LENGTH, 0);
                }
                request.body(SendBody::none())
            }
            Payload::Json(json) => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                request = request.header(header::CONTENT_LENGTH, json.len());
                request.body(SendBody::from_owned_reader(io::Cursor::new(json.to_vec())))
            }
            Payload::File(file) => {
                let form = body::Form::open(file).map_err(|source| Error::Here {
                    what: format!("cannot read {}", file.display()),
                    source,
                })?;
                request = request.header(header::CONTENT_TYPE, form.content_type());
                request = request.header(header::CONTENT_LENGTH, form.len());
                request.body(SendBody::from_owned_reader(form.into_reader()))
            }
        };
        let request = sent.map_err(|error| unreachable(error.into()))?;
        let request = self.http.configure_request(request).timeout_global(Some(limit)).build();
        self.http.run(request).map_err(unreachable)
    }

    fn checked(&self, path: &str, mut response: Response<Body>) -> Result<Response<Body>> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let text = response.body_mut().with_config().limit(16 << 10).lossy_utf8(true).read_to_string();
        let text = text.unwrap_or_default();
        let message = match serde_json::from_str::<Value>(&text) {
            Ok(Value::Object(answer)) => answer
                .iter()
                .filter(|(_, value)| !matches!(value, Value::Object(map) if map.is_empty()))
                .map(|(_, value)| value.as_str().map_or_else(|| value.to_string(), str::to_owned))
                .collect::<Vec<_>>()
                .join(": "),
            _ => text,
        };
        let message = crate::fault::visible(message.trim()).chars().take(500).collect();
        Err(Error::Refused { url: self.url(path), status: status.as_u16(), message })
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.address.base)
    }

    /// What reading an answer's body came to.
    fn broken(&self, path: &str, error: io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::InvalidData => self.garbled(path, error),
            _ => Error::Unreachable { url: self.url(path), source: Box::new(error.into()) },
        }
    }

    fn garbled(&self, path: &str, error: impl ToString) -> Error {
        Error::Garbled { url: self.url(path), message: error.to_string() }
    }
}

fn bearer_header(token: &str) -> String {
    format!("Bearer {token}")
}

/// The body of an answer, of any size: for who reads it piece by piece.
fn endless(response: &mut Response<Body>) -> impl Read + '_ {
    response.body_mut().with_config().limit(u64::MAX).reader()
}

/// What is sent: it can be sent twice.
enum Payload<'a> {
    None,
    Json(&'a [u8]),
    File(&'a Path),
}

/// One segment of a path, or one value of a query.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_change_the_path() {
        assert_eq!(escape("a b/../c&d=ü"), "a%20b%2F..%2Fc%26d%3D%C3%BC");
    }
}
