//! A real OpenSSH server for tests: `sshd -i` behind a loopback listener of ours, which has a port
//! of the kernel's choice without a race.

use shakedown::connection::ssh::Target;
use shakedown::connection::{KeyPair, Ssh};
use shakedown::deadline::Deadline;
use shakedown::process::{self, Child};
use std::fs::{self, File};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

const SSHD: &str = "/usr/sbin/sshd";

/// More than enough for anything that works.
pub(crate) fn ample() -> Deadline {
    Deadline::after(Duration::from_secs(60), "test")
}

pub(crate) struct Sshd {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) key: KeyPair,
    pub(crate) addr: SocketAddr,
    shared: Arc<Shared>,
    listener: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    accepted: AtomicUsize,
    /// So many connections are accepted and left alone before any is served.
    silent: AtomicUsize,
    ignored: Mutex<Vec<TcpStream>>,
    servers: Mutex<Vec<Child>>,
}

impl Sshd {
    pub(crate) fn start() -> Self {
        Self::with("", 0)
    }

    /// With more lines for `sshd_config`, and leaving the first `silent` connections alone.
    pub(crate) fn with(config: &str, silent: usize) -> Self {
        assert!(
            Path::new(SSHD).exists(),
            "no {SSHD}: apt-get install -y --no-install-recommends openssh-server"
        );
        if rustix::process::geteuid().is_root() {
            // sshd as root insists on it; the system service makes it at its start.
            fs::create_dir_all("/run/sshd").expect("/run/sshd can be made by root");
        }
        let dir = tempfile::tempdir().expect("temp dir");
        let key = KeyPair::load_or_create(&dir.path().join("client")).expect("a key");
        KeyPair::load_or_create(&dir.path().join("host")).expect("a host key");
        let path = dir.path().display();
        // SHLVL keeps bash from the developer's own ~/.bashrc, which can be slow.
        let config = format!(
            "HostKey {path}/host/id_ed25519\nAuthorizedKeysFile {path}/authorized_keys\nStrictModes no\n\
             UsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\nPidFile none\n\
             SetEnv SHLVL=1\n{config}"
        );
        fs::write(dir.path().join("config"), config).expect("written");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let addr = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared { silent: AtomicUsize::new(silent), ..Shared::default() });
        let thread = std::thread::spawn({
            let (shared, dir) = (Arc::clone(&shared), dir.path().to_owned());
            move || serve(&listener, &shared, &dir)
        });
        let server = Self { dir, key, addr, shared, listener: Some(thread) };
        server.authorize();
        server
    }

    pub(crate) fn authorize(&self) {
        fs::write(self.authorized_keys(), self.key.public_line()).expect("written");
    }

    pub(crate) fn authorized_keys(&self) -> PathBuf {
        self.dir.path().join("authorized_keys")
    }

    pub(crate) fn target(&self) -> Target {
        Target::new(self.addr, user(), self.key.clone())
    }

    pub(crate) fn open(&self) -> Ssh {
        Ssh::open(self.target(), &ample()).unwrap_or_else(|error| {
            let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            panic!("{:#}\nsshd says:\n{log}", anyhow::Error::from(error))
        })
    }

    /// How many connections came so far.
    pub(crate) fn accepted(&self) -> usize {
        self.shared.accepted.load(Ordering::SeqCst)
    }

    /// [`Sshd::accepted`], for who cannot borrow.
    pub(crate) fn counter(&self) -> impl Fn() -> usize + Send + Sync + 'static {
        let shared = Arc::clone(&self.shared);
        move || shared.accepted.load(Ordering::SeqCst)
    }

    /// Kills the servers of all connections.
    pub(crate) fn kill(&self) {
        self.shared.servers.lock().expect("not poisoned").clear();
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        // Wakes the listener.
        let _ = TcpStream::connect(self.addr);
        if let Some(thread) = self.listener.take() {
            let _ = thread.join();
        }
    }
}

fn serve(listener: &TcpListener, shared: &Shared, dir: &Path) {
    for socket in listener.incoming() {
        let socket = socket.expect("accepts");
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        if shared.accepted.fetch_add(1, Ordering::SeqCst) < shared.silent.load(Ordering::SeqCst) {
            shared.ignored.lock().expect("not poisoned").push(socket);
            continue;
        }
        let log = File::options().create(true).append(true).open(dir.join("log")).expect("a log");
        let mut command = Command::new(SSHD);
        command.arg("-i").arg("-e").arg("-f").arg(dir.join("config"));
        let other = socket.try_clone().expect("cloned");
        command.stdin(OwnedFd::from(socket)).stdout(OwnedFd::from(other)).stderr(log);
        let child = process::spawn(command).expect("sshd starts");
        shared.servers.lock().expect("not poisoned").push(child);
    }
}

pub(crate) fn user() -> String {
    let out = Command::new("id").arg("-un").output().expect("id runs");
    String::from_utf8(out.stdout).expect("a name").trim().to_owned()
}

/// A listener that does `act` with each connection, in a thread that ends with the test process.
pub(crate) fn listener(mut act: impl FnMut(TcpStream) + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let addr = listener.local_addr().expect("an address");
    std::thread::spawn(move || listener.incoming().flatten().for_each(&mut act));
    addr
}

/// A port that passes the server's bytes on one by one.
pub(crate) fn trickle(to: SocketAddr) -> SocketAddr {
    use std::io::{Read, Write};
    listener(move |client| {
        client.set_nodelay(true).expect("set");
        let server = TcpStream::connect(to).expect("connects");
        let (mut up, mut into) = (client.try_clone().expect("cloned"), server.try_clone().expect("cloned"));
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut up, &mut into);
            let _ = into.shutdown(Shutdown::Write);
        });
        let mut client = client;
        std::thread::spawn(move || {
            for byte in std::io::BufReader::new(server).bytes().map_while(Result::ok) {
                if client.write_all(&[byte]).is_err() {
                    break;
                }
            }
            let _ = client.shutdown(Shutdown::Both);
        });
    })
}
