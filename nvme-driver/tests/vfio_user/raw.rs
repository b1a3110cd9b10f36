//! A client that sends what it is told.

use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nvme_driver::emu::{Backing, Config, EmulatedController};
use nvme_driver::pci::PciFunction;
use nvme_driver::vfio_user::Header;
use nvme_driver::vfio_user::command;
use nvme_driver::vfio_user::server::Server;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// A served controller: 16 MiB RAM namespace, 1 MiB CMB.
pub(crate) struct Served {
    pub(crate) controller: Arc<EmulatedController>,
    pub(crate) path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

pub(crate) fn config() -> Config {
    Config {
        namespace: Backing::Ram { bytes: 16 << 20 },
        cmb_size: 1 << 20,
        io_queues: 4,
        ..Config::default()
    }
}

impl Served {
    pub(crate) fn new() -> Self {
        Self::with(EmulatedController::new(&config()).unwrap())
    }

    pub(crate) fn with(controller: Arc<EmulatedController>) -> Self {
        Self::over(controller.function(), controller)
    }

    /// Serves `function`, which has `controller` under it.
    pub(crate) fn over(function: Arc<dyn PciFunction>, controller: Arc<EmulatedController>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cntrl");
        let server = Server::bind(&path, function).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || server.run(&stopped).unwrap());
        Self { controller, path, stop, thread: Some(thread), _dir: dir }
    }

    pub(crate) fn connect(&self) -> Client {
        let mut client = Client::open(&self.path);
        let (head, _, _) =
            client.call(command::VERSION, b"\0\0\0\0{\"capabilities\":{\"write_multiple\":true}}\0", &[]);
        assert!(!head.is_error());
        client
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap();
            assert!(!self.path.exists(), "the socket file was left behind");
        }
    }
}

pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    id: u16,
}

impl Client {
    pub(crate) fn open(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        Self::over(stream)
    }

    pub(crate) fn over(stream: UnixStream) -> Self {
        Self { stream, id: 100 }
    }

    pub(crate) fn send(&self, header: Header, body: &[u8], fds: &[&OwnedFd]) {
        let bytes = [&header.to_bytes()[..], body].concat();
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        let sent = sendmsg(&self.stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
        assert_eq!(sent, bytes.len());
    }

    /// The next message, which is a reply.
    pub(crate) fn receive(&mut self) -> (Header, Vec<u8>, Vec<OwnedFd>) {
        let (header, body, fds) = self.receive_any().expect("the server closed the connection");
        assert!(header.is_reply());
        if header.is_error() {
            assert!(
                body.is_empty() && header.error != 0,
                "an error reply is a header with a number: {header:?}"
            );
        }
        (header, body, fds)
    }

    /// The next message; `None`: the server has hung up.
    pub(crate) fn receive_any(&mut self) -> Option<(Header, Vec<u8>, Vec<OwnedFd>)> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut head = [0u8; 16];
        let mut into = [IoSliceMut::new(&mut head)];
        let got = match recvmsg(&self.stream, &mut into, &mut control, RecvFlags::empty()) {
            // A reset: it hung up with something of ours unread.
            Err(rustix::io::Errno::CONNRESET) => return None,
            got => got.unwrap(),
        };
        if got.bytes == 0 {
            return None;
        }
        assert_eq!(got.bytes, 16, "headers come in one piece");
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                fds.extend(more);
            }
        }
        let header = Header::parse(&head);
        let mut body = vec![0; header.size as usize - 16];
        self.stream.read_exact(&mut body).unwrap();
        Some((header, body, fds))
    }

    pub(crate) fn call(
        &mut self,
        command: u16,
        body: &[u8],
        fds: &[&OwnedFd],
    ) -> (Header, Vec<u8>, Vec<OwnedFd>) {
        self.id = self.id.wrapping_add(1);
        self.send(Header::command(self.id, command, body.len()), body, fds);
        let (header, body, fds) = self.receive();
        assert_eq!((header.id, header.command), (self.id, command));
        (header, body, fds)
    }

    /// The call succeeds: its body.
    pub(crate) fn ok(&mut self, command: u16, body: &[u8], fds: &[&OwnedFd]) -> Vec<u8> {
        let (header, body, _) = self.call(command, body, fds);
        assert!(!header.is_error(), "command {command} failed with {}", header.error);
        body
    }

    /// The call fails: its error number.
    pub(crate) fn err(&mut self, command: u16, body: &[u8], fds: &[&OwnedFd]) -> i32 {
        let (header, _, _) = self.call(command, body, fds);
        assert!(header.is_error(), "command {command} succeeded");
        header.error as i32
    }

    /// Whether the server has hung up.
    pub(crate) fn is_closed(&mut self) -> bool {
        match self.stream.read(&mut [0]) {
            Ok(n) => n == 0,
            Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    pub(crate) fn read(&mut self, region: u32, offset: u64, count: u32) -> Vec<u8> {
        self.ok(command::REGION_READ, &access(region, offset, count, &[]), &[]).split_off(16)
    }

    pub(crate) fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        let reply = self.ok(command::REGION_WRITE, &access(region, offset, data.len() as u32, data), &[]);
        assert_eq!(reply.len(), 16);
    }
}

pub(crate) fn access(region: u32, offset: u64, count: u32, data: &[u8]) -> Vec<u8> {
    [&offset.to_le_bytes()[..], &region.to_le_bytes(), &count.to_le_bytes(), data].concat()
}

pub(crate) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Body of DMA_MAP: readable and writable.
pub(crate) fn dma_map(iova: u64, size: u64, offset: u64) -> Vec<u8> {
    [&words(&[32, 3])[..], &offset.to_le_bytes(), &iova.to_le_bytes(), &size.to_le_bytes()].concat()
}

/// Body of DMA_UNMAP.
pub(crate) fn dma_unmap(flags: u32, iova: u64, size: u64) -> Vec<u8> {
    [&words(&[24, flags])[..], &iova.to_le_bytes(), &size.to_le_bytes()].concat()
}
