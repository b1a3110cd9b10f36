//! The files of a place: of a device that this process opened, or of a server.
//!
//! * `direct`: a filesystem mounted here
//! * `across`: from one of those to another
//! * `served`: a client of a server
//! * `leftover`: the names under which files are written, and what killed writers left of them
pub(crate) mod across;
mod direct;
pub(crate) mod leftover;
mod served;

use std::fmt::Display;
use std::io::{Read, Write};
use std::time::{Duration, UNIX_EPOCH};

use serde::Serialize;

use super::failure::{Failure, one_line};
use super::place::Place;
use cmbfs::{PlacedBy, Placement};

/// What is known of one file or directory.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) kind: &'static str,
    pub(crate) inode: u64,
    pub(crate) size: u64,
    /// Bytes of blocks behind it.
    pub(crate) allocated: u64,
    /// Permission bits.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) links: u32,
    pub(crate) modified_ns: u64,
    pub(crate) changed_ns: u64,
    /// Where its windows may live; on a device, in a server that leaves it to the files.
    pub(crate) placement: Placement,
    /// Who says so.
    pub(crate) placed_by: PlacedBy,
}

impl Entry {
    pub(crate) fn is_directory(&self) -> bool {
        self.kind == "directory"
    }
}

/// What both kinds of place can do.
trait Files {
    fn stat(&mut self, path: &str) -> Result<Entry, Failure>;
    fn list(&mut self, path: &str) -> Result<Vec<Entry>, Failure>;
    /// Only the names of what `list` gives.
    fn names(&mut self, path: &str) -> Result<Vec<String>, Failure>;
    fn read(&mut self, path: &str, sink: &mut dyn FnMut(&[u8]) -> Result<(), Failure>)
    -> Result<(), Failure>;
    /// Makes `temporary`, fills it, and gives it the name `path` once everything is durable.
    fn write(&mut self, job: &mut WriteJob<'_>) -> Result<(), Failure>;
    fn unlink(&mut self, path: &str) -> Result<(), Failure>;
    fn rmdir(&mut self, path: &str) -> Result<(), Failure>;
    fn mkdir(&mut self, path: &str) -> Result<(), Failure>;
    fn rename(&mut self, from: &str, to: &str) -> Result<(), Failure>;
    /// Durable when it returns. `None`: no choice.
    fn place(&mut self, path: &str, wanted: Option<Placement>) -> Result<(), Failure>;
    /// Makes changes of names durable.
    fn sync(&mut self) -> Result<(), Failure>;
    fn close(self: Box<Self>) -> Result<(), Failure>;
}

/// One file to be written.
struct WriteJob<'a> {
    path: &'a str,
    temporary: String,
    mode: u32,
    from: &'a mut dyn Read,
    progress: &'a mut dyn FnMut(u64),
}

impl WriteJob<'_> {
    /// Reads the next piece into `buffer`, full unless the input ends.
    fn piece<'b>(&mut self, buffer: &'b mut [u8]) -> Result<&'b [u8], Failure> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.from.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Failure::from(e).doing("reading the local file")),
            }
        }
        Ok(&buffer[..filled])
    }
}

/// How much is copied at a time.
const PIECE: usize = 4 << 20;

/// The files of a place.
pub(crate) struct Store(Box<dyn Files>);

impl Store {
    pub(crate) fn open(place: &Place) -> Result<Self, Failure> {
        Ok(Self(match place {
            Place::Device(url) => Box::new(direct::Direct::open(url)?),
            Place::Server(server) => Box::new(served::Served::connect(server)?),
        }))
    }

    pub(crate) fn stat(&mut self, path: &str) -> Result<Entry, Failure> {
        self.0.stat(path).map_err(|f| f.about(path))
    }

    pub(crate) fn list(&mut self, path: &str) -> Result<Vec<Entry>, Failure> {
        self.0.list(path).map_err(|f| f.about(path))
    }

    /// Hands the file's bytes to `sink`, in order, in pieces.
    pub(crate) fn read_file(
        &mut self,
        path: &str,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        // What goes wrong in the sink is not about this path.
        let mut elsewhere = None;
        let read = self.0.read(path, &mut |bytes| {
            sink(bytes).map_err(|f| {
                elsewhere = Some(f);
                Failure::new("the bytes found no taker")
            })
        });
        match elsewhere {
            Some(f) => Err(f),
            None => read.map_err(|f| f.about(path)),
        }
    }

    /// Where a file called `name` goes that is to be written to `path`: into it, if that is a directory.
    pub(crate) fn destination(&mut self, path: &str, name: Option<&str>) -> Result<String, Failure> {
        destination(self.0.as_mut(), path, name)
    }

    /// Makes `path` hold what `from` gives. Until all of it is durable `path` is what it was before.
    pub(crate) fn write_file(
        &mut self,
        path: &str,
        mode: u32,
        from: &mut dyn Read,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), Failure> {
        no_directory(self.0.as_mut(), path)?;
        leftover::remove(self.0.as_mut(), path);
        let mut job = WriteJob { path, temporary: leftover::temporary_name(path), mode, from, progress };
        let result = self.0.write(&mut job).map_err(|f| f.naming(path));
        if result.is_err() {
            // Whatever stopped the copy may stop this too; what counts is said already.
            let _ = self.0.unlink(&job.temporary).and_then(|()| self.0.sync());
        }
        result
    }

    /// Removes a file or an empty directory, durably, as all that follows.
    pub(crate) fn remove(&mut self, path: &str) -> Result<(), Failure> {
        if path.split('/').all(|part| matches!(part, "" | "." | "..")) {
            return Err(Failure::new(format!("{path} cannot be removed")));
        }
        let removed = match self.stat(path)?.is_directory() {
            true => self.0.rmdir(path),
            false => self.0.unlink(path),
        };
        removed.and_then(|()| self.0.sync()).map_err(|f| f.about(path))
    }

    pub(crate) fn mkdir(&mut self, path: &str) -> Result<(), Failure> {
        self.0.mkdir(path).and_then(|()| self.0.sync()).map_err(|f| f.about(path))
    }

    /// Renames, into `to` if that is a directory. Says the new path.
    pub(crate) fn rename(&mut self, from: &str, to: &str) -> Result<String, Failure> {
        let cannot = |f: Failure, to: &str| f.naming(to).doing(format!("cannot rename {from} to {to}"));
        let name = last_part(from.trim_end_matches('/')).ok();
        // A directory may be given a new name with a slash behind it.
        let new = match self.0.stat(from).is_ok_and(|e| e.is_directory()) {
            true if self.0.stat(to).is_err() => Ok(to.trim_end_matches('/').to_owned()),
            _ => self.destination(to, name),
        };
        let to = new.map_err(|f| cannot(f, to))?;
        let renamed = self.0.rename(from, &to).and_then(|()| self.0.sync());
        renamed.map_err(|f| cannot(f, &to)).map(|()| to)
    }

    /// Keeps where a file's windows may live with it, or with the filesystem (`/`).
    pub(crate) fn place(&mut self, path: &str, wanted: Option<Placement>) -> Result<(), Failure> {
        self.0.place(path, wanted)
    }

    /// Ends cleanly: everything is durable afterwards.
    pub(crate) fn close(self) -> Result<(), Failure> {
        self.0.close()
    }
}

/// Where what is called `name` goes when it is told to go to `path`, as `cp` and `mv` have it: into a directory under its own name, else to
/// `path` itself.
fn destination(files: &mut dyn Files, path: &str, name: Option<&str>) -> Result<String, Failure> {
    let there = files.stat(path);
    let is_directory = there.as_ref().is_ok_and(Entry::is_directory);
    match name {
        Some(name) if is_directory => Ok(format!("{}/{name}", path.trim_end_matches('/'))),
        None if is_directory => Err(Failure::new(format!("{path} is a directory"))
            .hint("give the whole path, with the name that the file is to have")),
        _ if path.ends_with('/') && there.is_ok() => Err(Failure::new(format!("{path} is not a directory"))),
        _ if path.ends_with('/') => {
            Err(Failure::new(format!("there is no directory {path}")).hint("make it with cmbfs mkdir"))
        }
        _ => Ok(path.to_owned()),
    }
}

/// Refuses a path that a directory has.
fn no_directory(files: &mut dyn Files, path: &str) -> Result<(), Failure> {
    if files.stat(path).is_ok_and(|e| e.is_directory()) {
        return Err(Failure::new(format!("{path} is a directory"))
            .hint("no file replaces a directory: give the whole path, with another name"));
    }
    Ok(())
}

/// The name at the end of a path of a filesystem of ours.
pub(crate) fn last_part(path: &str) -> Result<&str, Failure> {
    match path.rsplit('/').next() {
        Some(name) if !matches!(name, "" | "." | "..") => Ok(name),
        _ => Err(Failure::new(format!("{path} names no file"))),
    }
}

/// Says on standard output under which name something went into a directory that it was told to go to.
pub(crate) fn say_where(from: impl Display, told: impl Display, went: impl Display) -> std::io::Result<()> {
    let went = went.to_string();
    if told.to_string() == went {
        return Ok(());
    }
    let line = format!("{from} -> {went}");
    writeln!(std::io::stdout(), "{}", one_line(&line))
}

/// `drwxr-xr-x` and the like.
pub(crate) fn mode_text(entry: &Entry) -> String {
    let mut text = String::from(if entry.is_directory() { "d" } else { "-" });
    for shift in [6, 3, 0] {
        let bits = entry.mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(if bits & 1 != 0 { 'x' } else { '-' });
    }
    text
}

/// Nanoseconds since the epoch as a date and time, UTC.
pub(crate) fn time_text(ns: u64) -> String {
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_nanos(ns)).to_string()
}
