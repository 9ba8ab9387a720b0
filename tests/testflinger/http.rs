//! A small HTTP server on loopback that can misbehave in every way in which a server and its network do.

use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// As it came, with the query.
    pub(crate) target: String,
    /// Without the query.
    pub(crate) path: String,
    pub(crate) query: Vec<(String, String)>,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
    /// Null when it was no JSON.
    pub(crate) json: Value,
}

impl Request {
    pub(crate) fn is(&self, method: &str, path: &str) -> bool {
        self.method == method && self.path == path
    }

    /// Its path in pieces, without the `/v1`.
    pub(crate) fn parts(&self) -> Vec<&str> {
        self.path.trim_start_matches("/v1").trim_matches('/').split('/').collect()
    }
}

/// What happens to a request instead of what should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The connection breaks before the server has acted.
    Drop,
    /// The server has acted, and the answer is lost.
    Lose,
    /// The server has acted, and half of the answer is lost.
    Cut,
    /// An answer of this status; nothing was done.
    Status(u16),
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn json(status: u16, value: &Value) -> Self {
        let headers = vec![("Content-Type".into(), "application/json".into())];
        Self { status, headers, body: value.to_string().into_bytes() }
    }

    pub(crate) fn text(status: u16, text: &str) -> Self {
        Self { status, headers: Vec::new(), body: text.as_bytes().to_vec() }
    }
}

/// Answers a request, or says what happens to it; it runs in a thread of the connection.
pub(crate) type Act = dyn Fn(&Request) -> (Option<Answer>, Option<Fault>) + Send + Sync;

#[derive(Clone)]
pub(crate) struct Http {
    pub(crate) address: SocketAddr,
    /// By the port of their other end; `None` while it is down.
    connections: Arc<Mutex<Option<BTreeMap<u16, TcpStream>>>>,
    /// How many there were.
    connected: Arc<AtomicUsize>,
    act: Arc<Act>,
}

impl Http {
    pub(crate) fn start(act: Arc<Act>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
        let address = listener.local_addr().expect("an address");
        let server = Self { address, connections: Arc::default(), connected: Arc::default(), act };
        server.listen(listener);
        server
    }

    fn connections(&self) -> MutexGuard<'_, Option<BTreeMap<u16, TcpStream>>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listen(&self, listener: TcpListener) {
        *self.connections() = Some(BTreeMap::new());
        let server = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let port = stream.peer_addr().map_or(0, |peer| peer.port());
                match server.connections().as_mut() {
                    Some(connections) => connections.insert(port, stream.try_clone().expect("clones")),
                    None => return,
                };
                server.connected.fetch_add(1, Ordering::SeqCst);
                let server = server.clone();
                std::thread::spawn(move || {
                    server.converse(stream);
                    server.connections().as_mut().and_then(|connections| connections.remove(&port));
                });
            }
        });
    }

    /// How many connections there were.
    pub(crate) fn connected(&self) -> usize {
        self.connected.load(Ordering::SeqCst)
    }

    /// Kills it: connections break, new ones are refused.
    pub(crate) fn down(&self) {
        for connection in self.connections().take().unwrap_or_default().values() {
            let _ = connection.shutdown(Shutdown::Both);
        }
        // Each one wakes the thread that accepts, which ends then.
        let begun = Instant::now();
        while TcpStream::connect(self.address).is_ok() {
            assert!(begun.elapsed() < Duration::from_secs(10), "it still listens");
            std::thread::yield_now();
        }
    }

    pub(crate) fn up(&self) {
        let begun = Instant::now();
        let listener = loop {
            match TcpListener::bind(self.address) {
                Ok(listener) => break listener,
                Err(error) => assert!(begun.elapsed() < Duration::from_secs(10), "{error}"),
            }
            std::thread::yield_now();
        };
        self.listen(listener);
    }

    fn converse(&self, mut stream: TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        loop {
            let request = read_request(&mut reader)?;
            let (answer, fault) = (self.act)(&request);
            let answer = match (fault, answer) {
                (Some(Fault::Drop | Fault::Lose), _) | (_, None) => {
                    let _ = stream.shutdown(Shutdown::Both);
                    return None;
                }
                (Some(Fault::Status(status)), _) => Answer::text(status, "injected"),
                (_, Some(answer)) => answer,
            };
            let mut head = format!("HTTP/1.1 {} X\r\n", answer.status);
            for (name, value) in &answer.headers {
                head.push_str(&format!("{name}: {value}\r\n"));
            }
            if answer.status != 204 {
                head.push_str(&format!("Content-Length: {}\r\n", answer.body.len()));
            }
            // In one piece: the kernel would hold the second one back for 40 ms.
            let mut all = [format!("{head}\r\n").as_bytes(), &answer.body].concat();
            if fault == Some(Fault::Cut) {
                all.truncate(all.len() - answer.body.len() / 2 - 1);
                let _ = stream.write_all(&all);
                let _ = stream.shutdown(Shutdown::Both);
                return None;
            }
            stream.write_all(&all).ok()?;
        }
    }
}

fn read_request(reader: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.split_once(':') else { break };
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    // A body that ends early is no request: nothing of it is acted upon.
    reader.read_exact(&mut body).ok()?;
    let json = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let pair = |pair: &str| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decoded(name), decoded(value))
    };
    let query = query.split('&').filter(|pair| !pair.is_empty()).map(pair).collect();
    let path = path.to_owned();
    Some(Request { method, target, path, query, headers, body, json })
}

fn decoded(text: &str) -> String {
    let mut pieces = text.split('%');
    let mut bytes = pieces.next().unwrap_or_default().as_bytes().to_vec();
    for piece in pieces {
        bytes.push(u8::from_str_radix(&piece[..2], 16).expect("two digits"));
        bytes.extend_from_slice(&piece.as_bytes()[2..]);
    }
    String::from_utf8(bytes).expect("UTF-8")
}
