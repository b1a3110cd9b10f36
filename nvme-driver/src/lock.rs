//! One process at a time on an image: `flock`, and a refusal that names the holder.

use std::fs::File;
use std::io;
use std::os::linux::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

/// The image could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else has it.
    #[error("{} is in use by {holder}", path.display())]
    Held {
        /// The image.
        path: PathBuf,
        /// Who: "process 123 (cmbfs)" where that can be found out.
        holder: String,
    },
    /// The system refused.
    #[error("cannot lock {}: {source}", path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// An exclusive lock on an open image or block device, held until dropped (or until the process ends, however).
#[derive(Debug)]
pub struct ImageLock {
    _file: File,
}

impl ImageLock {
    /// Locks `file`, which was opened at `path`.
    pub fn take(file: File, path: &Path) -> Result<Self, LockError> {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { _file: file }),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                Err(LockError::Held { path: path.to_owned(), holder: holder(&file) })
            }
            Err(e) => Err(LockError::Io { path: path.to_owned(), source: e.into() }),
        }
    }
}

/// Who holds the lock on `file`, from `/proc/locks`, in words.
fn holder(file: &File) -> String {
    let unknown = || "another process".to_owned();
    let (Ok(meta), Ok(locks)) = (file.metadata(), std::fs::read_to_string("/proc/locks")) else {
        return unknown();
    };
    let dev = meta.st_dev();
    let device = (rustix::fs::major(dev), rustix::fs::minor(dev));
    match find_holder(&locks, device, meta.st_ino()) {
        Some(pid) if pid == std::process::id() => "this process".to_owned(),
        Some(pid) => match std::fs::read_to_string(format!("/proc/{pid}/comm")) {
            Ok(comm) => format!("process {pid} ({})", comm.trim_end()),
            Err(_) => format!("process {pid}"),
        },
        // The holder lives in another PID namespace, or has just gone.
        None => unknown(),
    }
}

/// The process in `/proc/locks` that holds a flock on that inode. Some filesystems report another device number to
/// `stat` than they have there (overlayfs, btrfs), so a line that only agrees on the inode is second choice.
fn find_holder(locks: &str, device: (u32, u32), inode: u64) -> Option<u32> {
    let mut second = None;
    for line in locks.lines() {
        // "1: FLOCK  ADVISORY  WRITE 1234 fd:01:5678 0 EOF"; a waiter has "->" in second place.
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, "FLOCK", _, _, pid, place, ..] = fields[..] else { continue };
        let mut parts = place.split(':');
        let major = parts.next().and_then(|s| u32::from_str_radix(s, 16).ok());
        let minor = parts.next().and_then(|s| u32::from_str_radix(s, 16).ok());
        let ino = parts.next().and_then(|s| s.parse::<u64>().ok());
        let Some(pid) = pid.parse::<u32>().ok().filter(|&pid| pid > 0) else { continue };
        if ino == Some(inode) {
            if (major, minor) == (Some(device.0), Some(device.1)) {
                return Some(pid);
            }
            second = Some(pid);
        }
    }
    second
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_holder_and_not_the_waiters() {
        let locks = "1: POSIX  ADVISORY  WRITE 7 fd:01:42 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 11 fd:02:42 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 12 fd:01:42 0 EOF\n\
                     3: -> FLOCK  ADVISORY  WRITE 13 fd:01:42 0 EOF\n\
                     garbage\n";
        assert_eq!(find_holder(locks, (0xfd, 1), 42), Some(12));
        assert_eq!(find_holder(locks, (8, 1), 42), Some(12));
        assert_eq!(find_holder(locks, (0xfd, 1), 43), None);
    }

    #[test]
    fn a_second_lock_is_refused_and_names_this_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, b"x").unwrap();
        let first = ImageLock::take(File::open(&path).unwrap(), &path).unwrap();
        let text = ImageLock::take(File::open(&path).unwrap(), &path).unwrap_err().to_string();
        assert!(text.contains("this process") || text.contains("another process"), "{text}");
        drop(first);
        ImageLock::take(File::open(&path).unwrap(), &path).unwrap();
    }
}
