//! A running server that a command goes to, and how long it may be silent.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use cmbfs::Client;
use cmbfs::shm_api::client::DEFAULT_PATIENCE;

use super::failure::{Failure, one_line};
use super::waiting;

/// A server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Server {
    socket: PathBuf,
    timeout: Timeout,
}

/// How long a server may be silent.
#[derive(Args, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Timeout {
    /// Seconds that the server may be silent before the command gives up (0: no limit). Work that takes longer is waited for
    #[arg(
        long = "timeout",
        value_name = "SECONDS",
        requires = "socket",
        default_value_t = DEFAULT_PATIENCE.as_secs()
    )]
    seconds: u64,
}

impl Timeout {
    /// For the server that listens on `socket`.
    pub(crate) fn on(self, socket: PathBuf) -> Server {
        Server { socket, timeout: self }
    }
}

impl Server {
    pub(crate) fn connect(&self) -> Result<Client, Failure> {
        let limit = match self.timeout.seconds {
            0 => Duration::MAX,
            seconds => Duration::from_secs(seconds),
        };
        let what = format!("waiting for the server on {}: it does not answer", self.socket.display());
        Ok(waiting::saying(one_line(&what), || Client::connect_within(&self.socket, limit))?)
    }
}
