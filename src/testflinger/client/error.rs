//! Why a request did not do what it should, and whether asking again may help.

use super::super::wire::WrongJob;
use std::io;

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
    /// A login would go over the network in clear text, which nobody asked for: it was not sent.
    #[error(
        "a login is not sent to {host} over plain HTTP, unasked\nFix: write `https://{host}`, or `http://{host}` if that is meant"
    )]
    Unsafe {
        /// Where it would have gone.
        host: String,
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
            Self::Garbled { .. } | Self::Unsafe { .. } | Self::WrongJob(_) | Self::Here { .. } => false,
        }
    }

    /// True when the same request may succeed later without anybody's doing: [`Self::is_outage`] for
    /// who has an identity of its own, and whose refusal therefore is one.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::NoToken { source } => source.is_passing(),
            Self::Refused { status: 401 | 403, .. } => false,
            other => other.is_outage(),
        }
    }

    /// True when the server may have acted on the request, although it seems to have failed.
    pub fn is_ambiguous(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Garbled { .. } => true,
            Self::Refused { status, .. } => *status >= 500,
            Self::NoToken { .. } | Self::Unsafe { .. } | Self::WrongJob(_) | Self::Here { .. } => false,
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

#[cfg(test)]
mod tests {
    use super::*;

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
        for (status, passes) in [(401, false), (403, false), (422, false), (503, true)] {
            assert_eq!(refused(status).is_passing(), passes, "{status}");
            let source = Box::new(refused(status));
            assert_eq!(Error::NoToken { source }.is_passing(), passes, "login: {status}");
        }
    }
}
