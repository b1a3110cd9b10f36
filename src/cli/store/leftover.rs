//! The name under which a file is written until it is whole, and what killed writers left under such names.

use std::fmt;
use std::os::unix::fs::MetadataExt;

use cmbfs::extent_fs::ROOT;
use cmbfs::{Disk, Filesystem, FsError, InodeKind};

use super::Files;
use crate::cli::units::{Bytes, Count};

/// What a temporary name ends with, before the process id: the pid namespace, since ids mean something only inside one.
fn mark() -> String {
    let namespace = std::fs::metadata("/proc/self/ns/pid").map_or(0, |meta| meta.ino());
    format!(".put-{namespace:x}-")
}

/// A name beside `path` that no other process uses, not longer than names may be.
pub(super) fn temporary_name(path: &str) -> String {
    const NAME_MAX: usize = 255;
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    let end = format!("{}{}", mark(), std::process::id());
    let mut keep = name.len().min(NAME_MAX - 1 - end.len());
    while !name.is_char_boundary(keep) {
        keep -= 1;
    }
    format!("{folder}/.{}{end}", &name[..keep])
}

/// Removes what writers that are dead left in the folder of `path`: their blocks would be lost to everyone for good.
pub(super) fn remove(files: &mut dyn Files, path: &str) {
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let mark = mark();
    // Whatever is wrong with the folder, the write itself will say better.
    let names = files.names(if folder.is_empty() { "/" } else { folder }).unwrap_or_default();
    for name in names {
        if is_left_over(&name, &mark, |pid| std::path::Path::new(&format!("/proc/{pid}")).exists()) {
            // Another put may be at it too, and it is no reason to fail.
            let _ = files.unlink(&format!("{folder}/{name}"));
        }
    }
}

/// Whether a name is one that a writer gives, of whatever machine.
fn is_temporary(name: &[u8]) -> bool {
    let Some(name) = str::from_utf8(name).ok().and_then(|name| name.strip_prefix('.')) else { return false };
    let Some((_, end)) = name.rsplit_once(".put-") else { return false };
    end.split_once('-').is_some_and(|(namespace, pid)| {
        let hex = |b: u8| b.is_ascii_digit() || matches!(b, b'a'..=b'f');
        !namespace.is_empty() && namespace.bytes().all(hex) && pid.parse::<u32>().is_ok()
    })
}

/// What killed writers left.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Unfinished {
    pub(crate) files: u64,
    pub(crate) bytes: u64,
}

/// Finds what killed writers left, in every folder, and removes it if `remove` is set. Whoever has mounted the filesystem has the device, and
/// no writer can be at it beside them.
pub(crate) fn unfinished<D: Disk>(fs: &mut Filesystem<D>, remove: bool) -> Result<Unfinished, FsError> {
    let mut found = Unfinished::default();
    let mut folders = vec![ROOT];
    while let Some(folder) = folders.pop() {
        for entry in fs.readdir(folder)? {
            if entry.kind == InodeKind::Directory {
                folders.push(entry.ino);
            } else if is_temporary(&entry.name) {
                found.files += 1;
                found.bytes += fs.stat(entry.ino)?.allocated;
                if remove {
                    fs.unlink_at(folder, &entry.name)?;
                }
            }
        }
    }
    if remove && found.files > 0 {
        fs.sync_all()?;
    }
    Ok(found)
}

impl fmt::Display for Unfinished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of {} that killed commands left",
            Count(self.files, "unfinished file"),
            Bytes(self.bytes)
        )
    }
}

fn is_left_over(name: &str, mark: &str, alive: impl Fn(u32) -> bool) -> bool {
    name.starts_with('.')
        && name.rsplit_once(mark).and_then(|(_, pid)| pid.parse().ok()).is_some_and(|pid: u32| !alive(pid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temporary_names_stay_beside_the_file_and_short_enough() {
        let end = format!("{}{}", mark(), std::process::id());
        assert_eq!(temporary_name("/a/b"), format!("/a/.b{end}"));
        assert_eq!(temporary_name("b"), format!("/.b{end}"));
        let long = temporary_name(&format!("/d/{}", "ä".repeat(127)));
        assert!(long.len() <= "/d/".len() + 255, "{long}");
    }

    #[test]
    fn only_what_a_dead_writer_left_is_left_over() {
        let dead = |_| false;
        assert!(is_left_over(".b.put-1f-77", ".put-1f-", dead));
        assert!(!is_left_over(".b.put-1f-77", ".put-1f-", |pid| pid == 77), "its writer lives");
        assert!(!is_left_over(".b.put-2e-77", ".put-1f-", dead), "another namespace's process");
        assert!(!is_left_over("b.put-1f-77", ".put-1f-", dead), "a user's own file");
        assert!(!is_left_over(".b.put-1f-77x", ".put-1f-", dead));
    }
    #[test]
    fn names_of_writers_are_told_from_others() {
        assert!(is_temporary(temporary_name("/d/a").rsplit('/').next().unwrap().as_bytes()));
        for name in [".b.put-1f-77", ".put-1f-77", ".a.put-1-2.put-f0000-1"] {
            assert!(is_temporary(name.as_bytes()) == (name != ".put-1f-77"), "{name}");
        }
        for name in
            ["b.put-1f-77", ".b.put-1f-", ".b.put--77", ".b.put-1F-77", ".b.put-1f-7x", ".b.put-77", ".b"]
        {
            assert!(!is_temporary(name.as_bytes()), "{name}");
        }
        assert!(!is_temporary(b".\xff.put-1f-77"));
    }
}
