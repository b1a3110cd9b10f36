//! A server that says nothing: how long it is waited for, and what is known of it meanwhile.
//!
//! What counts is that it answers at all. While a request takes long it is asked for its name now and then, and every answer begins
//! the wait anew. While it waits for a disk it cannot answer and is not to blame: that does not count either.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a server may be silent where nobody says otherwise.
pub const DEFAULT_PATIENCE: Duration = Duration::from_secs(30);
/// How long it is silent before it is asked whether it lives, at most; else a quarter of the patience.
const ASK_AFTER: Duration = Duration::from_secs(2);
/// How often to look what its process does, once it is silent.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// The patience with a server that was silent for too long already: what is given back to it at the end must not take as long again.
const LITTLE_PATIENCE: Duration = Duration::from_millis(100);

/// The process that serves, as far as it can be seen from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerProcess {
    pid: Option<i32>,
}

/// What a process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    /// SIGSTOP, SIGTSTP or a debugger holds it.
    Stopped,
    /// One of its threads waits for a disk, in the kernel.
    WaitsForDisk,
    Runs,
    Sleeps,
    Unknown,
}

impl Doing {
    /// What a process does whose threads are in these states.
    fn of(threads: &[char]) -> Self {
        let any = |state: char| threads.contains(&state);
        match () {
            () if any('T') || any('t') => Self::Stopped,
            () if any('D') => Self::WaitsForDisk,
            () if any('R') => Self::Runs,
            () if any('S') || any('I') => Self::Sleeps,
            () => Self::Unknown,
        }
    }
}

impl ServerProcess {
    /// `pid`: 0 for one in another namespace.
    pub(super) fn new(pid: i32) -> Self {
        Self { pid: (pid > 0).then_some(pid) }
    }

    fn doing(self) -> Doing {
        let Some(pid) = self.pid else { return Doing::Unknown };
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Doing::Unknown };
        let states: Vec<char> = tasks
            .flatten()
            .filter_map(|task| std::fs::read_to_string(task.path().join("stat")).ok())
            .filter_map(|line| state_in(&line))
            .collect();
        Doing::of(&states)
    }

    /// Words that tell a user what it does and what to do.
    pub(super) fn advice(self) -> String {
        let Some(pid) = self.pid else { return String::new() };
        match self.doing() {
            Doing::Stopped => format!(": it is stopped; `kill -CONT {pid}` has it go on"),
            Doing::WaitsForDisk => ": it waits for a disk".to_owned(),
            Doing::Runs => ": it is busy and may be hung".to_owned(),
            Doing::Sleeps => ": it seems to be hung".to_owned(),
            Doing::Unknown => String::new(),
        }
    }
}

impl fmt::Display for ServerProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "the server (process {pid})"),
            None => write!(f, "the server"),
        }
    }
}

/// The state in a line of `/proc/PID/stat`: behind the name, which is in brackets and may hold any.
fn state_in(stat: &str) -> Option<char> {
    stat.rsplit_once(") ")?.1.chars().next()
}

/// What a connection knows of its server's silence.
#[derive(Debug)]
pub(super) struct Patience {
    limit: Duration,
    pub(super) server: ServerProcess,
    /// It was silent for too long, and has not been heard since.
    given_up: AtomicBool,
}

impl Patience {
    pub(super) fn new(limit: Duration, server: ServerProcess) -> Self {
        Self { limit, server, given_up: AtomicBool::new(false) }
    }

    /// A wait that begins now.
    pub(super) fn begin(&self) -> Silence<'_> {
        self.begin_at(Instant::now())
    }

    fn begin_at(&self, now: Instant) -> Silence<'_> {
        Silence { patience: self, heard: now, looked: now, asked: false }
    }

    fn limit(&self) -> Duration {
        match self.given_up.load(Ordering::Relaxed) {
            true => LITTLE_PATIENCE.min(self.limit),
            false => self.limit,
        }
    }
}

/// One wait for a server.
#[derive(Debug)]
pub(super) struct Silence<'a> {
    patience: &'a Patience,
    /// When it was last heard, or known to be unable to speak.
    heard: Instant,
    looked: Instant,
    asked: bool,
}

impl Silence<'_> {
    /// It has said something.
    pub(super) fn heard(&mut self) {
        self.heard_at(Instant::now());
    }

    fn heard_at(&mut self, now: Instant) {
        (self.heard, self.asked) = (now, false);
        self.patience.given_up.store(false, Ordering::Relaxed);
    }

    /// Whether it is time to ask whether it lives. True once for each silence.
    pub(super) fn is_time_to_ask(&mut self) -> bool {
        self.is_time_to_ask_at(Instant::now())
    }

    fn is_time_to_ask_at(&mut self, now: Instant) -> bool {
        let due = !self.asked
            && now.saturating_duration_since(self.heard) >= ASK_AFTER.min(self.patience.limit / 4);
        self.asked |= due;
        due
    }

    /// How long it has been silent, if that is too long.
    pub(super) fn is_over(&mut self) -> Option<Duration> {
        let server = self.patience.server;
        self.is_over_at(Instant::now(), || server.doing())
    }

    fn is_over_at(&mut self, now: Instant, doing: impl FnOnce() -> Doing) -> Option<Duration> {
        let silent = now.saturating_duration_since(self.heard);
        if silent >= LOOK_EVERY && now.saturating_duration_since(self.looked) >= LOOK_EVERY {
            self.looked = now;
            if doing() == Doing::WaitsForDisk {
                self.heard = self.looked;
                return None;
            }
        }
        if silent < self.patience.limit() {
            return None;
        }
        self.patience.given_up.store(true, Ordering::Relaxed);
        Some(silent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_is_found_behind_any_name() {
        for (line, state) in [("7 (cmbfs) T 1 7", Some('T')), ("7 (a) R (b) D 1", Some('D')), ("7", None)] {
            assert_eq!(state_in(line), state, "{line}");
        }
        let own = ServerProcess::new(std::process::id().cast_signed());
        assert_eq!(own.doing(), Doing::Runs);
        assert_eq!(ServerProcess::new(0).doing(), Doing::Unknown);
        assert_eq!(ServerProcess::new(0).advice(), "");
    }

    #[test]
    fn a_server_that_waits_for_a_disk_is_waited_for_and_one_that_does_not_is_given_up() {
        assert_eq!(Doing::of(&['S', 'D', 'R']), Doing::WaitsForDisk);
        assert_eq!(Doing::of(&['T', 'D']), Doing::Stopped);
        let patience = Patience::new(Duration::from_millis(300), ServerProcess::new(0));
        let mut now = Instant::now();
        let mut silence = patience.begin_at(now);
        for _ in 0..4 {
            now += LOOK_EVERY + Duration::from_millis(1);
            assert_eq!(silence.is_over_at(now, || Doing::WaitsForDisk), None);
        }
        now += Duration::from_millis(300);
        assert!(silence.is_over_at(now, || Doing::Runs).is_some());
    }

    #[test]
    fn silence_ends_with_a_word_and_patience_only_comes_back_with_one() {
        let patience = Patience::new(Duration::from_millis(800), ServerProcess::new(0));
        let mut now = Instant::now();
        let mut silence = patience.begin_at(now);
        let is_over = |silence: &mut Silence<'_>, now| silence.is_over_at(now, || Doing::Runs).is_some();
        assert!(!is_over(&mut silence, now) && !silence.is_time_to_ask_at(now));
        now += Duration::from_millis(250);
        assert!(silence.is_time_to_ask_at(now) && !silence.is_time_to_ask_at(now), "once");
        now += Duration::from_millis(400);
        silence.heard_at(now);
        now += Duration::from_millis(300);
        assert!(!is_over(&mut silence, now), "it was heard");
        now += Duration::from_millis(550);
        assert!(is_over(&mut silence, now));
        // The next wait is a short one, until it is heard again.
        let mut next = patience.begin_at(now);
        now += LITTLE_PATIENCE;
        assert!(is_over(&mut next, now));
        next.heard_at(now);
        now += LITTLE_PATIENCE;
        assert!(!is_over(&mut next, now));
    }
}
