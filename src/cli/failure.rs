//! What the command says when something went wrong: one line that names what failed, one that says what to do.

use std::error::Error;
use std::fmt;
use std::io;
use std::process::ExitCode;

/// The exit statuses, also listed in `cmbfs --help`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// The operation failed.
    Failed = 1,
    /// The arguments make no sense.
    Usage = 2,
    /// The check or the demo found a difference.
    Damaged = 3,
    /// Whoever read our output has gone: nothing left to say, and no reason to complain.
    Quiet = 0,
}

/// An operation ended early.
#[derive(Debug)]
pub(crate) struct Failure {
    exit: Exit,
    message: String,
    hint: Option<String>,
}

impl Failure {
    pub(crate) fn new(message: impl fmt::Display) -> Self {
        Self { exit: Exit::Failed, message: message.to_string(), hint: None }
    }

    /// Wrong arguments.
    pub(crate) fn usage(message: impl fmt::Display) -> Self {
        Self { exit: Exit::Usage, ..Self::new(message) }
    }

    /// Something was checked and is not what it should be.
    pub(crate) fn damaged(message: impl fmt::Display) -> Self {
        Self { exit: Exit::Damaged, ..Self::new(message) }
    }

    /// Adds what to do about it.
    pub(crate) fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.hint = Some(hint.to_string());
        self
    }

    /// Puts what was being done before the message.
    pub(crate) fn doing(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }

    /// Says it on standard error, and gives the exit status.
    pub(crate) fn report(&self) -> ExitCode {
        if self.exit != Exit::Quiet {
            eprintln!("cmbfs: {}", one_line(&self.message));
            if let Some(hint) = &self.hint {
                eprintln!("  hint: {}", one_line(hint));
            }
        }
        ExitCode::from(self.exit as u8)
    }
}

/// File names and messages from elsewhere may hold line breaks and escape sequences: a terminal gets neither.
pub(crate) fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// An error and what caused it, each part once: many errors already name their source in their own text.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

impl<E: Error + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        let any: &(dyn Error + 'static) = &error;
        if any.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) {
            return Self { exit: Exit::Quiet, ..Self::new("nobody reads the output") };
        }
        let failure = Self::new(chain(any));
        match super::hints::hint_for(any) {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer: {source}")]
    struct Outer {
        source: io::Error,
    }

    #[test]
    fn a_cause_is_named_once() {
        let outer = Outer { source: io::Error::other("no luck") };
        assert_eq!(Failure::from(outer).message, "outer: no luck");
    }

    #[test]
    fn a_broken_pipe_is_not_complained_about() {
        assert_eq!(Failure::from(io::Error::from(io::ErrorKind::BrokenPipe)).exit, Exit::Quiet);
    }

    #[test]
    fn messages_stay_on_one_line() {
        assert_eq!(one_line("a\nb\u{1b}[2J"), "a\u{fffd}b\u{fffd}[2J");
    }
}
