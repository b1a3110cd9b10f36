//! What the whole-stack tests share: a scratch folder, the command, servers that end with their test.
//!
//! The tests themselves are `tests/*.rs`, integration tests of the root package, because they run its command.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test harness: a step that fails is a test that fails"
)]

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use tempfile::TempDir;

/// A scratch folder in which the command runs. Everything in it goes when the value does.
pub struct Lab {
    command: PathBuf,
    dir: TempDir,
}

/// What a run of the command gave.
#[derive(Debug)]
pub struct Done {
    /// The exit status; `None` after a signal.
    pub code: Option<i32>,
    /// Standard output, as bytes: `cat` prints files.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: String,
}

impl Done {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    fn from(out: Output) -> Self {
        let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
        Self { code: out.status.code(), stdout: out.stdout, stderr }
    }
}

impl Lab {
    /// A fresh folder; `command` is `env!("CARGO_BIN_EXE_cmbfs")`.
    pub fn new(command: &str) -> Self {
        Self { command: PathBuf::from(command), dir: tempfile::tempdir().unwrap() }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file in the folder.
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// The command with arguments, ready to start in the folder: no standard input, output captured.
    pub fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(&self.command);
        command.args(args).current_dir(self.dir.path()).env_remove("CMBFS_LOG");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs the command to its end.
    pub fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Done {
        Done::from(self.command(args).output().unwrap())
    }

    /// Runs the command, which must succeed; gives its standard output.
    pub fn ok<S: AsRef<OsStr>>(&self, args: &[S]) -> Vec<u8> {
        let done = self.run(args);
        let shown: Vec<_> = args.iter().map(|a| a.as_ref().to_string_lossy()).collect();
        assert_eq!(done.code, Some(0), "cmbfs {shown:?}\n{}{}", done.text(), done.stderr);
        done.stdout
    }

    /// Runs the command, which must fail with exit status `code`, say so in readable lines, and not panic.
    pub fn fails<S: AsRef<OsStr>>(&self, code: i32, args: &[S]) -> Done {
        let done = self.run(args);
        let shown: Vec<_> = args.iter().map(|a| a.as_ref().to_string_lossy()).collect();
        assert_eq!(done.code, Some(code), "cmbfs {shown:?}\n{}{}", done.text(), done.stderr);
        assert!(!done.stderr.trim().is_empty(), "cmbfs {shown:?} failed without a word");
        assert!(!done.stderr.contains("panicked"), "cmbfs {shown:?} panicked:\n{}", done.stderr);
        done
    }

    /// Starts `cmbfs serve DEVICE --socket SOCK OPTIONS...` and waits until it says that it serves.
    pub fn serve(&self, device: &str, socket: &str, options: &[&str]) -> Server {
        let mut args = vec!["serve", device, "--socket", socket];
        args.extend_from_slice(options);
        self.start(&args)
    }

    /// Starts `cmbfs emulate IMAGE --socket SOCK` and waits until it says that it serves.
    pub fn emulate(&self, image: &str, socket: &str) -> Server {
        self.start(&["emulate", image, "--socket", socket])
    }

    fn start(&self, args: &[&str]) -> Server {
        Server::start(self.command(args).stderr(Stdio::inherit()))
    }
}

/// A server process; killed when the value goes.
pub struct Server {
    child: Child,
    _output: BufReader<ChildStdout>,
}

impl Server {
    /// Starts a command that a lab has made, and waits until it says that it serves.
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        if !line.starts_with("serving") {
            let _ = child.kill();
            panic!("{command:?} said {line:?} and not that it is serving");
        }
        Self { child, _output: output }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks it to end (SIGTERM), and gives its exit status.
    pub fn stop(mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.child.wait().unwrap().code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Already ended is fine: this is the way out.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `len` bytes that depend on `seed` and are different from page to page.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    Xoshiro256PlusPlus::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// A random number generator for a test, and its seed: `CMBFS_SEED` or a fixed one. Print the seed when the test fails.
pub fn seeded(fixed: u64) -> (u64, Xoshiro256PlusPlus) {
    let seed = std::env::var("CMBFS_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(fixed);
    (seed, Xoshiro256PlusPlus::seed_from_u64(seed))
}

/// Notes for the summary of `tests/run` that the test `name` did not run, and why.
pub fn skip(name: &str, why: &str) {
    println!("skipped: {name}: {why}");
    if let Some(file) = std::env::var_os("CMBFS_SKIPS") {
        let mut file = fs::OpenOptions::new().create(true).append(true).open(file).unwrap();
        writeln!(file, "{name}: {why}").unwrap();
    }
}
