//! What is at a path where somebody expects a server's Unix socket: the system's "connection refused" does not tell.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// What [`what_else`] says of a plain file.
pub const PLAIN_FILE: &str = "a plain file";
/// What [`what_else`] says of a directory.
pub const DIRECTORY: &str = "a directory";

/// What is at `path`, in words, where it is no socket. `None`: it is one, or there is nothing, or it cannot be seen.
pub fn what_else(path: &Path) -> Option<&'static str> {
    let kind = std::fs::metadata(path).ok()?.file_type();
    Some(match () {
        () if kind.is_socket() => return None,
        () if kind.is_file() => PLAIN_FILE,
        () if kind.is_dir() => DIRECTORY,
        () if kind.is_fifo() => "a named pipe",
        () => "a device node",
    })
}

/// Why nobody answers at `path`, where the answer was that there is none. `server`: what would listen there.
pub fn why_refused(path: &Path, error: &io::Error, server: &str) -> Option<String> {
    let absent = error.kind() == io::ErrorKind::NotFound;
    if !absent && error.kind() != io::ErrorKind::ConnectionRefused {
        return None;
    }
    Some(match what_else(path) {
        Some(what) => format!("that is {what}, not a socket"),
        None if absent => format!("there is no such socket: is {server} running?"),
        None => format!("nobody listens on that socket: {server} has ended, start it again"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn whatever_is_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        let file = dir.path().join("f");
        std::fs::write(&file, b"").unwrap();
        let socket = dir.path().join("s");
        drop(UnixListener::bind(&socket).unwrap());
        for (path, said) in [
            (file.as_path(), "that is a plain file, not a socket"),
            (dir.path(), "that is a directory, not a socket"),
            (Path::new("/dev/null"), "that is a device node, not a socket"),
            (socket.as_path(), "nobody listens on that socket: the server has ended, start it again"),
        ] {
            assert_eq!(why_refused(path, &refused, "the server").unwrap(), said);
        }
        let absent = io::Error::from(io::ErrorKind::NotFound);
        let said = why_refused(&dir.path().join("none"), &absent, "the server").unwrap();
        assert!(said.starts_with("there is no such socket"), "{said}");
        assert!(why_refused(&file, &io::ErrorKind::PermissionDenied.into(), "the server").is_none());
    }
}
