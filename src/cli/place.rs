//! Where a command works: on a device that it opens itself, or through a running server.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

use cmbfs::DeviceUrl;

use super::device;
use super::failure::Failure;
use super::server::{Server, Timeout};

/// The arguments of a command that takes `DEVICE ARG...` or `--socket SOCK ARG...`.
#[derive(Args, Debug)]
pub(crate) struct At {
    /// Go through the server that listens on this socket, instead of opening a device
    #[arg(long, value_name = "SOCK")]
    socket: Option<PathBuf>,
    #[command(flatten)]
    timeout: Timeout,

    /// The device's URL (not with --socket), then what the usage line names
    #[arg(value_name = "ARGS")]
    args: Vec<OsString>,
}

/// A device or a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The device with this URL.
    Device(DeviceUrl),
    /// A server.
    Server(Server),
}

impl At {
    /// The place and the `N` other arguments, which `names` names in messages.
    pub(crate) fn take<const N: usize>(self, names: [&str; N]) -> Result<(Place, [OsString; N]), Failure> {
        let mut args = self.args;
        let place = match self.socket {
            Some(socket) => Place::Server(self.timeout.on(socket)),
            None if args.is_empty() => {
                return Err(Failure::usage("neither a DEVICE nor --socket SOCK is given")
                    .hint("a DEVICE is a URL, such as emu:disk.img?cmb=64M&size=1G"));
            }
            None => Place::Device(device::url(args.remove(0))?),
        };
        let got = args.len();
        let rest = <[OsString; N]>::try_from(args).map_err(|args| {
            let failure = match args.get(N) {
                Some(extra) => Failure::usage(format!("unexpected argument '{}'", extra.to_string_lossy())),
                None => Failure::usage(format!("missing: {}", names[got..].join(" "))),
            };
            let wanted = names.join(" ");
            failure.hint(format!("the arguments are DEVICE {wanted}, or --socket SOCK {wanted}"))
        })?;
        Ok((place, rest))
    }
}

/// An argument that must be UTF-8: a device URL, or a path inside the filesystem.
pub(crate) fn text(arg: OsString, what: &str) -> Result<String, Failure> {
    if arg.is_empty() {
        return Err(Failure::usage(format!("{what} is empty")));
    }
    arg.into_string()
        .map_err(|raw| Failure::usage(format!("{what} '{}' is not valid UTF-8", raw.to_string_lossy())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(socket: Option<&str>, args: &[&str]) -> At {
        At {
            socket: socket.map(PathBuf::from),
            timeout: Timeout::default(),
            args: args.iter().map(OsString::from).collect(),
        }
    }

    #[test]
    fn device_comes_first_unless_there_is_a_socket() {
        let (place, [a]) = at(None, &["emu:x", "/p"]).take(["PATH"]).unwrap();
        assert_eq!((place, a), (Place::Device("emu:x".parse().unwrap()), OsString::from("/p")));
        let (place, [a]) = at(Some("s"), &["/p"]).take(["PATH"]).unwrap();
        assert_eq!(
            (place, a),
            (Place::Server(Timeout::default().on(PathBuf::from("s"))), OsString::from("/p"))
        );
    }

    #[test]
    fn too_few_and_too_many_are_refused() {
        assert!(at(None, &[]).take(["PATH"]).is_err());
        assert!(at(None, &["emu:x"]).take(["PATH"]).is_err());
        assert!(at(None, &["emu:x", "/p", "/q"]).take(["PATH"]).is_err());
        assert!(at(Some("s"), &[]).take(["PATH"]).is_err());
        assert!(at(Some("s"), &["emu:x", "/p"]).take(["PATH"]).is_err());
    }
}
