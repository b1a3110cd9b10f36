//! Block numbers for clients: processes that read and write the drive's image by them, beside others that use windows.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod common;

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::ChildStdout;
use std::time::Duration;

use common::{Process, SMALL, Serving, Setup, connect, role, spawn, until};
use rustix::process::{Pid, Signal, kill_process};
use shm_api::client::{Access, BlockState, Client, File, Layout, LeaseName, OpenMode};
use shm_api::protocol::ErrorCode;
use shm_api::server::Fence;

const WINDOW: u64 = SMALL.window as u64;
/// Four windows of a file.
const SIZE: u64 = 4 * WINDOW;

/// A process that holds a lease, and does what it is told line by line.
fn holder(layout: Layout, image: &Path) {
    let image = std::fs::File::options().read(true).write(true).open(image).unwrap();
    let mut layout = Some(layout);
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let number = |n: usize| words[n].parse::<u64>().unwrap();
        let held = layout.as_ref().unwrap();
        let unit = u64::from(held.block_size());
        let answer = match words[0] {
            "write" => {
                for e in held.extents() {
                    image.write_all_at(&vec![number(1) as u8; e.bytes() as usize], e.lba * unit).unwrap();
                }
                "written".to_owned()
            }
            // What the blocks hold, where it changes.
            "read" => {
                let mut text = String::new();
                let mut last = None;
                for e in held.extents() {
                    let mut bytes = vec![0; e.bytes() as usize];
                    if e.state != BlockState::Hole {
                        image.read_exact_at(&mut bytes, e.lba * unit).unwrap();
                    }
                    for byte in bytes {
                        if last.replace(byte) != Some(byte) {
                            write!(text, "{byte} ").unwrap();
                        }
                    }
                }
                text.trim_end().to_owned()
            }
            "commit" => match held.commit(held.extents(), Some(number(1))) {
                Ok(size) => format!("{size} bytes"),
                Err(e) => format!("{:?}", e.code().unwrap()),
            },
            "recalls" => ranges(held),
            "wait" => {
                until("a recall", || !held.recalls().unwrap().is_empty());
                ranges(held)
            }
            "give" => {
                held.release_range(number(1), number(2)).unwrap();
                "given".to_owned()
            }
            "release" => {
                layout.take().unwrap().release().unwrap();
                "released".to_owned()
            }
            other => panic!("{other}?"),
        };
        println!("\n> {answer}");
        if layout.is_none() {
            return;
        }
    }
    // The process ends without a word.
    std::mem::forget(layout);
}

fn ranges(layout: &Layout) -> String {
    let recalls = layout.recalls().unwrap();
    recalls.iter().map(|r| format!("{}+{}", r.offset, r.len)).collect::<Vec<_>>().join(" ")
}

#[test]
fn helper_process() {
    let Some((role, args)) = role() else { return };
    let number = |n: usize| args[n].parse::<u64>().unwrap();
    if role == "serve" {
        let setup = Setup { url: &args[1], ..SMALL };
        let server = shm_api::server::Server::new(
            common::filesystem(setup.url),
            common::options(Path::new(&args[0]), setup),
        );
        server.unwrap().run().unwrap();
        return;
    }
    let client = connect(Path::new(&args[0]));
    let layout = match role.as_str() {
        "reader" => {
            let file = client.open("/a", OpenMode::read()).unwrap();
            file.map_blocks(number(2), number(3), Access::Read).unwrap()
        }
        "writer" => {
            let file = client.open("/a", OpenMode::write()).unwrap();
            file.map_blocks(number(2), number(3), Access::Write).unwrap()
        }
        "sharer" => {
            let lease = LeaseName { id: number(2), device_generation: number(3) };
            client.share_layout(lease).unwrap()
        }
        other => panic!("{other}?"),
    };
    println!("\n> {} {}", layout.lease().id, layout.lease().device_generation);
    holder(layout, Path::new(&args[1]));
}

/// A [`holder`] in a process of its own.
struct Holder {
    process: Process,
    out: BufReader<ChildStdout>,
    lease: LeaseName,
}

impl Holder {
    fn start(rig: &Rig, role: &str, first: u64, second: u64) -> Self {
        let (socket, image) = (rig.serving.socket.to_str().unwrap(), rig.image.to_str().unwrap());
        let mut process = spawn(role, &[socket, image, &first.to_string(), &second.to_string()]);
        let out = BufReader::new(process.0.stdout.take().unwrap());
        let mut holder = Self { process, out, lease: LeaseName { id: 0, device_generation: 0 } };
        let name = holder.answer();
        let (id, device_generation) = name.split_once(' ').unwrap_or_else(|| panic!("{name:?}"));
        holder.lease =
            LeaseName { id: id.parse().unwrap(), device_generation: device_generation.parse().unwrap() };
        holder
    }

    fn answer(&mut self) -> String {
        // The test harness writes lines of its own between them.
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.out.read_line(&mut line).unwrap() > 0, "the holder has ended");
            if let Some(answer) = line.strip_prefix("> ") {
                return answer.trim_end().to_owned();
            }
        }
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.process.0.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    fn ask(&mut self, line: &str) -> String {
        self.tell(line);
        self.answer()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process.0), signal).unwrap();
    }
}

/// A server on a drive whose image other processes can open, and a client with /a: four windows of ones.
struct Rig {
    serving: Serving,
    client: Client,
    file: File,
    image: PathBuf,
    _dir: tempfile::TempDir,
}

fn rig(lease_grace_ms: u64, fence: Option<Fence>) -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    let url = format!("emu:{}?size=64M&cmb=4M", image.display());
    let setup = Setup { url: &url, lease_grace_ms, ..SMALL };
    let serving = Serving::start_with(setup, |options| shm_api::server::ServerOptions { fence, ..options });
    let client = serving.client();
    let file = client.open("/a", OpenMode::create()).unwrap();
    file.write_at(0, &vec![1; SIZE as usize]).unwrap();
    file.commit().unwrap();
    Rig { serving, client, file, image, _dir: dir }
}

impl Rig {
    /// Reads a window's worth through windows, in a thread: it may have to wait for a lease.
    fn reading(&self, offset: u64) -> std::thread::JoinHandle<Vec<u8>> {
        let socket = self.serving.socket.clone();
        std::thread::spawn(move || {
            let file = connect(&socket).open("/a", OpenMode::read()).unwrap();
            let mut bytes = vec![0; WINDOW as usize];
            file.map_read(offset, WINDOW).unwrap().read(0, &mut bytes).unwrap();
            bytes
        })
    }

    fn free(&self) -> u64 {
        self.client.info().unwrap().free_bytes
    }
}

fn all(bytes: &[u8], byte: u8) -> bool {
    bytes.iter().all(|&b| b == byte)
}

#[test]
fn a_write_layout_sends_the_windows_away_and_a_wanted_window_recalls_it() {
    let rig = rig(SMALL.lease_grace_ms, None);
    let mapped = rig.file.map_read(0, SIZE).unwrap();
    let mut bytes = vec![0; SIZE as usize];
    mapped.read(0, &mut bytes).unwrap();
    // Written through a window and not committed: the holder of a layout finds it on the drive.
    rig.file.map(WINDOW, 4096).unwrap().write(0, &[2; 4096]).unwrap();
    let resident = |rig: &Rig| {
        let s = rig.client.status().unwrap();
        s.cmb_windows + s.host_windows
    };
    assert_eq!(resident(&rig), 4);
    let mut holder = Holder::start(&rig, "writer", WINDOW, WINDOW);
    assert_eq!(resident(&rig), 3, "the window over the layout is still there");
    assert_eq!(holder.ask("read"), "2 1");
    // The other windows are nobody's business, in the CMB or revoked.
    mapped.read(0, &mut bytes[..WINDOW as usize]).unwrap();
    rig.file.map(2 * WINDOW, 4096).unwrap().write(0, &[3; 4096]).unwrap();
    assert_eq!(holder.ask("recalls"), "");
    assert_eq!(holder.ask("write 9"), "written");
    // Now somebody wants the window: the holder is asked for it, gives it back, and what it committed is there.
    let reader = rig.reading(WINDOW);
    assert_eq!(holder.ask("wait"), format!("{WINDOW}+{WINDOW}"));
    assert_eq!(holder.ask(&format!("commit {SIZE}")), format!("{SIZE} bytes"));
    holder.ask(&format!("give {WINDOW} {WINDOW}"));
    assert!(all(&reader.join().unwrap(), 9));
    // Whoever had it mapped before goes on there too.
    mapped.read(WINDOW, &mut bytes[..WINDOW as usize]).unwrap();
    assert!(all(&bytes[..WINDOW as usize], 9));
    assert_eq!(holder.ask(&format!("commit {SIZE}")), "StaleLease");
}

#[test]
fn a_read_layout_is_shared_with_readers_and_recalled_for_a_writer() {
    let rig = rig(SMALL.lease_grace_ms, None);
    let mut holders = [Holder::start(&rig, "reader", 0, SIZE), Holder::start(&rig, "reader", WINDOW, WINDOW)];
    assert!(all(&rig.reading(WINDOW).join().unwrap(), 1));
    let mut bytes = vec![0; WINDOW as usize];
    let mapped = rig.file.map_read(WINDOW, WINDOW).unwrap();
    mapped.read(0, &mut bytes).unwrap();
    assert!(holders.iter_mut().all(|h| h.ask("recalls").is_empty()), "readers are in no reader's way");
    let file = rig.file.clone();
    let writer = std::thread::spawn(move || {
        file.write_at(WINDOW, &[7; 4096]).unwrap();
    });
    for holder in &mut holders {
        assert_eq!(holder.ask("wait"), format!("{WINDOW}+{WINDOW}"));
        assert_eq!(holder.ask("read"), "1");
        holder.ask(&format!("give {WINDOW} {WINDOW}"));
    }
    writer.join().unwrap();
    rig.file.commit().unwrap();
    mapped.read(0, &mut bytes).unwrap();
    assert!(all(&bytes[..4096], 7) && all(&bytes[4096..], 1));
    // The rest of the first lease is as it was.
    assert_eq!(holders[0].ask("recalls"), "");
    assert_eq!(holders[0].ask("release"), "released");
}

#[test]
fn a_shared_lease_comes_back_when_all_its_processes_gave_it_back() {
    let rig = rig(SMALL.lease_grace_ms, None);
    let mut first = Holder::start(&rig, "writer", 0, 2 * WINDOW);
    let mut second = Holder::start(&rig, "sharer", first.lease.id, first.lease.device_generation);
    let mut third = Holder::start(&rig, "sharer", first.lease.id, first.lease.device_generation);
    second.ask("write 5");
    first.ask(&format!("commit {SIZE}"));
    let reader = rig.reading(0);
    let asked = format!("0+{WINDOW}");
    assert_eq!(first.ask("wait"), asked);
    assert_eq!(second.ask("wait"), asked);
    assert_eq!(third.ask("wait"), asked);
    first.ask(&format!("give 0 {WINDOW}"));
    assert_eq!(first.ask("recalls"), "");
    assert_eq!(second.ask("release"), "released");
    // The last one is still writing there, and nobody reads.
    third.ask("write 6");
    third.ask(&format!("commit {SIZE}"));
    assert_eq!(third.ask("recalls"), asked);
    third.ask(&format!("give 0 {WINDOW}"));
    assert!(all(&reader.join().unwrap(), 6), "the range was read while a process of the lease used it");
    // One is killed, one lives: the rest of the lease is the living one's.
    first.signal(Signal::KILL);
    let reader = rig.reading(WINDOW);
    assert_eq!(third.ask("wait"), format!("{WINDOW}+{WINDOW}"));
    third.signal(Signal::KILL);
    assert!(all(&reader.join().unwrap(), 6));
}

#[test]
fn a_silent_holder_costs_its_own_blocks_and_nobody_more_than_the_grace() {
    let rig = rig(50, None);
    let free = rig.free();
    let mut holder = Holder::start(&rig, "writer", WINDOW, WINDOW);
    holder.signal(Signal::STOP);
    assert!(all(&rig.reading(WINDOW).join().unwrap(), 1));
    assert_eq!(rig.free(), free - WINDOW, "its blocks were given to others");
    // It wakes up and goes on writing: into blocks that are no file's.
    holder.signal(Signal::CONT);
    holder.ask("write 9");
    assert_eq!(holder.ask(&format!("commit {SIZE}")), "StaleLease");
    rig.client.revoke_all().unwrap();
    assert!(all(&rig.reading(WINDOW).join().unwrap(), 1));
    // It may map the range again, and finds the file there.
    let mut again = Holder::start(&rig, "writer", WINDOW, WINDOW);
    assert_eq!(again.ask("read"), "1");
    again.ask("release");
    holder.signal(Signal::KILL);
    until("the blocks of the dead come back", || {
        rig.file.commit().unwrap();
        rig.free() == free
    });
}

#[test]
fn a_silent_holder_is_fenced_where_there_is_a_fence() {
    // What a holder on this machine cannot survive. A device's holder would lose its queue or its IOMMU mappings instead.
    let fence = Fence::new(|recall, pids| {
        assert_eq!(recall.ranges, [(WINDOW, WINDOW)]);
        for pid in pids {
            let _ = kill_process(Pid::from_raw(*pid).unwrap(), Signal::KILL);
        }
        // A zombie touches nothing any more.
        pids.iter().all(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit(") ").next().is_none_or(|s| s.is_empty() || s.starts_with(['Z', 'X']))
        })
    });
    let rig = rig(50, Some(fence));
    let blocks = |rig: &Rig| {
        let layout = rig.file.map_blocks(WINDOW, WINDOW, Access::Read).unwrap();
        layout.extents().iter().map(|e| (e.lba, e.blocks)).collect::<Vec<_>>()
    };
    let before = blocks(&rig);
    let holder = Holder::start(&rig, "writer", WINDOW, WINDOW);
    holder.signal(Signal::STOP);
    assert!(all(&rig.reading(WINDOW).join().unwrap(), 1));
    drop(holder);
    // Only the fenced would have to leave their blocks behind.
    until("the lease is over", || rig.file.map_blocks(WINDOW, WINDOW, Access::Write).is_ok());
    assert_eq!(blocks(&rig).iter().map(|b| b.1).sum::<u64>(), before.iter().map(|b| b.1).sum::<u64>());
}

#[test]
fn eviction_is_no_layout_change() {
    let rig = rig(50, None);
    let mapped = rig.file.map_read(0, SIZE).unwrap();
    let mut bytes = vec![0; SIZE as usize];
    mapped.read(0, &mut bytes).unwrap();
    assert!(rig.client.status().unwrap().cmb_windows >= 4);
    let layout = rig.file.map_blocks(0, SIZE, Access::Read).unwrap();
    let other = rig.client.open("/b", OpenMode::create()).unwrap();
    other.write_at(0, &[1; 100_000]).unwrap();
    let writable = other.map_blocks(0, 100_000, Access::Write).unwrap();
    let count = rig.client.recall_count().unwrap();
    // The windows are in the CMB again beside the layout; then they are revoked, one by one and together.
    mapped.read(0, &mut bytes).unwrap();
    for _ in 0..3 {
        mapped.read(0, &mut bytes).unwrap();
        rig.file.revoke_window(0).unwrap();
        rig.client.revoke("/a").unwrap();
        rig.client.revoke_all().unwrap();
        // Others push them out.
        let big = rig.client.open("/big", OpenMode::create()).unwrap();
        big.write_at(0, &vec![4; 6 << 20]).unwrap();
        big.commit().unwrap();
    }
    assert!(rig.client.status().unwrap().revocations > 8);
    // Longer than a holder has to answer.
    assert_eq!(rig.client.wait_recall(count, Duration::from_millis(120)).unwrap(), count);
    assert!(layout.recalls().unwrap().is_empty() && writable.recalls().unwrap().is_empty());
    let image = std::fs::File::options().read(true).write(true).open(&rig.image).unwrap();
    for e in writable.extents() {
        image.write_all_at(&vec![8; e.bytes() as usize], e.lba * u64::from(writable.block_size())).unwrap();
    }
    assert_eq!(writable.commit(writable.extents(), Some(100_000)).unwrap(), 100_000);
    writable.release().unwrap();
    let mut bytes = vec![0; 100_000];
    other.read_at(0, &mut bytes).unwrap();
    assert!(all(&bytes, 8));
}

#[test]
fn the_holders_own_truncate_recalls_its_lease_and_its_blocks_wait_for_it() {
    let rig = rig(SMALL.lease_grace_ms, None);
    let free = rig.free();
    let layout = rig.file.map_blocks(0, SIZE, Access::Write).unwrap();
    rig.file.truncate(WINDOW).unwrap();
    rig.file.commit().unwrap();
    let recalls = layout.recalls().unwrap();
    assert_eq!(recalls.iter().map(|r| (r.offset, r.len)).collect::<Vec<_>>(), [(WINDOW, 3 * WINDOW)]);
    assert_eq!(rig.free(), free, "blocks under a layout were freed");
    let refused = layout.commit(layout.extents(), Some(SIZE)).unwrap_err();
    assert_eq!(refused.code(), Some(ErrorCode::StaleLease), "{refused}");
    assert_eq!(rig.file.size().unwrap(), WINDOW);
    layout.release_range(WINDOW, 3 * WINDOW).unwrap();
    assert_eq!(rig.free(), free + 3 * WINDOW);
    assert!(layout.recalls().unwrap().is_empty());
    // The rest is still leased.
    let kept = shm_api::client::Extent { blocks: WINDOW / 4096, ..layout.extents()[0] };
    assert_eq!(layout.commit(&[kept], None).unwrap(), WINDOW);
}

#[test]
fn leases_of_a_server_that_is_gone_are_stale() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, image) = (dir.path().join("s"), dir.path().join("disk.img"));
    let url = format!("emu:{}?size=64M&cmb=4M", image.display());
    let first = spawn("serve", &[socket.to_str().unwrap(), &url]);
    let client = connect(&socket);
    let file = client.open("/a", OpenMode::create()).unwrap();
    let layout = file.map_blocks(0, WINDOW, Access::Write).unwrap();
    drop(first);
    until("the death of the server shows", || layout.recalls().is_err());
    let _second = spawn("serve", &[socket.to_str().unwrap(), &url]);
    let mut again = None;
    until("the server is back", || {
        again = Client::connect(&socket).ok();
        again.is_some()
    });
    let again = again.unwrap();
    // The same number is out again, for somebody else.
    let other = again.open("/b", OpenMode::create()).unwrap().map_blocks(0, WINDOW, Access::Write).unwrap();
    assert_eq!(other.lease().id, layout.lease().id);
    let refused = again.share_layout(layout.lease()).unwrap_err();
    assert_eq!(refused.code(), Some(ErrorCode::StaleLease), "{refused}");
}
