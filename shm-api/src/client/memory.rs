//! Device memory as an open file: the drive's Persistent Memory Region, and what peers export.

use std::os::fd::OwnedFd;

use nvme_driver::mem::{Access, Mapping};
use p2p::region::{Region, RegionKind};

use super::file::{Direct, File};
use super::{Client, ClientError};
use crate::protocol::Op;
use crate::protocol::messages::{self as m, MemoryReply, MemoryRequest, OpenReply};

impl File {
    /// Opens device memory: the host cache comes first, then the memory itself if this client may have it.
    pub(super) fn memory(client: Client, what: u32, peer: u64, name: &str) -> Result<Self, ClientError> {
        let request = MemoryRequest { what, reserved: 0, peer };
        let reply = client.inner.connection.call(Op::Memory, "device memory", &request, name.as_bytes())?;
        let (body, text) = reply.message.body::<MemoryReply>()?;
        let mut fds = reply.fds.into_iter();
        let cache = fds.next();
        let direct = if body.reason == m::CMB_GIVEN {
            let fd = fds.next();
            let fd =
                fd.ok_or_else(|| ClientError::Protocol("no descriptor for the device memory".to_owned()))?;
            Ok(region(fd, &body)?)
        } else {
            Err(String::from_utf8_lossy(text).into_owned())
        };
        let MemoryReply { handle, ino, size, cache_len, window_size, .. } = body;
        let opened = OpenReply { handle, ino, size, cache_len, window_size };
        Self::opened(client, &opened, cache, true, Direct::Memory(direct))
    }

    /// Whether this client has the memory itself mapped, if this is device memory (else the CMB), and why not.
    pub fn direct_access(&self) -> Result<(), &str> {
        match &self.inner.direct {
            Direct::Cmb => self.inner.client.cmb_access(),
            Direct::Memory(Ok(_)) => Ok(()),
            Direct::Memory(Err(why)) => Err(why),
        }
    }
}

fn region(fd: OwnedFd, body: &MemoryReply) -> Result<Region, ClientError> {
    let len = usize::try_from(body.memory_len)
        .map_err(|_| ClientError::Protocol(format!("device memory of {} bytes", body.memory_len)))?;
    // Memory on a device may go away: reads give ones then, and the canary says so.
    Ok(if body.canary == u64::MAX {
        Region::new(
            Mapping::from_fd(fd, body.memory_offset, len, Access::ReadWrite)?,
            0,
            RegionKind::Ordinary,
        )
    } else {
        let kind = RegionKind::Device { canary: body.canary };
        Region::new(Mapping::of_device(fd, body.memory_offset, len)?, 0, kind)
    })
}
