//! The name under which a file is written until it is whole, and what killed writers left under such names.

use std::os::unix::fs::MetadataExt;

use super::Files;

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
}
