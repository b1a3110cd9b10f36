//! One client's view of a function: messages in, replies out. No I/O happens here but on the function itself.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::interrupts::{Interrupts, KINDS};
use super::memory::DmaRegions;
use super::protocol::{Fields, HEADER, Header, Put, command};
use super::regions::{COUNT, Regions, errno};
use super::version::{Agreed, negotiate};
use crate::pci::{PciError, PciFunction};

const DEVICE_FLAG_RESET: u32 = 1;
const DEVICE_FLAG_PCI: u32 = 2;

/// What to send back.
#[derive(Debug)]
pub struct Reply {
    /// Header and body.
    pub bytes: Vec<u8>,
    /// Descriptors to send along.
    pub fds: Vec<OwnedFd>,
}

/// What a session asks of its client.
pub trait ClientCalls: Send + Sync + fmt::Debug {
    /// DMA_READ (spec, "VFIO_USER_DMA_READ"): one message, at most as long as the client takes.
    fn dma_read(&self, address: u64, into: &mut [u8]) -> io::Result<()>;

    /// DMA_WRITE (spec, "VFIO_USER_DMA_WRITE"): the same.
    fn dma_write(&self, address: u64, from: &[u8]) -> io::Result<()>;

    /// Opens the socket for calls from now on, and gives its other end (spec, "Version", `twin_socket`). Called at most once.
    fn twin(&self) -> io::Result<OwnedFd>;
}

/// One client's view of a function. When it is dropped, the client's memory and eventfds are let go of; the function's
/// state is kept for the next client (spec, "Client Disconnection"), only its bus mastering is turned off.
pub struct Session {
    function: Arc<dyn PciFunction>,
    agreed: Option<Agreed>,
    client: Option<Arc<dyn ClientCalls>>,
    regions: Regions,
    memory: DmaRegions,
    interrupts: Interrupts,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("function", &self.function.name())
            .field("agreed", &self.agreed)
            .finish_non_exhaustive()
    }
}

type Answer = Result<(Vec<u8>, Vec<OwnedFd>), Errno>;

impl Session {
    /// A session with a client. `trusted`: DMA memory that cannot be sealed against shrinking is accepted (a client that shrinks
    /// it kills this process with SIGBUS; so only from one that could do that anyway). `client`: how to reach memory without a
    /// descriptor; without it, the function's DMA there faults.
    pub fn new(
        function: Arc<dyn PciFunction>,
        trusted: bool,
        client: Option<Arc<dyn ClientCalls>>,
    ) -> Result<Self, PciError> {
        Ok(Self {
            regions: Regions::new(Arc::clone(&function))?,
            memory: DmaRegions::new(Arc::clone(&function), trusted),
            interrupts: Interrupts::new(Arc::clone(&function)),
            function,
            agreed: None,
            client,
        })
    }

    /// The handshake is refused by closing the connection (spec, "Versioning and Feature Support").
    fn shake_hands(&mut self, body: &[u8]) -> Result<(Vec<u8>, Vec<OwnedFd>), Errno> {
        let (agreed, reply) = negotiate(body, self.client.is_some())?;
        let mut fds = Vec::new();
        if let Some(client) = &self.client {
            if agreed.twin_socket {
                fds.push(client.twin().map_err(|_| Errno::MFILE)?);
            }
            self.memory.ask(Arc::clone(client), agreed.max_data);
        }
        self.agreed = Some(agreed);
        Ok((reply, fds))
    }

    /// Handles one message. `None`: the client wants no reply. An error: the connection must be closed, since the client breaks
    /// the protocol in a way that no reply can express.
    pub fn handle(&mut self, header: Header, body: &[u8], fds: Vec<OwnedFd>) -> Result<Option<Reply>, Errno> {
        if !header.is_command() || header.body_len() != Some(body.len()) {
            return Err(Errno::PROTO);
        }
        let answer = match (header.command, self.agreed) {
            (command::VERSION, None) => Ok(self.shake_hands(body)?),
            (_, None) => return Err(Errno::PROTO),
            (_, Some(agreed)) => self.answer(header.command, agreed, body, fds),
        };
        if header.no_reply() {
            return Ok(None);
        }
        let (head, body, fds) = match answer {
            Ok((body, fds)) => (header.reply(body.len(), None), body, fds),
            Err(e) => (header.reply(0, Some(e)), Vec::new(), Vec::new()),
        };
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        bytes.extend_from_slice(&head.to_bytes());
        bytes.extend_from_slice(&body);
        Ok(Some(Reply { bytes, fds }))
    }

    fn answer(&mut self, command: u16, agreed: Agreed, body: &[u8], fds: Vec<OwnedFd>) -> Answer {
        let plain = |reply: Result<Vec<u8>, Errno>| reply.map(|body| (body, Vec::new()));
        match command {
            command::DMA_MAP => plain(self.memory.map(body, fds)),
            command::DMA_UNMAP => plain(self.memory.unmap(body)),
            command::DEVICE_GET_INFO => plain(device_info(body)),
            command::DEVICE_GET_REGION_INFO => self.regions.info(body),
            command::DEVICE_GET_IRQ_INFO => plain(self.interrupts.info(body)),
            command::DEVICE_SET_IRQS => plain(self.interrupts.set(body, fds)),
            command::REGION_READ => plain(self.regions.read(body)),
            command::REGION_WRITE => plain(self.regions.write(body)),
            command::REGION_WRITE_MULTI if agreed.write_multi => plain(self.regions.write_multi(body)),
            command::DEVICE_RESET => plain(self.function.reset().map(|()| Vec::new()).map_err(|e| errno(&e))),
            command::VERSION => Err(Errno::INVAL),
            _ => Err(Errno::NOTSUP),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // The memory goes away: nothing may be on its way to it, and nothing may start again before the next client says so.
        if let Err(e) = self.function.set_bus_master(false) {
            tracing::debug!("vfio-user: turning bus mastering off: {e}");
        }
        self.memory.clear();
        self.interrupts.clear();
    }
}

fn device_info(body: &[u8]) -> Result<Vec<u8>, Errno> {
    if Fields(body).u32()? < 16 {
        return Err(Errno::INVAL);
    }
    let mut reply = Vec::with_capacity(16);
    reply.put_u32(16);
    reply.put_u32(DEVICE_FLAG_RESET | DEVICE_FLAG_PCI);
    reply.put_u32(COUNT);
    reply.put_u32(KINDS);
    Ok(reply)
}
