//! What to do about an error, where its own text does not say.

use std::error::Error;
use std::io;

use rustix::io::Errno;

/// The hint for an error from below, if there is something useful to say.
pub(crate) fn hint_for(error: &(dyn Error + 'static)) -> Option<&'static str> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return for_io(io);
        }
        next = error.source();
    }
    None
}

fn for_io(error: &io::Error) -> Option<&'static str> {
    Some(match error.kind() {
        io::ErrorKind::StorageFull => "free space there, or name another place",
        _ if error.raw_os_error() == Some(Errno::NAMETOOLONG.raw_os_error()) => {
            "a file's name has at most 255 bytes, the path of a socket 107: a shorter one, or a relative one, will do"
        }
        io::ErrorKind::PermissionDenied => "run as a user who may, or change the permissions",
        _ => return None,
    })
}
