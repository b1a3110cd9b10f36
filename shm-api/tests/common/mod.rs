//! A server on an emulated drive, in a thread of this process or in a process of its own.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use extent_fs::{Filesystem, FormatOptions, MountOptions, NewInode};
use nvme_driver::disk::Disk;
use shm_api::client::Client;
use shm_api::server::{Server, ServerOptions, StopHandle};

/// A server in a thread. Stopped when dropped.
pub struct Serving {
    pub socket: PathBuf,
    stop: StopHandle,
    thread: Option<std::thread::JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

/// What to serve, as the helper processes get it on their command line.
#[derive(Clone, Copy)]
pub struct Setup<'a> {
    pub url: &'a str,
    pub window: usize,
    pub grace_ms: u64,
    /// How long a layout's holder may leave a recall unanswered.
    pub lease_grace_ms: u64,
}

pub const SMALL: Setup<'static> =
    Setup { url: "emu:ram?size=64M&cmb=4M", window: 64 * 1024, grace_ms: 20, lease_grace_ms: 20_000 };

/// With this process's user and group as its own: a server lets no ordinary user change what is root's, not even the one it runs as.
pub fn own(new: NewInode) -> NewInode {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    NewInode { uid, gid, ..new }
}

/// Makes an empty filesystem in which this process's user may make files.
pub fn format(disk: &mut Box<dyn Disk>, options: FormatOptions) {
    let root = Some(own(NewInode::directory()));
    extent_fs::format(disk, &FormatOptions { root, ..options }).unwrap();
}

/// Opens the device and mounts it, formatting it first if it is empty.
pub fn filesystem(url: &str) -> Filesystem<Box<dyn Disk>> {
    mounted(Setup { url, ..SMALL })
}

fn mounted(setup: Setup<'_>) -> Filesystem<Box<dyn Disk>> {
    let url = setup.url;
    let device = nvme_driver::open(&url.parse().unwrap(), &nvme_driver::OpenOptions::default()).unwrap();
    let mut disk = device.disk().unwrap();
    if !extent_fs::probe(&mut disk).unwrap() {
        format(&mut disk, FormatOptions::default());
    }
    // The controller must outlive its disks; the process ends with it.
    std::mem::forget(device);
    let lease_grace = setup.lease_grace_ms * 1_000_000;
    Filesystem::mount(disk, MountOptions { lease_grace, ..Default::default() }).unwrap()
}

pub fn options(socket: &Path, setup: Setup<'_>) -> ServerOptions {
    ServerOptions {
        window_size: setup.window,
        grace: Duration::from_millis(setup.grace_ms),
        ..ServerOptions::new(socket)
    }
}

impl Serving {
    pub fn start(setup: Setup<'_>) -> Self {
        Self::start_with(setup, |options| options)
    }

    pub fn start_with(setup: Setup<'_>, change: impl FnOnce(ServerOptions) -> ServerOptions) -> Self {
        Self::with(mounted(setup), |socket| change(options(socket, setup)))
    }

    /// Serves a filesystem that the test has made.
    pub fn over(filesystem: Filesystem<Box<dyn Disk>>, setup: Setup<'_>) -> Self {
        Self::with(filesystem, |socket| options(socket, setup))
    }

    /// Serves it with the test's own options.
    pub fn with(filesystem: Filesystem<Box<dyn Disk>>, options: impl FnOnce(&Path) -> ServerOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let server = Server::new(filesystem, options(&socket)).unwrap();
        let stop = server.stop_handle();
        let thread = std::thread::spawn(move || server.run().unwrap());
        Self { socket, stop, thread: Some(thread), _dir: dir }
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.socket).unwrap()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the server panicked");
        }
    }
}

/// A process started by [`spawn`]. Killed when dropped.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs this test binary again, in the role that `ROLE` names: see [`role`].
pub fn spawn(role: &str, args: &[&str]) -> Process {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "helper_process", "--nocapture", "--test-threads=1"])
        .env("CMBFS_TEST_ROLE", role)
        .env("CMBFS_TEST_ARGS", args.join("\n"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    Process(child)
}

/// The role and arguments of a helper process; `None` in the test itself.
pub fn role() -> Option<(String, Vec<String>)> {
    let role = std::env::var("CMBFS_TEST_ROLE").ok()?;
    let args = std::env::var("CMBFS_TEST_ARGS").unwrap_or_default();
    Some((role, args.lines().map(str::to_owned).collect()))
}

/// What a helper process does with its arguments.
pub type Part = fn(&[String]);

/// In a helper process: plays its role, and ends. In the test itself: nothing.
pub fn play(roles: &[(&str, Part)]) {
    let Some((role, args)) = role() else { return };
    let Some((_, part)) = roles.iter().find(|(name, _)| *name == role) else { panic!("no role {role}") };
    part(&args);
    std::io::stdout().flush().unwrap();
    std::process::exit(0);
}

/// A number from the environment.
pub fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|s| s.parse().ok())
}

/// A seed of its own for each run.
pub fn seed_from_clock() -> u64 {
    u64::from(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos())
}

/// Waits until something is so; fails after half a minute.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < Duration::from_secs(30), "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Connects as soon as the server listens.
pub fn connect(socket: &Path) -> Client {
    let mut client = None;
    until("the server answers", || {
        client = Client::connect(socket).ok();
        client.is_some()
    });
    client.unwrap()
}

/// Notes for `tests/run` that a test cannot run on this machine.
pub fn skip(test: &str, why: &str) {
    eprintln!("{test} skipped: {why}");
    if let Some(path) = std::env::var_os("CMBFS_SKIPS")
        && let Ok(mut file) = std::fs::OpenOptions::new().append(true).open(path)
    {
        use std::io::Write;
        let _ = writeln!(file, "shm-api {test}: {why}");
    }
}
