//! The demo's folder and processes, and their end: by success, by failure, by ctrl-C.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::de::DeserializeOwned;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tempfile::TempDir;

use crate::cli::failure::Failure;

/// What must be gone when the demo ends, however it ends.
struct Belongings {
    dir: Option<TempDir>,
    children: Vec<Arc<Mutex<Child>>>,
}

impl Belongings {
    fn clear(&mut self) {
        for child in self.children.drain(..) {
            let mut child = locked(&child);
            // It may have ended already, which is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
        if let Some(dir) = self.dir.take() {
            let path = dir.path().to_owned();
            if let Err(e) = dir.close() {
                eprintln!("cmbfs: cannot remove {}: {e}", path.display());
            }
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere leaves nothing half done in what these mutexes guard.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A temporary folder, and processes that end with it.
pub(super) struct Scene {
    path: PathBuf,
    belongings: Arc<Mutex<Belongings>>,
}

impl Scene {
    /// Makes a folder that has room for `bytes` bytes, and sees to it that a signal leaves nothing behind.
    pub(super) fn new(bytes: u64) -> Result<Self, Failure> {
        let dir = roomy_folder(bytes)?;
        let path = dir.path().to_owned();
        let belongings = Arc::new(Mutex::new(Belongings { dir: Some(dir), children: Vec::new() }));
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
        let on_signal = Arc::clone(&belongings);
        std::thread::spawn(move || {
            if let Some(signal) = signals.forever().next() {
                // Held for good: nobody starts another process between here and the end.
                let mut belongings = locked(&on_signal);
                belongings.clear();
                eprintln!("cmbfs: demo interrupted; nothing is left behind");
                std::process::exit(128 + signal);
            }
        });
        Ok(Self { path, belongings })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Starts this program again with other arguments: a process of its own, that ends at the latest with this one.
    pub(super) fn start<S: AsRef<std::ffi::OsStr>>(
        &self,
        name: &str,
        args: &[S],
    ) -> Result<Process, Failure> {
        let exe = std::env::current_exe()?;
        let mut command = Command::new(exe);
        // A group of its own: ctrl-C reaches only this process, which then ends the others in order.
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let mut belongings = locked(&self.belongings);
        let mut child =
            command.spawn().map_err(|e| Failure::from(e).doing(format!("cannot start the {name}")))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Failure::new(format!("the {name} has no standard input or output")));
        };
        let id = child.id();
        let child = Arc::new(Mutex::new(child));
        belongings.children.push(Arc::clone(&child));
        Ok(Process { name: name.to_owned(), id, child, input, output: BufReader::new(output) })
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        locked(&self.belongings).clear();
    }
}

/// The first of the usual temporary folders with room enough: a drive image is sparse, but fills up.
fn roomy_folder(bytes: u64) -> Result<TempDir, Failure> {
    let mut tried = Vec::new();
    for base in [std::env::temp_dir(), PathBuf::from("/var/tmp"), PathBuf::from(".")] {
        let free = match rustix::fs::statvfs(&base) {
            Ok(stat) => stat.f_bavail.saturating_mul(stat.f_frsize),
            Err(_) => continue,
        };
        if free < bytes {
            tried.push(format!("{} has {}", base.display(), crate::cli::units::Bytes(free)));
            continue;
        }
        match tempfile::Builder::new().prefix("cmbfs-demo-").tempdir_in(&base) {
            Ok(dir) => return Ok(dir),
            Err(e) => tried.push(format!("{}: {e}", base.display())),
        }
    }
    Err(Failure::new(format!(
        "no temporary folder with {} free ({})",
        crate::cli::units::Bytes(bytes),
        tried.join("; ")
    ))
    .hint("set TMPDIR to a folder with more room"))
}

/// A process of the demo. One line in, one line out.
pub(super) struct Process {
    name: String,
    id: u32,
    child: Arc<Mutex<Child>>,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Process {
    pub(super) fn id(&self) -> u32 {
        self.id
    }

    /// Tells it something.
    pub(super) fn tell(&mut self, line: &str) -> Result<(), Failure> {
        writeln!(self.input, "{line}")
            .map_err(|e| Failure::from(e).doing(format!("the {} is gone", self.name)))
    }

    /// Waits for its next line.
    pub(super) fn line(&mut self) -> Result<String, Failure> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            let status = locked(&self.child).wait()?;
            return Err(Failure::new(format!(
                "the {} (process {}) ended early: {status}",
                self.name, self.id
            )));
        }
        Ok(line.trim_end().to_owned())
    }

    /// Tells it something and reads its answer.
    pub(super) fn ask<T: DeserializeOwned>(&mut self, line: &str) -> Result<T, Failure> {
        self.tell(line)?;
        self.answer()
    }

    /// Reads an answer to what it was told before.
    pub(super) fn answer<T: DeserializeOwned>(&mut self) -> Result<T, Failure> {
        let line = self.line()?;
        serde_json::from_str(&line)
            .map_err(|e| Failure::new(format!("the {} answered {line:?}: {e}", self.name)))
    }

    /// SIGKILL, and waits until it is dead.
    pub(super) fn kill(self) -> Result<(), Failure> {
        let mut child = locked(&self.child);
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Closes its standard input and waits for it to end by itself.
    pub(super) fn finish(self) -> Result<(), Failure> {
        drop(self.input);
        let status = locked(&self.child).wait()?;
        if status.success() {
            Ok(())
        } else {
            Err(Failure::new(format!("the {} (process {}) failed: {status}", self.name, self.id)))
        }
    }
}

/// Called first in every process of the demo: it ends when the demo (process `parent`) does, even by SIGKILL.
pub(super) fn end_with_parent(parent: u32) -> Result<(), Failure> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(std::io::Error::from)?;
    // The parent may have died before the line above.
    if std::os::unix::process::parent_id() != parent {
        return Err(Failure::new("the demo that started this process has ended"));
    }
    Ok(())
}
