//! Our driver on QEMU's NVMe controller over VFIO.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nvme_driver::OpenOptions;
use nvme_driver::clock::SystemClock;
use nvme_driver::cmb::Cmb;
use nvme_driver::controller::{Controller, ControllerOptions};
use nvme_driver::dma::DmaBuffer;
use nvme_driver::io_queue::IoQueue;
use nvme_driver::pci::DmaAccess;
use nvme_driver::queue::Data;
use nvme_driver::vfio::{self, device_memory};
use rustix::event::{EventfdFlags, eventfd};

use crate::lab::{Case, Outcome, addresses, expect, node_of, open, pattern};

pub(crate) const CASES: &[(&str, Case)] = &[
    ("identify", identify),
    ("read-write", read_write),
    ("depth-32", depth_32),
    ("cmb-data", cmb_data),
    ("queues-in-cmb", queues_in_cmb),
    ("peer-to-peer", peer_to_peer),
    ("peer-unmapped", peer_unmapped),
    ("peer-read-only", peer_read_only),
    ("no-dma-without-bus-master", no_dma_without_bus_master),
    ("interrupts", interrupts),
    ("reset-under-load", reset_under_load),
    ("kernel-reads-back", kernel_reads_back),
    ("disk-by-url", disk_by_url),
    ("two-processes", two_processes),
];

const BLOCK: usize = 512;

pub(crate) fn controller(index: usize, options: ControllerOptions) -> Outcome<Arc<Controller>> {
    Ok(Controller::new(open(index)?, options, Arc::new(SystemClock::new()))?)
}

pub(crate) fn cmb_of(controller: &Controller) -> Outcome<Arc<Cmb>> {
    let cmb = controller.cmb();
    Ok(Arc::clone(cmb.cmb().ok_or_else(|| format!("no CMB: {cmb:?}"))?))
}

/// A queue and a buffer to go with it.
pub(crate) struct Io {
    pub(crate) queue: IoQueue,
    pub(crate) buffer: DmaBuffer,
}

impl Io {
    pub(crate) fn new(controller: &Arc<Controller>, bytes: usize) -> Outcome<Self> {
        Ok(Self { queue: controller.create_queue()?, buffer: controller.arena().alloc(bytes)? })
    }

    pub(crate) fn data(&self, offset: usize, len: usize) -> Data {
        Data { address: self.buffer.bus_address() + offset as u64, len }
    }

    /// Waits for everything in flight; any failed command is an error.
    fn finish(&mut self) -> Outcome {
        self.queue.ring();
        let mut failed = None;
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(40);
        while self.queue.pair().in_flight() > 0 {
            self.queue.reap(usize::MAX, |done| {
                if !done.status.is_success() {
                    failed = Some(done.status);
                }
            })?;
            expect(std::time::Instant::now() < deadline, "commands did not complete")?;
        }
        failed.map_or(Ok(()), |status| Err(format!("a command failed: {status}").into()))
    }

    pub(crate) fn read(&mut self, lba: u64, to: Data) -> Outcome {
        self.queue.read(1, lba, (to.len / BLOCK) as u32, to, 0)?;
        self.finish()
    }

    pub(crate) fn write(&mut self, lba: u64, from: Data) -> Outcome {
        self.queue.write(1, lba, (from.len / BLOCK) as u32, from, 0)?;
        self.finish()
    }

    /// Writes `bytes` at `lba` through host memory.
    pub(crate) fn put(&mut self, lba: u64, bytes: &[u8]) -> Outcome {
        self.buffer.write(0, bytes)?;
        self.write(lba, self.data(0, bytes.len()))
    }

    /// Reads `len` bytes at `lba` through host memory.
    pub(crate) fn get(&mut self, lba: u64, len: usize) -> Outcome<Vec<u8>> {
        self.buffer.zero()?;
        self.read(lba, self.data(0, len))?;
        let mut bytes = vec![0; len];
        self.buffer.read(0, &mut bytes)?;
        Ok(bytes)
    }
}

fn cmb_read(cmb: &Cmb, offset: usize, len: usize) -> Outcome<Vec<u8>> {
    let mut bytes = vec![0; len];
    device_memory::read(&cmb.data.memory, offset, &mut bytes)?;
    Ok(bytes)
}

fn cmb_write(cmb: &Cmb, offset: usize, bytes: &[u8]) -> Outcome {
    device_memory::write(&cmb.data.memory, offset, bytes)?;
    device_memory::flush(&cmb.data.memory, offset)?;
    Ok(())
}

fn identify() -> Outcome {
    for index in 0..2 {
        let controller = controller(index, ControllerOptions::default())?;
        let identity = controller.identity();
        println!(
            "{} {:?}, at most {} bytes a command",
            identity.model(),
            identity.serial(),
            controller.max_transfer()
        );
        expect(identity.model() == "QEMU NVMe Ctrl", "model")?;
        expect(identity.serial() == format!("lab{index}"), "serial number")?;
        let namespace = controller.namespace()?;
        expect(namespace.block_size as usize == BLOCK && namespace.bytes() == 64 << 20, "namespace")?;
        expect(cmb_of(&controller)?.size == 64 << 20, "CMB size")?;
    }
    Ok(())
}

/// Every shape of PRPs: one page, two, lists, offsets into the first page.
fn read_write() -> Outcome {
    let controller = controller(0, ControllerOptions::default())?;
    let max = controller.max_transfer();
    let mut io = Io::new(&controller, max + 8192)?;
    for (offset, len) in
        [(0, 512), (512, 4096), (3584, 8192), (0, 8192), (1024, 12288), (4092, 512), (0, max), (512, max)]
    {
        let bytes = pattern((offset + len) as u64, len);
        io.buffer.write(offset, &bytes)?;
        io.write(64, io.data(offset, len))?;
        io.buffer.zero()?;
        io.read(64, io.data(offset, len))?;
        let mut back = vec![0; len];
        io.buffer.read(offset, &mut back)?;
        expect(back == bytes, format!("{len} bytes at offset {offset} differ"))?;
    }
    io.queue.flush(1, 0)?;
    io.finish()
}

fn depth_32() -> Outcome {
    let controller = controller(0, ControllerOptions::default())?;
    let mut io = Io::new(&controller, 32 * 4096)?;
    let bytes = pattern(7, 32 * 4096);
    for round in 0..20u64 {
        io.buffer.write(0, &bytes)?;
        for i in 0..32 {
            // Each round puts the blocks elsewhere.
            io.queue.write(1, round * 256 + (i * 13 % 32) * 8, 8, io.data(i as usize * 4096, 4096), i)?;
        }
        io.finish()?;
        io.buffer.zero()?;
        for i in 0..32 {
            io.queue.read(1, round * 256 + (i * 13 % 32) * 8, 8, io.data(i as usize * 4096, 4096), i)?;
        }
        io.finish()?;
        let mut back = vec![0; bytes.len()];
        io.buffer.read(0, &mut back)?;
        expect(back == bytes, format!("round {round} differs"))?;
    }
    Ok(())
}

fn cmb_data() -> Outcome {
    let controller = controller(0, ControllerOptions::default())?;
    let cmb = cmb_of(&controller)?;
    expect(cmb.data.is_device_memory && cmb.data.read_data && cmb.data.write_data, format!("{cmb:?}"))?;
    let mut io = Io::new(&controller, 512 << 10)?;
    for (i, len) in [4096, 8192, 65536, controller.max_transfer().min(512 << 10)].into_iter().enumerate() {
        let lba = 4096 * (i as u64 + 1);
        let at = (len * 3) & !4095;
        let in_cmb = Data { address: cmb.data.bus_address + at as u64, len };
        // Drive to CMB.
        let bytes = pattern(i as u64 + 100, len);
        io.put(lba, &bytes)?;
        io.read(lba, in_cmb)?;
        expect(cmb_read(&cmb, at, len)? == bytes, format!("{len} bytes read into the CMB differ"))?;
        // CMB to drive.
        let bytes = pattern(i as u64 + 200, len);
        cmb_write(&cmb, at, &bytes)?;
        io.write(lba, in_cmb)?;
        expect(io.get(lba, len)? == bytes, format!("{len} bytes written from the CMB differ"))?;
    }
    // 32 at once, each way; where each lands is another order than where it comes from.
    let bytes = pattern(250, 32 * 4096);
    io.put(0, &bytes)?;
    let piece = |i: u64| Data { address: cmb.data.bus_address + i * 4096, len: 4096 };
    for i in 0..32 {
        io.queue.read(1, (i * 13 % 32) * 8, 8, piece(i * 13 % 32), i)?;
    }
    io.finish()?;
    expect(cmb_read(&cmb, 0, bytes.len())? == bytes, "32 reads into the CMB at once differ")?;
    for i in 0..32 {
        io.queue.write(1, 8192 + (i * 7 % 32) * 8, 8, piece(i * 7 % 32), i)?;
    }
    io.finish()?;
    io.queue.flush(1, 0)?;
    io.finish()?;
    expect(io.get(8192, bytes.len())? == bytes, "32 writes from the CMB at once differ")
}

/// The submission queue in the CMB, alone and with its PRP lists.
fn queues_in_cmb() -> Outcome {
    queue_in_cmb(false)?;
    queue_in_cmb(true)
}

fn queue_in_cmb(cmb_prp_lists: bool) -> Outcome {
    let options = ControllerOptions { cmb_queue_bytes: 2 << 20, cmb_prp_lists, ..Default::default() };
    let controller = controller(0, options)?;
    let cmb = cmb_of(&controller)?;
    let (memory, address) = cmb.queues.as_ref().ok_or("no part of the CMB was set aside")?;
    println!("{} bytes for queues at {address:#x}", memory.len());
    // 256 entries of 64 bytes, then the lists: first that of the first slot. A transfer of 512 KiB has one of 127 entries.
    const LISTS: usize = 256 * 64;
    device_memory::write(memory, LISTS, &[0; 4096])?;
    let mut io = Io::new(&controller, 512 << 10)?;
    for len in [4096, 65536, 512 << 10] {
        let bytes = pattern(len as u64, len);
        io.put(0, &bytes)?;
        expect(io.get(0, len)? == bytes, format!("{len} bytes differ"))?;
    }
    let mut part = vec![0; LISTS];
    device_memory::read(memory, 0, &mut part)?;
    expect(part.iter().any(|b| *b != 0), "the queue in the CMB was never written")?;
    let mut list = [0; 4096];
    device_memory::read(memory, LISTS, &mut list)?;
    let seen = list.chunks(8).filter(|entry| entry.iter().any(|b| *b != 0)).count();
    println!("PRP lists in the CMB: {cmb_prp_lists}; {seen} entries there");
    expect(seen == if cmb_prp_lists { 127 } else { 0 }, "PRP lists are not where they should be")
}

/// Two drives; the first one's CMB is mapped for the second.
struct Pair {
    a: Arc<Controller>,
    b: Arc<Controller>,
    cmb: Arc<Cmb>,
    /// Where B sees A's CMB.
    iova: u64,
    len: usize,
}

impl Pair {
    fn new(access: DmaAccess) -> Outcome<Self> {
        let (a, b) =
            (controller(0, ControllerOptions::default())?, controller(1, ControllerOptions::default())?);
        let cmb = cmb_of(&a)?;
        let len = 4 << 20;
        let iova = b.iova().take(len as u64, 2 << 20)?;
        b.function().dma_map(&cmb.data.memory, 0, len, iova, access)?;
        Ok(Self { a, b, cmb, iova, len })
    }
}

/// B reads into A's CMB and writes from it; A goes on from there, without a byte in host memory.
fn peer_to_peer() -> Outcome {
    let pair = Pair::new(DmaAccess::ReadWrite)?;
    let (mut a, mut b) = (Io::new(&pair.a, 512 << 10)?, Io::new(&pair.b, 512 << 10)?);
    for (i, len) in [4096, 65536, 512 << 10].into_iter().enumerate() {
        let at = 64 * 4096 * i;
        let for_a = Data { address: pair.cmb.data.bus_address + at as u64, len };
        let for_b = Data { address: pair.iova + at as u64, len };
        let bytes = pattern(i as u64 + 300, len);
        b.put(0, &bytes)?;
        b.read(0, for_b)?;
        expect(cmb_read(&pair.cmb, at, len)? == bytes, format!("{len} bytes from B in A's CMB differ"))?;
        a.write(1024, for_a)?;
        expect(a.get(1024, len)? == bytes, format!("{len} bytes copied from B to A differ"))?;
        let bytes = pattern(i as u64 + 400, len);
        a.put(2048, &bytes)?;
        a.read(2048, for_a)?;
        b.write(4096, for_b)?;
        expect(b.get(4096, len)? == bytes, format!("{len} bytes copied from A to B differ"))?;
    }
    // Depth 32 into one CMB.
    for i in 0..32 {
        let to = Data { address: pair.iova + i * 4096, len: 4096 };
        b.queue.read(1, 4096 + i * 8, 8, to, i)?;
    }
    b.finish()?;
    let from_b = b.get(4096, 32 * 4096)?;
    expect(cmb_read(&pair.cmb, 0, 32 * 4096)? == from_b, "32 reads at once differ")?;
    pair.b.function().dma_unmap(pair.iova, pair.len)?;
    Ok(())
}

/// After unmapping, B's DMA does not land: QEMU says success, so only the data tells.
fn peer_unmapped() -> Outcome {
    let pair = Pair::new(DmaAccess::ReadWrite)?;
    let mut b = Io::new(&pair.b, 65536)?;
    let (old, new) = (pattern(1, 65536), pattern(2, 65536));
    b.put(0, &old)?;
    b.read(0, Data { address: pair.iova, len: 65536 })?;
    expect(cmb_read(&pair.cmb, 0, 65536)? == old, "B cannot reach A's CMB")?;
    b.put(0, &new)?;
    pair.b.function().dma_unmap(pair.iova, pair.len)?;
    let late = b.read(0, Data { address: pair.iova, len: 65536 });
    println!("the late read completed with {late:?}");
    expect(cmb_read(&pair.cmb, 0, 65536)? == old, "a DMA landed after dma_unmap")?;
    // Mapped again, it works again.
    pair.b.function().dma_map(&pair.cmb.data.memory, 0, pair.len, pair.iova, DmaAccess::ReadWrite)?;
    b.read(0, Data { address: pair.iova, len: 65536 })?;
    expect(cmb_read(&pair.cmb, 0, 65536)? == new, "B cannot reach A's CMB again")?;
    pair.b.function().dma_unmap(pair.iova, pair.len)?;
    Ok(())
}

/// A peer that may only read cannot write.
fn peer_read_only() -> Outcome {
    let pair = Pair::new(DmaAccess::Read)?;
    let mut b = Io::new(&pair.b, 4096)?;
    let (in_cmb, on_b) = (pattern(3, 4096), pattern(4, 4096));
    cmb_write(&pair.cmb, 0, &in_cmb)?;
    b.put(0, &on_b)?;
    let refused = b.read(0, Data { address: pair.iova, len: 4096 });
    println!("the read into read-only memory completed with {refused:?}");
    expect(cmb_read(&pair.cmb, 0, 4096)? == in_cmb, "a read-only mapping was written")?;
    b.write(8, Data { address: pair.iova, len: 4096 })?;
    expect(b.get(8, 4096)? == in_cmb, "a read-only mapping cannot be read")
}

fn no_dma_without_bus_master() -> Outcome {
    let controller = controller(0, ControllerOptions::default())?;
    let mut io = Io::new(&controller, 4096)?;
    io.put(0, &pattern(5, 4096))?;
    io.buffer.zero()?;
    controller.function().set_bus_master(false)?;
    io.queue.read(1, 0, 8, io.data(0, 4096), 0)?;
    io.queue.ring();
    std::thread::sleep(std::time::Duration::from_millis(300));
    let mut bytes = vec![1; 4096];
    io.buffer.read(0, &mut bytes)?;
    expect(bytes.iter().all(|b| *b == 0), "a DMA landed without bus mastering")?;
    expect(io.queue.reap(8, |_| ())? == 0, "a completion arrived without bus mastering")
}

/// MSI-X by eventfd: the admin completion queue signals vector 0.
fn interrupts() -> Outcome {
    let controller = controller(0, ControllerOptions::default())?;
    let f = controller.function();
    let fds = [eventfd(0, EventfdFlags::NONBLOCK)?, eventfd(0, EventfdFlags::NONBLOCK)?];
    f.set_interrupts(&fds)?;
    let count = |fd| {
        let mut bytes = [0u8; 8];
        match rustix::io::read(fd, &mut bytes) {
            Ok(_) => u64::from_le_bytes(bytes),
            Err(_) => 0,
        }
    };
    drop(controller.create_queue()?);
    std::thread::sleep(std::time::Duration::from_millis(100));
    let (first, second) = (count(&fds[0]), count(&fds[1]));
    println!("{first} and {second} interrupts");
    expect(first > 0 && second == 0, "creating a queue signals vector 0 only")?;
    f.set_interrupts(&fds[..1])?;
    drop(controller.create_queue()?);
    std::thread::sleep(std::time::Duration::from_millis(100));
    expect(count(&fds[0]) > 0, "no interrupts after the number of vectors changed")?;
    f.set_interrupts(&[])?;
    drop(controller.create_queue()?);
    std::thread::sleep(std::time::Duration::from_millis(100));
    expect(count(&fds[0]) == 0, "an interrupt after they were turned off")?;
    let many: Vec<_> = (0..4096).map_while(|_| eventfd(0, EventfdFlags::NONBLOCK).ok()).take(900).collect();
    expect(f.set_interrupts(&many).is_err(), "more vectors than the function has")
}

/// Function resets while commands are in flight: nothing hangs, and data is whole afterwards.
fn reset_under_load() -> Outcome {
    let controller = controller(0, ControllerOptions::default())?;
    let mut io = Io::new(&controller, 32 * 4096)?;
    let bytes = pattern(9, 32 * 4096);
    io.put(0, &bytes)?;
    for round in 0..5 {
        for i in 0..32 {
            io.queue.read(1, i * 8, 8, io.data(i as usize * 4096, 4096), i)?;
        }
        io.queue.ring();
        controller.function().reset()?;
        let abandoned = AtomicBool::new(false);
        io.queue.recover(|_| abandoned.store(true, Ordering::Relaxed))?;
        println!("round {round}: commands abandoned: {}", abandoned.into_inner());
        expect(io.queue.pair().in_flight() == 0, "commands are still in flight")?;
        expect(io.get(0, bytes.len())? == bytes, format!("round {round}: data differ"))?;
    }
    Ok(())
}

/// What we wrote is what the kernel's driver reads, and the other way round.
fn kernel_reads_back() -> Outcome {
    use std::os::unix::fs::FileExt;
    let address = addresses()?[1];
    let bytes = pattern(11, 256 << 10);
    {
        let controller = controller(1, ControllerOptions::default())?;
        let mut io = Io::new(&controller, bytes.len())?;
        io.put(8192, &bytes)?;
        io.queue.flush(1, 0)?;
        io.finish()?;
    }
    vfio::unbind(address)?;
    let node = node_of(address)?;
    let file = std::fs::File::options().read(true).write(true).open(&node)?;
    let mut back = vec![0; bytes.len()];
    file.read_exact_at(&mut back, 8192 * BLOCK as u64)?;
    expect(back == bytes, "the kernel reads something else")?;
    let bytes = pattern(12, 256 << 10);
    file.write_all_at(&bytes, 16384 * BLOCK as u64)?;
    file.sync_all()?;
    drop(file);
    let controller = controller(1, ControllerOptions::default())?;
    let mut io = Io::new(&controller, bytes.len())?;
    expect(io.get(16384, bytes.len())? == bytes, "we read something else than the kernel wrote")
}

/// `pci:` devices as the layers above open them: transfers longer than one command, the CMB, write zeroes, deallocate.
fn disk_by_url() -> Outcome {
    let address = addresses()?[0];
    vfio::bind(address)?;
    let device = nvme_driver::open(&format!("pci:{address}").parse()?, &OpenOptions::default())?;
    let mut disk = device.disk()?;
    let geometry = disk.geometry().clone();
    println!("{geometry:?}; DMA memory: {:?}", device.dma_fallback());
    expect(device.dma_fallback().is_none(), "DMA memory is not on huge pages")?;
    expect(geometry.bytes() == 64 << 20 && geometry.block_size as usize == BLOCK, "geometry")?;
    let bytes = pattern(21, 3 << 20);
    disk.write(1000, &bytes)?;
    disk.flush()?;
    let mut back = vec![0; bytes.len()];
    disk.read(1000, &mut back)?;
    expect(back == bytes, "3 MiB differ")?;
    let cmb = disk.cmb().ok_or("no CMB")?.clone();
    disk.read_to_cmb(1000, 8192, 1 << 20)?;
    let mut in_cmb = vec![0; 1 << 20];
    device_memory::read(&cmb.memory, 8192, &mut in_cmb)?;
    expect(in_cmb == bytes[..1 << 20], "read_to_cmb differs")?;
    disk.write_from_cmb(50_000, 8192, 1 << 20)?;
    let mut copied = vec![0; 1 << 20];
    disk.read(50_000, &mut copied)?;
    expect(copied == in_cmb, "write_from_cmb differs")?;
    disk.write_zeroes(1000, 100)?;
    disk.deallocate(50_000, 100)?;
    disk.read(1000, &mut back)?;
    expect(back[..100 * BLOCK].iter().all(|b| *b == 0), "not zeroed")?;
    expect(back[100 * BLOCK..] == bytes[100 * BLOCK..], "zeroed too much")
}

/// A device that another process has is refused; when that process is killed it can be opened.
fn two_processes() -> Outcome {
    let address = addresses()?[0];
    vfio::bind(address)?;
    let mut holder = std::process::Command::new("/proc/self/exe")
        .arg("vfio/hold-until-killed")
        .stdout(std::process::Stdio::piped())
        .spawn()?;
    let mut ready = [0u8; 6];
    std::io::Read::read_exact(holder.stdout.as_mut().ok_or("no output")?, &mut ready)?;
    let refused = nvme_driver::open(&format!("pci:{address}").parse()?, &OpenOptions::default());
    println!("{:?}", refused.as_ref().err().map(ToString::to_string));
    expect(refused.is_err(), "opened a device that another process has")?;
    holder.kill()?;
    holder.wait()?;
    let mut disk = nvme_driver::open(&format!("pci:{address}").parse()?, &OpenOptions::default())?.disk()?;
    let mut block = vec![0; BLOCK];
    disk.read(0, &mut block)?;
    Ok(())
}

/// Not a case of its own: what `two_processes` starts and kills, with commands in flight.
pub(crate) fn hold_until_killed() -> Outcome {
    use std::io::Write;
    let controller = controller(0, ControllerOptions::default())?;
    let mut io = Io::new(&controller, 32 * 4096)?;
    let mut told = false;
    loop {
        for i in 0..32 {
            io.queue.read(1, i * 8, 8, io.data(i as usize * 4096, 4096), i)?;
        }
        io.finish()?;
        if !told {
            std::io::stdout().write_all(b"ready\n")?;
            std::io::stdout().flush()?;
            told = true;
        }
    }
}
