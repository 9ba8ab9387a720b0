//! A Testflinger server of our own, for tests: what server 1.5.0 does for agents, as strictly, and every
//! way in which a server and its network can misbehave.

pub(crate) use crate::http::Fault;
use crate::http::{Answer, Http, Request};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) method: String,
    /// With the query.
    pub(crate) path: String,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
    /// Null when it was no JSON.
    pub(crate) json: Value,
    pub(crate) status: u16,
}

impl Seen {
    fn of(request: &Request) -> Self {
        let Request { method, target: path, headers, body, json, .. } = request.clone();
        Self { method, path, headers, body, json, status: 0 }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn is(&self, method: &str, path: &str) -> bool {
        self.method == method && self.path.split('?').next() == Some(path)
    }
}

type Hook = Box<dyn FnMut(&Seen) -> Option<Fault> + Send>;

#[derive(Default)]
pub(crate) struct State {
    pub(crate) agents: BTreeMap<String, Map<String, Value>>,
    pub(crate) queues: BTreeMap<String, String>,
    pub(crate) images: BTreeMap<String, Value>,
    /// Jobs that wait.
    pub(crate) jobs: VecDeque<Value>,
    /// Jobs that were handed out.
    pub(crate) taken: Vec<String>,
    pub(crate) results: BTreeMap<String, Result>,
    pub(crate) attachments: BTreeMap<String, Vec<u8>>,
    pub(crate) provision_logs: Vec<Value>,
    /// What came as a database of its own kind, once it was made.
    pub(crate) points: Option<Vec<String>>,
    pub(crate) seen: Vec<Seen>,
    /// What no correct agent does.
    pub(crate) violations: Vec<String>,
    /// Tokens that work; `None`: anybody may do anything.
    tokens: Option<Vec<String>>,
    issued: u32,
    hook: Option<Hook>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Result {
    pub(crate) state: String,
    pub(crate) status: BTreeMap<String, i64>,
    pub(crate) device_info: Value,
    pub(crate) states: Vec<String>,
    /// (log, phase, number, text), as they came.
    pub(crate) fragments: Vec<(String, String, u64, String)>,
    pub(crate) events: Vec<Value>,
    pub(crate) artifact: Option<Vec<u8>>,
}

impl Result {
    pub(crate) fn text(&self, log: &str, phase: &str) -> String {
        let mut fragments: Vec<_> = self.fragments.iter().filter(|f| f.0 == log && f.1 == phase).collect();
        fragments.sort_by_key(|fragment| fragment.2);
        fragments.into_iter().map(|fragment| fragment.3.as_str()).collect()
    }

    pub(crate) fn output(&self, phase: &str) -> String {
        self.text("output", phase)
    }

    /// Names and details.
    pub(crate) fn story(&self) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        self.events.iter().map(|event| (text(&event["event_name"]), text(&event["detail"]))).collect()
    }

    pub(crate) fn event_names(&self) -> Vec<String> {
        self.story().into_iter().map(|(name, _)| name).collect()
    }

    pub(crate) fn artifact_names(&self) -> Vec<String> {
        let Some(form) = &self.artifact else { return Vec::new() };
        let start = form.windows(4).position(|w| w == b"\r\n\r\n").expect("a part") + 4;
        let end = form.len() - form[..start].split(|b| *b == b'\r').next().expect("a boundary").len() - 6;
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(&form[start..end]));
        let entries = archive.entries().expect("a tar");
        let name = |entry: std::io::Result<tar::Entry<'_, _>>| {
            entry
                .expect("an entry")
                .path()
                .expect("a path")
                .to_string_lossy()
                .trim_end_matches('/')
                .to_owned()
        };
        entries.map(name).collect()
    }
}

const PHASES: [&str; 7] = ["setup", "provision", "firmware_update", "test", "allocate", "reserve", "cleanup"];

struct Shared {
    state: Mutex<State>,
    news: Condvar,
}

#[derive(Clone)]
pub(crate) struct Server {
    shared: Arc<Shared>,
    http: Http,
    pub(crate) address: SocketAddr,
}

impl Server {
    pub(crate) fn start() -> Self {
        let shared = Arc::new(Shared { state: Mutex::default(), news: Condvar::new() });
        let of = Arc::clone(&shared);
        let http = Http::start(Arc::new(move |request| of.answer(request)));
        Self { shared, address: http.address, http }
    }

    /// Not listening yet: [`Self::up`] starts it.
    pub(crate) fn start_down() -> Self {
        let server = Self::start();
        server.down();
        server
    }

    /// Kills it: connections break, new ones are refused.
    pub(crate) fn down(&self) {
        self.http.down();
    }

    pub(crate) fn up(&self) {
        self.http.up();
    }

    /// How many connections there were.
    pub(crate) fn connected(&self) -> usize {
        self.http.connected()
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state()
    }

    /// Waits until `ready` finds what it looks for.
    pub(crate) fn until<T>(&self, what: &str, mut ready: impl FnMut(&mut State) -> Option<T>) -> T {
        let begun = Instant::now();
        let mut state = self.state();
        loop {
            if let Some(found) = ready(&mut state) {
                return found;
            }
            if begun.elapsed() > Duration::from_secs(60) {
                let seen: Vec<_> = state
                    .seen
                    .iter()
                    .rev()
                    .take(40)
                    .map(|s| format!("{} {} {} -> {}", s.method, s.path, s.json, s.status))
                    .collect();
                panic!("waited in vain until {what}; the last requests, latest first:\n{}", seen.join("\n"));
            }
            let waited = self.shared.news.wait_timeout(state, Duration::from_millis(100));
            state = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
    }

    /// Waits for the end of a job that was told, and gives its result.
    pub(crate) fn finished(&self, job: &str) -> Result {
        self.until(&format!("job {job} has ended"), |state| {
            let last = state.agents.values().any(|agent| agent.get("job_id").is_some_and(|id| id == job));
            let result = state.results.get(job)?;
            let told = result.states.last().is_some_and(|state| state == "complete" || state == "cancelled");
            (told && !last).then(|| result.clone())
        })
    }

    pub(crate) fn submit(&self, job: Value) {
        let mut state = self.state();
        let id = job["job_id"].as_str().expect("an id").to_owned();
        state.results.insert(id, Result { state: "waiting".into(), ..Result::default() });
        state.jobs.push_back(job);
    }

    pub(crate) fn cancel(&self, job: &str) {
        self.state().results.get_mut(job).expect("a job").state = "cancelled".into();
    }

    pub(crate) fn set_agent(&self, agent: &str, state: &str, comment: &str) {
        let mut all = self.state();
        let data = all.agents.entry(agent.into()).or_default();
        data.insert("state".into(), state.into());
        data.insert("comment".into(), comment.into());
    }

    /// From now on `hook` is asked of each request what shall happen to it.
    pub(crate) fn misbehave(&self, hook: impl FnMut(&Seen) -> Option<Fault> + Send + 'static) {
        self.state().hook = Some(Box::new(hook));
    }

    pub(crate) fn behave(&self) {
        self.state().hook = None;
    }

    /// From now on tokens are needed, and none that was issued works.
    pub(crate) fn expire_tokens(&self) {
        self.state().tokens = Some(Vec::new());
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn answer(&self, request: &Request) -> (Option<Answer>, Option<Fault>) {
        let mut seen = Seen::of(request);
        let mut hook = self.state().hook.take();
        // Outside of the lock: it may look at the state.
        let fault = hook.as_mut().and_then(|hook| hook(&seen));
        let mut state = self.state();
        if state.hook.is_none() {
            state.hook = hook;
        }
        if fault == Some(Fault::Drop) {
            return (None, fault);
        }
        let answer = match fault {
            Some(Fault::Status(status)) => Answer::text(status, "injected"),
            _ => state.act(&seen),
        };
        seen.status = answer.status;
        state.seen.push(seen);
        self.news.notify_all();
        (Some(answer), fault)
    }
}

impl Answer {
    fn ok() -> Self {
        Self::text(200, "OK")
    }
}

impl State {
    fn act(&mut self, seen: &Seen) -> Answer {
        let (path, query) = seen.path.split_once('?').unwrap_or((&seen.path, ""));
        if path == "/v1/oauth2/refresh" {
            if seen.headers.contains_key("authorization") {
                self.violations.push("a refresh with a bearer".into());
            }
            self.issued += 1;
            let token = format!("TOKEN-{}", self.issued);
            self.tokens.get_or_insert_default().push(token.clone());
            return Answer::json(
                200,
                &json!({"access_token": token, "expires_in": 600, "token_type": "Bearer"}),
            );
        }
        if path == "/query" || path == "/write" {
            return self.influx(seen).unwrap_or_else(|| {
                self.violations.push(format!("no InfluxDB takes: {} {}", seen.path, seen.text()));
                Answer::text(400, "{\"error\":\"unable to parse\"}")
            });
        }
        if let Some(refusal) = self.refusal(seen, path) {
            return refusal;
        }
        let parts: Vec<_> = path.trim_start_matches("/v1").trim_matches('/').split('/').collect();
        let answer = match (seen.method.as_str(), &parts[..]) {
            ("GET", [""]) => Some(Answer::text(200, "Testflinger Server v1.5.0")),
            ("POST", ["agents", "data", agent]) => self.update_agent(agent, &seen.json),
            ("GET", ["agents", "data", agent]) => Some(self.agents.get(*agent).map_or_else(
                || Answer::text(404, "{}"),
                |data| Answer::json(200, &Value::Object(data.clone())),
            )),
            ("POST", ["agents", "queues"]) => texts(&seen.json).map(|queues| {
                self.queues.extend(queues);
                Answer::ok()
            }),
            ("POST", ["agents", "images"]) => seen.json.as_object().and_then(|images| {
                for (queue, images) in images {
                    self.images.insert(queue.clone(), json!(texts(images)?));
                }
                Some(Answer::ok())
            }),
            ("POST", ["agents", "provision_logs", _]) => {
                fields(&seen.json, &["job_id", "exit_code", "detail"]).map(|_| {
                    self.provision_logs.push(seen.json.clone());
                    Answer::ok()
                })
            }
            ("GET", ["job"]) => Some(self.take_job(query)),
            ("GET", ["job", job, "attachments"]) => Some(self.attachments.get(*job).map_or_else(
                || Answer::text(204, ""),
                |archive| Answer { status: 200, headers: Vec::new(), body: archive.clone() },
            )),
            ("POST", ["job", job, "events"]) => self.events(job, &seen.json),
            ("GET", ["result", job]) => Some(self.result(job)),
            ("POST", ["result", job]) => self.update_result(job, &seen.json),
            ("GET", ["result", job, "log", log]) => Some(self.log(job, log, query)),
            ("POST", ["result", job, "log", log]) => self.fragment(job, log, &seen.json),
            ("POST", ["result", job, "artifact"]) => self.artifact(job, seen),
            _ => Some(Answer::text(404, "no such endpoint")),
        };
        answer.unwrap_or_else(|| {
            self.violations.push(format!("422: {} {} {}", seen.method, seen.path, seen.json));
            let detail = json!({"json": {"field": ["Unknown field."]}});
            Answer::json(422, &json!({"message": "Validation error", "detail": detail}))
        })
    }

    /// What InfluxDB 1 does with the requests of the original.
    fn influx(&mut self, seen: &Seen) -> Option<Answer> {
        // `me:pw`
        if (seen.method.as_str(), seen.headers.get("authorization")?.as_str()) != ("POST", "Basic bWU6cHc=") {
            return None;
        }
        if seen.path == "/query?q=CREATE+DATABASE+%22agent_jobs%22" {
            self.points.get_or_insert_default();
            return Some(Answer::json(200, &json!({"results": [{"statement_id": 0}]})));
        }
        let shape =
            r#"^phase\\ result,agent=(?:[^ ,=\\]|\\[ ,=])+ (phase="[a-z_]+"(?:,result=\d+i)?) \d{19}\n$"#;
        let point = regex::Regex::new(shape).expect("a regex").captures(&seen.text())?[1].to_owned();
        (seen.path == "/write?db=agent_jobs").then_some(())?;
        let Some(points) = &mut self.points else {
            return Some(Answer::text(404, "{\"error\":\"database not found: \\\"agent_jobs\\\"\"}"));
        };
        points.push(point);
        Some(Answer::text(204, ""))
    }

    /// 401 and 403, and what an agent must send with every request.
    fn refusal(&mut self, seen: &Seen, path: &str) -> Option<Answer> {
        let cookie = seen.headers.get("cookie");
        if !cookie.is_some_and(|cookie| cookie.starts_with("agent_name=")) {
            self.violations.push(format!("no cookie: {} {}", seen.method, seen.path));
            if path == "/v1/job" {
                return Some(Answer::text(401, "Agent not identified"));
            }
        }
        let tokens = self.tokens.as_ref()?;
        let bearer = seen.headers.get("authorization").and_then(|value| value.strip_prefix("Bearer "));
        let answer =
            |status, message: &str| Some(Answer::json(status, &json!({"detail": {}, "message": message})));
        let is_contributors = seen.method == "GET" && path.contains("/log/");
        match bearer {
            Some(bearer) if tokens.iter().any(|token| token == bearer) => {
                is_contributors.then(|| answer(403, "Specified action requires role: contributor"))?
            }
            Some(_) => answer(401, "Token has expired"),
            None if seen.method == "GET" && path != "/v1/job" => None,
            None => answer(403, "Specified action requires role: agent"),
        }
    }

    fn update_agent(&mut self, agent: &str, json: &Value) -> Option<Answer> {
        let known =
            ["state", "comment", "job_id", "location", "provision_type", "identifier", "queues", "log"];
        let update = fields_of(json, &known)?;
        let data = self.agents.entry(agent.into()).or_insert_with(|| {
            let data = json!({"name": agent, "state": "unknown", "comment": "", "restricted_to": {}});
            data.as_object().expect("an object").clone()
        });
        data.extend(update.clone());
        data.insert(
            "updated_at".into(),
            jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string().into(),
        );
        let mut answer = Answer::json(200, &json!({"status": "OK"}));
        let cookie = format!("agent_name={agent}; HttpOnly; Path=/; SameSite=Strict");
        answer.headers.push(("Set-Cookie".into(), cookie));
        Some(answer)
    }

    fn take_job(&mut self, query: &str) -> Answer {
        let queues: Vec<_> = query.split('&').filter_map(|pair| pair.strip_prefix("queue=")).collect();
        if queues.is_empty() {
            return Answer::text(400, "no queue");
        }
        let found = self.jobs.iter().position(|job| queues.iter().any(|queue| job["job_queue"] == *queue));
        let Some(job) = found.and_then(|index| self.jobs.remove(index)) else { return Answer::text(204, "") };
        let id = job["job_id"].as_str().expect("an id").to_owned();
        self.results.entry(id.clone()).or_default().state = "running".into();
        self.taken.push(id);
        Answer::json(200, &job)
    }

    fn events(&mut self, job: &str, json: &Value) -> Option<Answer> {
        let body = fields(json, &["agent_id", "job_queue", "job_status_webhook", "events"])?;
        let events = body["events"].as_array()?;
        for event in events {
            fields(event, &["event_name", "timestamp", "detail"])?;
        }
        let known = &mut self.results.get_mut(job)?.events;
        if !events.starts_with(known) {
            self.violations.push(format!("events were forgotten: {known:?} {events:?}"));
        }
        known.clone_from(events);
        Some(Answer::ok())
    }

    fn result(&self, job: &str) -> Answer {
        let Some(result) = self.results.get(job) else { return Answer::text(204, "") };
        let mut answer = BTreeMap::from([("job_state".to_owned(), json!(result.state))]);
        if !result.device_info.is_null() {
            answer.insert("device_info".into(), result.device_info.clone());
        }
        for phase in PHASES {
            for log in ["output", "serial"] {
                let text = result.text(log, phase);
                if !text.is_empty() {
                    answer.insert(format!("{phase}_{log}"), text.into());
                }
            }
            if let Some(status) = result.status.get(phase) {
                answer.insert(format!("{phase}_status"), (*status).into());
            }
        }
        Answer::json(200, &json!(answer))
    }

    fn update_result(&mut self, job: &str, json: &Value) -> Option<Answer> {
        let update = fields_of(json, &["status", "job_state", "device_info"])?.clone();
        let result = self.results.entry(job.into()).or_default();
        for (phase, status) in update.get("status").and_then(Value::as_object).into_iter().flatten() {
            PHASES.contains(&phase.as_str()).then_some(())?;
            result.status.insert(phase.clone(), status.as_i64()?);
        }
        if let Some(state) = update.get("job_state") {
            result.state = state.as_str()?.to_owned();
            result.states.push(result.state.clone());
        }
        if let Some(info) = update.get("device_info") {
            result.device_info = info.as_object()?.clone().into();
        }
        Some(Answer::ok())
    }

    fn fragment(&mut self, job: &str, log: &str, json: &Value) -> Option<Answer> {
        let body = fields(json, &["fragment_number", "timestamp", "phase", "log_data"])?;
        let phase = body["phase"].as_str().filter(|phase| PHASES.contains(phase))?.to_owned();
        body["timestamp"].as_str()?.parse::<jiff::Timestamp>().ok()?;
        let fragment =
            (log.to_owned(), phase, body["fragment_number"].as_u64()?, body["log_data"].as_str()?.to_owned());
        self.results.entry(job.into()).or_default().fragments.push(fragment);
        Some(Answer::ok())
    }

    fn log(&self, job: &str, log: &str, query: &str) -> Answer {
        let start: u64 =
            query.split('&').find_map(|p| p.strip_prefix("start_fragment=")?.parse().ok()).unwrap_or(0);
        let result = self.results.get(job).cloned().unwrap_or_default();
        let phases: Map<_, _> = PHASES
            .iter()
            .map(|phase| {
                let of = |f: &&(String, String, u64, String)| f.0 == log && f.1 == *phase && f.2 >= start;
                let found: Vec<_> = result.fragments.iter().filter(of).collect();
                let last = found.iter().map(|f| f.2 as i64).max().unwrap_or(-1);
                let text: String = found.iter().map(|f| f.3.as_str()).collect();
                ((*phase).to_owned(), json!({"last_fragment_number": last, "log_data": text}))
            })
            .collect();
        Answer::json(200, &json!({log: phases}))
    }

    fn artifact(&mut self, job: &str, seen: &Seen) -> Option<Answer> {
        let boundary = seen.headers.get("content-type")?.strip_prefix("multipart/form-data; boundary=")?;
        let head = format!(
            "--{boundary}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"file\"\r\n\
             Content-Type: application/x-gzip\r\n\r\n"
        );
        let tail = format!("\r\n--{boundary}--\r\n");
        (seen.body.starts_with(head.as_bytes()) && seen.body.ends_with(tail.as_bytes())).then_some(())?;
        self.results.entry(job.into()).or_default().artifact = Some(seen.body.clone());
        Some(Answer::ok())
    }
}

/// An object with no other keys than these.
fn fields_of<'a>(json: &'a Value, known: &[&str]) -> Option<&'a Map<String, Value>> {
    json.as_object().filter(|object| object.keys().all(|key| known.contains(&key.as_str())))
}

/// An object with these keys.
fn fields<'a>(json: &'a Value, known: &[&str]) -> Option<&'a Map<String, Value>> {
    fields_of(json, known).filter(|object| object.len() == known.len())
}

fn texts(json: &Value) -> Option<BTreeMap<String, String>> {
    json.as_object()?.iter().map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}
