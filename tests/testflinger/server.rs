//! A Testflinger server of our own, for tests: what server 1.5.0 does for users, as strictly.
//!
//! The agents are the test: it says what becomes of a job.

use crate::http::{Answer, Fault, Http, Request};
use base64::Engine;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub(crate) const PHASES: [&str; 7] =
    ["setup", "provision", "firmware_update", "test", "allocate", "reserve", "cleanup"];

#[derive(Clone, Debug, Default)]
pub(crate) struct Job {
    pub(crate) id: String,
    /// As it was submitted, without the id.
    pub(crate) data: Value,
    pub(crate) state: String,
    /// Attachments were announced and have not come.
    pub(crate) waits_for_attachments: bool,
    pub(crate) attachments: Option<Vec<u8>>,
    /// What its result holds beside the state.
    pub(crate) result: Map<String, Value>,
    /// (phase, number, text)
    pub(crate) fragments: Vec<(String, u64, String)>,
    pub(crate) artifacts: Option<Vec<u8>>,
}

impl Job {
    pub(crate) fn queue(&self) -> &str {
        self.data["job_queue"].as_str().unwrap_or_default()
    }

    /// What the attachments hold, by name.
    pub(crate) fn unpacked(&self) -> BTreeMap<String, Vec<u8>> {
        let form = self.attachments.as_deref().expect("attachments");
        let start = form.windows(4).position(|w| w == b"\r\n\r\n").expect("a part") + 4;
        let boundary = form.iter().position(|b| *b == b'\r').expect("a boundary");
        let end = form.len() - boundary - 6;
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(&form[start..end]));
        let mut files = BTreeMap::new();
        for entry in archive.entries().expect("a tar") {
            let mut entry = entry.expect("an entry");
            if entry.header().entry_type().is_dir() {
                continue;
            }
            let name = entry.path().expect("a path").to_string_lossy().into_owned();
            let mut content = Vec::new();
            std::io::Read::read_to_end(&mut entry, &mut content).expect("reads");
            files.insert(name, content);
        }
        files
    }
}

type Hook = Arc<dyn Fn(&Request) -> Option<Fault> + Send + Sync>;

#[derive(Default)]
pub(crate) struct State {
    /// As in a database: what is inserted twice is there twice.
    pub(crate) jobs: Vec<Job>,
    pub(crate) queues: BTreeMap<String, Vec<Value>>,
    /// What becomes of the jobs of a queue, one after the other: state and result. It has become of them
    /// when somebody looks for jobs.
    pub(crate) fates: BTreeMap<String, VecDeque<(String, Value)>>,
    /// What came, with the status of the answer.
    pub(crate) seen: Vec<(Request, u16)>,
    /// What no correct client does.
    pub(crate) violations: Vec<String>,
    /// Client id and key; `None`: anybody may do anything.
    login: Option<(String, String)>,
    tokens: Vec<String>,
    refresh_tokens: Vec<String>,
    issued: u32,
    hook: Option<Hook>,
}

#[derive(Clone)]
pub(crate) struct Server {
    shared: Arc<(Mutex<State>, Condvar)>,
    http: Http,
}

impl Server {
    pub(crate) fn start() -> Self {
        let shared: Arc<(Mutex<State>, Condvar)> = Arc::default();
        let of = Arc::clone(&shared);
        let http = Http::start(Arc::new(move |request| answer(&of, request)));
        Self { shared, http }
    }

    pub(crate) fn address(&self) -> String {
        format!("http://{}", self.http.address)
    }

    pub(crate) fn down(&self) {
        self.http.down();
    }

    pub(crate) fn up(&self) {
        self.http.up();
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `ready` finds what it looks for, after some request.
    pub(crate) fn until<T>(&self, what: &str, mut ready: impl FnMut(&mut State) -> Option<T>) -> T {
        let begun = Instant::now();
        let mut state = self.state();
        loop {
            if let Some(found) = ready(&mut state) {
                return found;
            }
            if begun.elapsed() > Duration::from_secs(60) {
                let line = |(r, status): &(Request, u16)| format!("{} {} -> {status}", r.method, r.path);
                let seen: Vec<_> = state.seen.iter().rev().take(30).map(line).collect();
                panic!("waited in vain until {what}; the last requests, latest first:\n{}", seen.join("\n"));
            }
            let waited = self.shared.1.wait_timeout(state, Duration::from_millis(100));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until `ready` finds what it looks for, however long: for those that serve the test.
    pub(crate) fn wait<T>(&self, mut ready: impl FnMut(&mut State) -> Option<T>) -> T {
        let mut state = self.state();
        loop {
            if let Some(found) = ready(&mut state) {
                return found;
            }
            state = self.shared.1.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Changes something, of which those who wait hear.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let changed = change(&mut self.state());
        self.shared.1.notify_all();
        changed
    }

    /// From now on `hook` is asked of each request what shall happen to it. It may wait.
    pub(crate) fn misbehave(&self, hook: impl Fn(&Request) -> Option<Fault> + Send + Sync + 'static) {
        self.state().hook = Some(Arc::new(hook));
    }

    /// Acts on a request of which the answer will be lost.
    pub(crate) fn act_now(&self, request: &Request) {
        self.state().act(request);
    }

    pub(crate) fn behave(&self) {
        self.state().hook = None;
    }

    /// From now on only this client may do anything.
    pub(crate) fn wants_login(&self, client_id: &str, secret_key: &str) {
        self.state().login = Some((client_id.into(), secret_key.into()));
    }

    pub(crate) fn expire_tokens(&self) {
        self.state().tokens.clear();
    }

    pub(crate) fn revoke_refresh_tokens(&self) {
        self.state().refresh_tokens.clear();
    }

    /// A queue with an agent, and what becomes of its jobs.
    pub(crate) fn queue(&self, queue: &str, fates: &[(&str, Value)]) {
        let mut state = self.state();
        state.queues.insert(queue.into(), vec![json!({"name": "a", "state": "waiting"})]);
        let fates = fates.iter().map(|(state, result)| ((*state).to_owned(), result.clone()));
        state.fates.insert(queue.into(), fates.collect());
    }

    /// The job of a queue that was submitted last.
    pub(crate) fn job(&self, queue: &str) -> Job {
        let state = self.state();
        let job = state.jobs.iter().rev().find(|job| job.queue() == queue);
        job.cloned().unwrap_or_else(|| panic!("no job in {queue}"))
    }

    /// How often a request came, whatever the answer.
    pub(crate) fn count(&self, method: &str, path: &str) -> usize {
        self.state().seen.iter().filter(|(request, _)| request.is(method, path)).count()
    }

    /// No request was wrong.
    pub(crate) fn check(&self) {
        assert_eq!(self.state().violations, Vec::<String>::new());
    }
}

fn answer(shared: &(Mutex<State>, Condvar), request: &Request) -> (Option<Answer>, Option<Fault>) {
    let lock = || shared.0.lock().unwrap_or_else(PoisonError::into_inner);
    let hook = lock().hook.clone();
    let fault = hook.and_then(|hook| hook(request));
    let answer = match fault {
        Some(Fault::Drop) => None,
        Some(Fault::Status(status)) => Some(Answer::text(status, "injected")),
        _ => Some(lock().act(request)),
    };
    let status = answer.as_ref().map_or(0, |answer| answer.status);
    lock().seen.push((request.clone(), status));
    shared.1.notify_all();
    (answer, fault)
}

impl State {
    /// What agents do.
    fn work(&mut self) {
        for job in &mut self.jobs {
            if !job.waits_for_attachments
                && job.state == "waiting"
                && let Some(fates) = self.fates.get_mut(job.queue())
                && let Some((state, result)) = fates.pop_front()
            {
                job.state = state;
                job.result = result.as_object().expect("an object").clone();
            }
        }
    }

    fn act(&mut self, request: &Request) -> Answer {
        let parts = request.parts();
        match (request.method.as_str(), &parts[..]) {
            ("POST", ["oauth2", "token"]) => return self.log_in(request),
            ("POST", ["oauth2", "refresh"]) => return self.refresh(request),
            _ => {}
        }
        if let Some(refusal) = self.refusal(request) {
            return refusal;
        }
        let answer = match (request.method.as_str(), &parts[..]) {
            ("POST", ["job"]) => self.submit(request),
            ("GET", ["job", "search"]) => {
                self.work();
                self.search(&request.query)
            }
            ("GET", ["job", id]) => Some(self.find(id).map_or(Answer::text(204, ""), |job| {
                let mut data = job.data.clone();
                data["job_id"] = job.id.clone().into();
                Answer::json(200, &data)
            })),
            ("POST", ["job", id, "attachments"]) => self.attach(id, request),
            ("POST", ["job", id, "action"]) if request.json == json!({"action": "cancel"}) => {
                Some(match self.find(id).filter(|job| !is_over(job)) {
                    None => Answer::text(400, "The job is already completed or cancelled"),
                    Some(job) => {
                        job.state = "cancelled".into();
                        Answer::text(200, "OK")
                    }
                })
            }
            ("GET", ["result", id]) => Some(self.find(id).map_or(Answer::text(204, ""), |job| {
                let state = ("job_state".to_owned(), json!(job.state));
                let fields: BTreeMap<_, _> = job.result.clone().into_iter().chain([state]).collect();
                Answer::json(200, &json!(fields))
            })),
            ("GET", ["result", id, "log", "output"]) => self.log(id, &request.query),
            ("GET", ["result", id, "artifact"]) => {
                let artifacts = self.find(id).and_then(|job| job.artifacts.clone());
                Some(artifacts.map_or(Answer::text(204, ""), |body| Answer {
                    status: 200,
                    headers: Vec::new(),
                    body,
                }))
            }
            ("GET", ["queues", queue, "agents"]) => Some(match self.queues.get(*queue) {
                None => Answer::json(
                    404,
                    &json!({"message": format!("Queue '{queue}' does not exist."), "detail": {}}),
                ),
                Some(agents) if agents.is_empty() => Answer::text(204, ""),
                Some(agents) => Answer::json(200, &json!(agents)),
            }),
            _ => None,
        };
        answer.unwrap_or_else(|| {
            self.violations.push(format!("422: {} {} {}", request.method, request.path, request.json));
            let detail = json!({"json": {"field": ["Unknown field."]}});
            Answer::json(422, &json!({"message": "Validation error", "detail": detail}))
        })
    }

    fn find(&mut self, id: &str) -> Option<&mut Job> {
        self.jobs.iter_mut().find(|job| job.id == id)
    }

    fn log_in(&mut self, request: &Request) -> Answer {
        let given = request.headers.get("authorization").and_then(|value| value.strip_prefix("Basic "));
        let given = given.and_then(|basic| base64::engine::general_purpose::STANDARD.decode(basic).ok());
        let known = self.login.as_ref().map(|(id, key)| format!("{id}:{key}").into_bytes());
        if given.is_none() || given != known {
            return Answer::text(401, "Invalid client id or client key");
        }
        self.issued += 1;
        let refresh = format!("REFRESH-{}", self.issued);
        self.refresh_tokens.push(refresh.clone());
        self.grant(json!({"refresh_token": refresh}))
    }

    fn refresh(&mut self, request: &Request) -> Answer {
        let known = self.refresh_tokens.iter().any(|token| request.json == json!({"refresh_token": token}));
        if request.headers.contains_key("authorization") {
            self.violations.push("a refresh with authorization".into());
        }
        if known { self.grant(json!({})) } else { Answer::text(400, "Invalid refresh token.") }
    }

    fn grant(&mut self, mut answer: Value) -> Answer {
        self.issued += 1;
        let token = format!("TOKEN-{}", self.issued);
        self.tokens.push(token.clone());
        answer["access_token"] = token.into();
        answer["expires_in"] = 600.into();
        answer["token_type"] = "Bearer".into();
        Answer::json(200, &answer)
    }

    fn refusal(&mut self, request: &Request) -> Option<Answer> {
        let bearer = request.headers.get("authorization").and_then(|value| value.strip_prefix("Bearer "));
        let refuse = |message: &str| Some(Answer::json(401, &json!({"message": message, "detail": {}})));
        match (bearer, &self.login) {
            (None, None) => None,
            (Some(_), None) => {
                self.violations.push("a token out of nowhere".into());
                None
            }
            (None, Some(_)) => refuse("Authentication is required for specified endpoint"),
            (Some(bearer), Some(_)) if self.tokens.iter().any(|token| token == bearer) => None,
            _ => refuse("Token has expired"),
        }
    }

    fn submit(&mut self, request: &Request) -> Option<Answer> {
        (request.headers.get("content-type")? == "application/json").then_some(())?;
        let mut data = checked_job(&request.json)?.clone();
        let id = match data.remove("job_id") {
            Some(id) => id.as_str()?.to_owned(),
            None => format!("00000000-0000-4000-8000-{:012}", self.jobs.len() + 1),
        };
        if !is_uuid(&id) {
            return Some(Answer::json(400, &json!({"message": "Invalid job_id specified", "detail": {}})));
        }
        if self.jobs.iter().any(|job| job.id == id) {
            self.violations.push(format!("{id} was submitted twice"));
        }
        let of_data =
            |(name, value): (&String, &Value)| name.ends_with("_data") && value.get("attachments").is_some();
        let waits_for_attachments = data.iter().any(of_data);
        self.jobs.push(Job {
            id: id.clone(),
            data: data.into(),
            state: "waiting".into(),
            waits_for_attachments,
            ..Job::default()
        });
        Some(Answer::json(200, &json!({"job_id": id})))
    }

    fn search(&self, query: &[(String, String)]) -> Option<Answer> {
        let of =
            |name: &str| query.iter().filter(|(n, _)| n == name).map(|(_, v)| v.as_str()).collect::<Vec<_>>();
        let (tags, matches) = (of("tags"), of("match"));
        (!tags.is_empty() && tags.len() + matches.len() == query.len()).then_some(())?;
        let has = |job: &Job, tag: &str| {
            job.data["tags"].as_array().is_some_and(|tags| tags.iter().any(|t| t == tag))
        };
        let fits = |job: &&Job| match matches.as_slice() {
            ["all"] => tags.iter().all(|tag| has(job, tag)),
            _ => tags.iter().any(|tag| has(job, tag)),
        };
        let found = self.jobs.iter().filter(fits).map(|job| {
            json!({"job_id": job.id, "created_at": "2026-11-20T10:33:31+00:00", "job_state": job.state})
        });
        Some(Answer::json(200, &found.collect()))
    }

    fn attach(&mut self, id: &str, request: &Request) -> Option<Answer> {
        let boundary = request.headers.get("content-type")?.strip_prefix("multipart/form-data; boundary=")?;
        let head = format!(
            "--{boundary}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"file\"\r\n\
             Content-Type: application/x-gzip\r\n\r\n"
        );
        let tail = format!("\r\n--{boundary}--\r\n");
        (request.body.starts_with(head.as_bytes()) && request.body.ends_with(tail.as_bytes()))
            .then_some(())?;
        let job = self.find(id)?;
        if job.waits_for_attachments {
            job.attachments = Some(request.body.clone());
            job.waits_for_attachments = false;
        } else {
            // It answers OK to attachments that it has, and 422 to those that nobody announced.
            job.attachments.as_ref()?;
        }
        Some(Answer::text(200, "OK"))
    }

    fn log(&mut self, id: &str, query: &[(String, String)]) -> Option<Answer> {
        let [(name, start)] = query else { return None };
        let start: u64 = (name == "start_fragment").then(|| start.parse().ok())??;
        let fragments = self.find(id).map(|job| job.fragments.clone()).unwrap_or_default();
        let phases: Map<_, _> = PHASES
            .iter()
            .map(|phase| {
                let found: Vec<_> = fragments.iter().filter(|f| f.0 == *phase && f.1 >= start).collect();
                let last = found.iter().map(|f| f.1 as i64).max().unwrap_or(-1);
                let text: String = found.iter().map(|f| f.2.as_str()).collect();
                ((*phase).to_owned(), json!({"last_fragment_number": last, "log_data": text}))
            })
            .collect();
        Some(Answer::json(200, &json!({"output": phases})))
    }
}

fn is_over(job: &Job) -> bool {
    matches!(job.state.as_str(), "complete" | "completed" | "cancelled")
}

pub(crate) fn is_uuid(text: &str) -> bool {
    let sizes: Vec<_> = text.split('-').map(str::len).collect();
    sizes == [8, 4, 4, 4, 12] && text.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')
}

/// What the server's schema of a job accepts, as far as these tests go.
fn checked_job(job: &Value) -> Option<&Map<String, Value>> {
    let known = "job_id parent_job_id name tags job_queue global_timeout output_timeout allocation_timeout \
        provision_data firmware_update_data test_data allocate_data reserve_data job_status_webhook \
        job_priority exclude_agents debug";
    let fields = only(job, known)?;
    fields.get("job_queue")?.as_str().filter(|queue| !queue.is_empty())?;
    let tags = fields.get("tags").map_or(Some(&[][..]), |tags| tags.as_array().map(Vec::as_slice))?;
    tags.iter().all(Value::is_string).then_some(())?;
    if let Some(test) = fields.get("test_data") {
        let test = only(test, "test_cmds attachments test_username test_password secrets")?;
        test.values().all(|value| value.is_string() || value.is_array() || value.is_object()).then_some(())?;
        test.get("test_cmds").is_none_or(Value::is_string).then_some(())?;
    }
    for (_, data) in fields.iter().filter(|(name, _)| name.ends_with("_data")) {
        for attachment in data.get("attachments").and_then(Value::as_array).into_iter().flatten() {
            only(attachment, "agent device")?.get("agent")?.as_str()?;
        }
    }
    Some(fields)
}

fn only<'a>(value: &'a Value, known: &str) -> Option<&'a Map<String, Value>> {
    value.as_object().filter(|object| object.keys().all(|key| known.split_whitespace().any(|k| k == key)))
}
