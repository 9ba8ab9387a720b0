//! HTTP with a Testflinger server: one method per endpoint, the token, and what an answer means.
//!
//! Does not retry, but for a token that expired: whether a request may be sent twice is known to
//! the caller alone. [`Error::is_outage`] says when trying again later makes sense.

mod body;
mod state;
mod token;

pub use token::TokenFile;

use super::wire::{AgentData, AgentUpdate, Event, Fragment, Job, Log, ProvisionLog, ResultUpdate, WrongJob};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;
use token::Token;
use ureq::http::{Method, Request, Response, StatusCode, header};
use ureq::tls::{RootCerts, TlsConfig, TlsProvider};
use ureq::{Body, SendBody};

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

/// Why a request did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No answer. The server may have acted on the request all the same.
    #[error("no answer from {url}")]
    Unreachable {
        /// What was asked.
        url: String,
        /// What went wrong.
        source: Box<ureq::Error>,
    },
    /// An answer that says no.
    #[error("{url} answered {status}: {message}")]
    Refused {
        /// What was asked.
        url: String,
        /// The HTTP status.
        status: u16,
        /// What the server said of it, shortened.
        message: String,
    },
    /// An answer that makes no sense.
    #[error("{url} answered what it should not: {message}")]
    Garbled {
        /// What was asked.
        url: String,
        /// What is wrong with it.
        message: String,
    },
    /// There is no token to ask with: the request was not sent, or not heard.
    #[error("no token")]
    NoToken {
        /// Why not.
        source: Box<Error>,
    },
    /// A job that makes no sense.
    #[error(transparent)]
    WrongJob(#[from] WrongJob),
    /// Something on this host.
    #[error("{what}")]
    Here {
        /// What was attempted.
        what: String,
        /// What went wrong.
        source: io::Error,
    },
}

impl Error {
    /// True when the server or the way to it is down: later, the same request may succeed.
    ///
    /// 401 and 403 count: tokens are renewed by others, and an agent without one waits for it.
    pub fn is_outage(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::NoToken { .. } => true,
            Self::Refused { status, .. } => matches!(status, 401 | 403 | 408 | 425 | 429 | 500..),
            Self::Garbled { .. } | Self::WrongJob(_) | Self::Here { .. } => false,
        }
    }

    /// True when the server may have acted on the request, although it seems to have failed.
    pub fn is_ambiguous(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Garbled { .. } => true,
            Self::Refused { status, .. } => *status >= 500,
            Self::NoToken { .. } | Self::WrongJob(_) | Self::Here { .. } => false,
        }
    }

    /// The HTTP status of a refusal.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }
}

type Result<T> = std::result::Result<T, Error>;

/// A connection to a server, with the right to use it.
#[derive(Debug)]
pub struct Client {
    http: ureq::Agent,
    base: String,
    /// Sent with every request: the server tells agents apart by it when it hands out jobs.
    cookie: Option<String>,
    token: Token,
}

impl Client {
    /// A client of the server at `address`, which need not say `http://`.
    pub fn new(address: &str, token: Option<TokenFile>) -> Self {
        let tls = TlsConfig::builder()
            .provider(TlsProvider::NativeTls)
            // A lab's server may have a certificate that only its hosts trust.
            .root_certs(RootCerts::PlatformVerifier)
            .build();
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(3)
            .max_idle_connections(2)
            .input_buffer_size(16 << 10)
            .output_buffer_size(16 << 10)
            .user_agent(concat!("shakedown/", env!("CARGO_PKG_VERSION")))
            .timeout_global(Some(USUAL))
            .tls_config(tls)
            .build();
        Self { http: config.into(), base: base(address), cookie: None, token: Token::new(token) }
    }

    /// Speaks as the agent of this name.
    #[must_use]
    pub fn as_agent(mut self, agent: &str) -> Self {
        self.cookie = Some(format!("agent_name={agent}"));
        self
    }

    /// Where the server is: scheme and host, without a slash at the end.
    pub fn base(&self) -> &str {
        &self.base
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

    /// What the server knows of `agent`; `None` when it does not know it.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn agent_data(&self, agent: &str) -> Result<Option<AgentData>> {
        match self.get(&format!("/v1/agents/data/{}", escape(agent))) {
            Err(Error::Refused { status: 404, .. }) => Ok(None),
            other => other,
        }
    }

    /// Tells the server of `agent`.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn update_agent(&self, agent: &str, update: &AgentUpdate) -> Result<()> {
        self.post(&format!("/v1/agents/data/{}", escape(agent)), update, USUAL)
    }

    /// Says what queues are for.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn advertise_queues(&self, queues: &BTreeMap<String, String>) -> Result<()> {
        self.post("/v1/agents/queues", queues, USUAL)
    }

    /// Says which images the queues have.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn advertise_images(&self, images: &BTreeMap<String, BTreeMap<String, String>>) -> Result<()> {
        self.post("/v1/agents/images", images, USUAL)
    }

    /// Takes a job from one of `queues`. It is ours then, whether or not the answer arrives.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn take_job<'a>(&self, queues: impl IntoIterator<Item = &'a str>) -> Result<Option<Job>> {
        let mut path = "/v1/job".to_owned();
        for (index, queue) in queues.into_iter().enumerate() {
            path.push(if index == 0 { '?' } else { '&' });
            path.push_str("queue=");
            path.push_str(&escape(queue));
        }
        Ok(self.get_optional::<Value>(&path)?.map(Job::new).transpose()?)
    }

    /// The state of a job, without loading its logs; `None` when the server knows none.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn job_state(&self, job: &str) -> Result<Option<String>> {
        let path = format!("/v1/result/{}", escape(job));
        let mut response = self.call(Method::GET, &path, Payload::None, LOGS)?;
        if response.status() == StatusCode::NO_CONTENT {
            return Ok(None);
        }
        let reader = response.body_mut().with_config().limit(u64::MAX).reader();
        state::find(reader).map_err(|error| self.garbled(&path, error))
    }

    /// Posts news of a job's result.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn update_result(&self, job: &str, update: &ResultUpdate) -> Result<()> {
        self.post(&format!("/v1/result/{}", escape(job)), update, USUAL)
    }

    /// Appends to a log. The server stores what it is sent as often as it is sent.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn post_fragment(&self, job: &str, log: Log, fragment: &Fragment<'_>) -> Result<()> {
        self.post(&format!("/v1/result/{}/log/{}", escape(job), log.name()), fragment, LOGS)
    }

    /// The last fragment from `start` on that the server has; `None` when it has none.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn last_fragment(&self, job: &str, log: Log, start: u64) -> Result<Option<u64>> {
        let path = format!("/v1/result/{}/log/{}?start_fragment={start}", escape(job), log.name());
        let Some(answer) = self.get_optional::<Value>(&path)? else { return Ok(None) };
        let phases = answer.get(log.name()).and_then(Value::as_object);
        let numbers =
            phases.into_iter().flatten().filter_map(|(_, p)| p.get("last_fragment_number")?.as_u64());
        Ok(numbers.max().filter(|number| *number >= start))
    }

    /// Tells the job's webhook, through the server, all that happened so far.
    ///
    /// # Errors
    /// As of every request: [`Error`]; what the webhook answers is in it too.
    pub fn post_events(&self, job: &Job, agent: &str, events: &[Event]) -> Result<()> {
        let body = serde_json::json!({
            "agent_id": agent,
            "job_queue": job.queue(),
            "job_status_webhook": job.webhook(),
            "events": events,
        });
        self.post(&format!("/v1/job/{}/events", escape(job.id())), &body, EVENTS)
    }

    /// Tells how provisioning went.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn post_provision_log(&self, agent: &str, log: &ProvisionLog) -> Result<()> {
        self.post(&format!("/v1/agents/provision_logs/{}", escape(agent)), log, USUAL)
    }

    /// Writes the job's attachments, a gzipped tar, to `file`; false when there are none.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn fetch_attachments(&self, job: &str, file: &mut File) -> Result<bool> {
        let path = format!("/v1/job/{}/attachments", escape(job));
        let mut response = self.call(Method::GET, &path, Payload::None, FILES)?;
        if response.status() == StatusCode::NO_CONTENT {
            return Ok(false);
        }
        let mut reader = response.body_mut().with_config().limit(u64::MAX).reader();
        let mut chunk = vec![0; 64 << 10];
        loop {
            let size = match reader.read(&mut chunk) {
                Ok(0) => return Ok(true),
                Ok(size) => size,
                Err(error) => {
                    return Err(Error::Unreachable { url: self.url(&path), source: Box::new(error.into()) });
                }
            };
            io::Write::write_all(file, &chunk[..size])
                .map_err(|source| Error::Here { what: "cannot write the attachments".into(), source })?;
        }
    }

    /// Uploads a job's artifacts, a gzipped tar.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn send_artifacts(&self, job: &str, archive: &Path) -> Result<()> {
        let path = format!("/v1/result/{}/artifact", escape(job));
        self.call(Method::POST, &path, Payload::File(archive), FILES).map(drop)
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.get_optional(path)?.ok_or_else(|| self.garbled(path, "nothing"))
    }

    /// `None` for 204.
    fn get_optional<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>> {
        let mut response = self.call(Method::GET, path, Payload::None, USUAL)?;
        if response.status() == StatusCode::NO_CONTENT {
            return Ok(None);
        }
        let body = response
            .body_mut()
            .with_config()
            .limit(LARGEST_ANSWER)
            .read_to_vec()
            .map_err(|source| Error::Unreachable { url: self.url(path), source: Box::new(source) })?;
        serde_json::from_slice(&body).map(Some).map_err(|error| self.garbled(path, error))
    }

    fn post(&self, path: &str, body: &impl Serialize, limit: Duration) -> Result<()> {
        let body = serde_json::to_vec(body).map_err(|error| self.garbled(path, error))?;
        let mut response = self.call(Method::POST, path, Payload::Json(&body), limit)?;
        // Read to its end, so that the connection can be used again.
        let _ = response.body_mut().with_config().limit(64 << 10).read_to_vec();
        Ok(())
    }

    /// Sends a request with the token; once more with a new one if the server does not like it.
    fn call(&self, method: Method, path: &str, body: Payload<'_>, limit: Duration) -> Result<Response<Body>> {
        let bearer = self.token.get(|refresh| self.refresh(refresh))?;
        let response = self.send(&method, path, &body, limit, bearer.as_deref())?;
        let renew = match response.status().as_u16() {
            401 => true,
            // Who has no token is anybody, and anybody may do little.
            403 => bearer.is_none(),
            _ => false,
        };
        if renew {
            self.token.forget(bearer.as_deref());
            if let Some(bearer) = self.token.get(|refresh| self.refresh(refresh))? {
                let response = self.send(&method, path, &body, limit, Some(&bearer))?;
                return self.checked(path, response);
            }
        }
        self.checked(path, response)
    }

    fn refresh(&self, refresh_token: &str) -> Result<token::Fresh> {
        let path = "/v1/oauth2/refresh";
        let body = serde_json::json!({"refresh_token": refresh_token}).to_string();
        let limit = Duration::from_secs(15);
        let response = self.send(&Method::POST, path, &Payload::Json(body.as_bytes()), limit, None)?;
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
        bearer: Option<&str>,
    ) -> Result<Response<Body>> {
        let url = self.url(path);
        let mut request = Request::builder().method(method.clone()).uri(&url);
        if let Some(bearer) = bearer {
            request = request.header(header::AUTHORIZATION, format!("Bearer {bearer}"));
        }
        if let Some(cookie) = &self.cookie {
            request = request.header(header::COOKIE, cookie);
        }
        let unreachable = |source| Error::Unreachable { url: url.clone(), source: Box::new(source) };
        let sent = match body {
            Payload::None => request.body(SendBody::none()),
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
        format!("{}{path}", self.base)
    }

    fn garbled(&self, path: &str, error: impl ToString) -> Error {
        Error::Garbled { url: self.url(path), message: error.to_string() }
    }
}

/// What is sent: it can be sent twice.
enum Payload<'a> {
    None,
    Json(&'a [u8]),
    File(&'a Path),
}

/// The scheme is put in front where it is missing; a path is lost, since all of ours are absolute.
fn base(address: &str) -> String {
    let address = address.trim();
    let scheme = address.get(..4).is_some_and(|start| start.eq_ignore_ascii_case("http"));
    let address = if scheme { address.to_owned() } else { format!("http://{address}") };
    match address.split_once("://") {
        Some((scheme, rest)) => {
            let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
            format!("{}://{host}", scheme.to_ascii_lowercase())
        }
        None => address,
    }
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
    fn addresses_are_completed_and_their_paths_dropped() {
        for (address, expected) in [
            ("localhost:5000", "http://localhost:5000"),
            ("https://tf.example/", "https://tf.example"),
            ("HTTP://tf.example/lab?x", "http://tf.example"),
            (" 10.0.0.1 ", "http://10.0.0.1"),
        ] {
            assert_eq!(base(address), expected, "{address}");
        }
    }

    #[test]
    fn names_cannot_change_the_path() {
        assert_eq!(escape("a b/../c&d=ü"), "a%20b%2F..%2Fc%26d%3D%C3%BC");
    }

    #[test]
    fn only_what_may_pass_is_an_outage() {
        let refused = |status| Error::Refused { url: String::new(), status, message: String::new() };
        for status in [401, 403, 429, 500, 502, 503, 504] {
            assert!(refused(status).is_outage(), "{status}");
        }
        for status in [400, 404, 413, 422] {
            assert!(!refused(status).is_outage(), "{status}");
        }
        assert!(!refused(403).is_ambiguous(), "a 403 was not acted upon");
    }
}
