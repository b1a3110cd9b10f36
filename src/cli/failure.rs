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
    /// Whoever read our output has gone: no reason to complain, and not done. As a shell has it of a program that SIGPIPE ended.
    Quiet = 141,
}

/// An operation ended early.
#[derive(Debug)]
pub(crate) struct Failure {
    exit: Exit,
    message: String,
    hint: Option<String>,
    /// The system's answer and no word of what was being done. Only printing is left without one.
    is_bare: bool,
}

impl Failure {
    pub(crate) fn new(message: impl fmt::Display) -> Self {
        Self { exit: Exit::Failed, message: message.to_string(), hint: None, is_bare: false }
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
        let what = what.to_string();
        self.is_bare = false;
        // Many errors name what they happened to by themselves.
        if !self.message.starts_with(&what) {
            self.message = format!("{what}: {}", self.message);
        }
        self
    }

    /// Has the message speak of `path` where it speaks of an inode, or of a name that is empty.
    pub(crate) fn naming(mut self, path: &str) -> Self {
        let named = format!("\"{path}\"");
        let mut text = String::new();
        let mut rest = self.message.as_str();
        while let Some((before, after)) = rest.split_once("inode ") {
            let number = after.bytes().take_while(u8::is_ascii_digit).count();
            let after = &after[number..];
            // The inode is one on the way then.
            let part = if after.starts_with(" is not a directory") { "a part of " } else { "" };
            text += before;
            text += &if number > 0 { format!("{part}{named}") } else { "inode ".to_owned() };
            rest = after;
        }
        text += rest;
        let text = text.replace("\"\"", &named);
        let twice = text.strip_prefix(&format!("{named}: ")).filter(|rest| rest.contains(&named));
        self.message = twice.map_or(text.clone(), str::to_owned);
        self
    }

    /// The same, and names it in front where the message does not.
    pub(crate) fn about(self, path: &str) -> Self {
        let failure = self.naming(path);
        if failure.message.contains(path) { failure } else { failure.doing(path) }
    }

    /// Says it on standard error, and gives the exit status.
    pub(crate) fn report(&self) -> ExitCode {
        if self.exit != Exit::Quiet {
            let what = if self.is_bare { "cannot write to standard output: " } else { "" };
            eprintln!("cmbfs: {what}{}", one_line(&self.message));
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
        let failure = Self { is_bare: any.is::<io::Error>(), ..Self::new(chain(any)) };
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
    fn paths_are_named_and_not_inodes() {
        for (message, path, expected) in [
            ("inode 3 is a directory", "/d", "\"/d\" is a directory"),
            ("\"/f/x\": inode 2 is not a directory", "/f/x", "a part of \"/f/x\" is not a directory"),
            ("reading 7 bytes at 0 of inode 12: gone", "/f", "reading 7 bytes at 0 of \"/f\": gone"),
            ("\"\" exists already", "/", "\"/\" exists already"),
            ("\"d\" exists already", "/a/d", "/a/d: \"d\" exists already"),
            ("\"/none\" does not exist", "/none", "\"/none\" does not exist"),
            ("bad inode bitmap", "/f", "/f: bad inode bitmap"),
        ] {
            assert_eq!(Failure::new(message).about(path).message, expected);
        }
    }

    #[test]
    fn messages_stay_on_one_line() {
        assert_eq!(one_line("a\nb\u{1b}[2J"), "a\u{fffd}b\u{fffd}[2J");
    }
}
