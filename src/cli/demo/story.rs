//! What happens in the demo, step by step. Every step compares bytes; the first difference ends it.

use std::fs::File as LocalFile;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cmbfs::extent_fs::{self, CheckOptions};
use cmbfs::shm_api::protocol::ErrorCode;
use cmbfs::{Client, DeviceUrl, FormatOptions, OpenMode};

use super::expected::Expected;
use super::latency::Summary;
use super::reader::{Paths, WATCHED, Watched, Whole, differing};
use super::sample::{self, Checksum};
use super::scene::{Process, Scene};
use super::server::Moved;
use crate::cli::failure::{Failure, one_line};
use crate::cli::place::Place;
use crate::cli::store::Store;
use crate::cli::units::{Bytes, Took};
use crate::cli::{check, device, progress};

/// The file's path in the demo's filesystem.
const PATH: &str = "/demo";
/// Size of the emulated drive's Controller Memory Buffer.
const CMB: u64 = 64 << 20;
const READERS: u64 = 3;
/// How long the readers are watched before and after the revocations.
const CALM: Duration = Duration::from_millis(300);
/// Pause between two revocations: readers are to be seen while windows move, not only before and after.
const BETWEEN: Duration = Duration::from_millis(2);
/// What the write puts over the middle of the file, at most, and behind its end.
const OVERWRITE: u64 = 8192;
const APPENDED: &[u8] = b"committed through a CMB window\n";
/// Windows that the peer has mapped at one time: they stay in the CMB for that long.
const PEER_WINDOWS: usize = 32;

/// Runs the demo with `file`, or with one that it makes.
pub(super) fn tell(file: Option<&Path>) -> Result<(), Failure> {
    let started = Instant::now();
    let given = file.map(open_plain).transpose()?;
    let size = given.as_ref().map_or(sample::SAMPLE_BYTES, |g| g.1);
    let scene = Scene::new(room_for(size))?;
    let path = match file {
        Some(path) => path.to_owned(),
        None => {
            let path = scene.path().join("sample");
            sample::make(&path, size)?;
            path
        }
    };
    let original = match given {
        Some((original, _)) => original,
        None => LocalFile::open(&path)?,
    };
    let mut story = Story::begin(&scene, &path, &original, size, file.is_none())?;
    story.make_drive()?;
    let mut stage = story.open_stage()?;
    story.read_all(&mut stage)?;
    let peer_bytes = story.peer(&mut stage)?;
    let latencies = story.revoke(&mut stage)?;
    story.commit(&mut stage)?;
    story.kill_and_remount(stage, peer_bytes, &latencies)?;
    drop(story);
    drop(scene);
    say(format_args!("\nEvery byte identical. Done in {}; nothing is left behind.", Took(started.elapsed())))
}

/// The file, if it is one whose bytes and size stay put.
fn open_plain(path: &Path) -> Result<(LocalFile, u64), Failure> {
    let cannot = |e: std::io::Error| Failure::from(e).doing(format!("cannot read {}", path.display()));
    let file = LocalFile::open(path).map_err(cannot)?;
    let meta = file.metadata().map_err(cannot)?;
    if !meta.is_file() {
        return Err(Failure::new(format!("{} is not a plain file", path.display())));
    }
    Ok((file, meta.len()))
}

/// The file, its changed blocks, the filesystem's own, and the sample.
fn room_for(size: u64) -> u64 {
    size.saturating_mul(9) / 8 + (64 << 20)
}

fn say(line: impl std::fmt::Display) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

fn demand(wrong: u64, what: &str) -> Result<(), Failure> {
    if wrong == 0 { Ok(()) } else { Err(Failure::damaged(format!("{wrong} bytes differ: {what}"))) }
}

/// What stays the same from step to step.
struct Story<'a> {
    scene: &'a Scene,
    path: PathBuf,
    expected: Expected<'a>,
    sha256: String,
    url: DeviceUrl,
    step: u32,
}

/// The processes, and this process's own connection.
struct Stage {
    server: Process,
    readers: Vec<Process>,
    client: Client,
    /// The drive's counters when the server had started.
    start: Moved,
}

struct Latencies {
    before: Summary,
    during: Summary,
    after: Summary,
}

impl<'a> Story<'a> {
    fn begin(
        scene: &'a Scene,
        path: &Path,
        original: &'a LocalFile,
        size: u64,
        made: bool,
    ) -> Result<Self, Failure> {
        let expected = Expected { original, size, changes: Vec::new() };
        let sha256 = expected.checksum()?;
        let image = scene.path().join("disk.img");
        let drive = size.saturating_mul(5) / 4 + (256 << 20);
        let drive = drive.next_multiple_of(1 << 20);
        let url = format!("emu:{}?cmb={CMB}&size={drive}", image.display()).parse::<DeviceUrl>()?;
        let name = one_line(&path.display().to_string());
        let which = if made { "made for this run".to_owned() } else { name };
        say(format_args!("file     {which}, {} ({size} bytes)\nsha256   {sha256}", Bytes(size)))?;
        // The readers run in the same folder, but the name must not depend on that.
        let path = std::path::absolute(path)?;
        Ok(Self { scene, path, expected, sha256, url, step: 0 })
    }

    /// A step's heading; its details follow in indented lines.
    fn heading(&mut self, text: impl std::fmt::Display) -> Result<(), Failure> {
        self.step += 1;
        say(format_args!("\n{}. {text}", self.step))
    }

    fn make_drive(&mut self) -> Result<(), Failure> {
        self.heading("An emulated NVMe drive, a filesystem, your file in it")?;
        let device = device::open(&self.url)?;
        let drive = Bytes(device.disk()?.geometry().bytes());
        say(format_args!("   drive of {drive} (a sparse image) with a CMB of {}", Bytes(CMB)))?;
        match device.dma_fallback() {
            Some(why) => say(format_args!("   DMA memory: {}", one_line(why)))?,
            None => say("   DMA memory: 2 MiB huge pages")?,
        }
        extent_fs::format(&mut device.disk()?, &FormatOptions::default())?;
        drop(device);
        let size = self.expected.size;
        let start = Instant::now();
        let place = Place::Device(self.url.clone());
        let mut store = Store::open(&place)?;
        let bar = progress::bar("put", size);
        let mut from = LocalFile::open(&self.path)?;
        store.write_file(PATH, 0o644, &mut from, &mut |n| bar.inc(n))?;
        bar.finish_and_clear();
        store.close()?;
        let took = start.elapsed();
        let mut sum = Checksum::new();
        let mut store = Store::open(&place)?;
        store.read_file(PATH, &mut |bytes| {
            sum.add(bytes);
            Ok(())
        })?;
        store.close()?;
        self.same_checksum(&sum.hex(), "after put")?;
        say(format_args!("   put {} in {}, durable; reads back identical", Bytes(size), Took(took)))
    }

    fn same_checksum(&self, got: &str, what: &str) -> Result<(), Failure> {
        if got == self.sha256 {
            return Ok(());
        }
        Err(Failure::damaged(format!("{what} the sha256 is {got} instead of {}", self.sha256)))
    }

    fn open_stage(&mut self) -> Result<Stage, Failure> {
        self.heading(format_args!("A server process, and {READERS} client processes"))?;
        let socket = self.scene.path().join("socket");
        let (socket_text, me) = (socket.to_string_lossy().into_owned(), std::process::id().to_string());
        let url = self.url.to_string();
        let arguments = ["demo-part", "--parent", &me, "server", "--device", &url, "--socket", &socket_text];
        let mut server = self.scene.start("server", &arguments)?;
        server.answer::<String>()?;
        let start: Moved = server.ask("counters")?;
        let mut readers = Vec::new();
        for n in 0..READERS {
            let (seed, path) = (n.to_string(), self.path.as_os_str());
            let mut arguments: Vec<&std::ffi::OsStr> = Vec::new();
            for argument in ["demo-part", "--parent", &me, "reader", "--socket", &socket_text, "--path", PATH]
            {
                arguments.push(argument.as_ref());
            }
            arguments.extend(["--seed".as_ref(), seed.as_ref(), "--original".as_ref(), path]);
            readers.push(self.scene.start("reader", &arguments)?);
        }
        for reader in &mut readers {
            reader.answer::<String>()?;
        }
        let client = Client::connect(&socket)?;
        let ids: Vec<_> = readers.iter().map(|r| r.id().to_string()).collect();
        say(format_args!("   server: process {}; clients: processes {}", server.id(), ids.join(", ")))?;
        match client.cmb_access() {
            Ok(()) => {
                say("   they map the CMB; windows are found through control words that they map read-only")?;
            }
            Err(why) => say(format_args!("   without the CMB: {}", one_line(why)))?,
        }
        Ok(Stage { server, readers, client, start })
    }

    fn read_all(&mut self, stage: &mut Stage) -> Result<(), Failure> {
        self.heading("They read all of it at the same time")?;
        let before: Moved = stage.server.ask("counters")?;
        let start = Instant::now();
        for reader in &mut stage.readers {
            reader.tell("all")?;
        }
        let mut paths = Paths::default();
        for reader in &mut stage.readers {
            let whole: Whole = reader.answer()?;
            demand(whole.wrong, "what a client read")?;
            self.same_checksum(&whole.sha256, "read through windows")?;
            paths.cmb_bytes += whole.paths.cmb_bytes;
            paths.host_bytes += whole.paths.host_bytes;
        }
        let took = start.elapsed();
        let moved = stage.server.ask::<Moved>("counters")?.since(before);
        let all = Bytes(self.expected.size * READERS);
        say(format_args!(
            "   {all} in {}, identical: {} from the CMB, {} from the host cache",
            Took(took),
            Bytes(paths.cmb_bytes),
            Bytes(paths.host_bytes)
        ))?;
        say(format_args!(
            "   the drive moved {} into the CMB and {} into host memory",
            Bytes(moved.drive_to_cmb),
            Bytes(moved.drive_to_host)
        ))
    }

    /// Gives the number of bytes that the peer moved by DMA.
    fn peer(&mut self, stage: &mut Stage) -> Result<u64, Failure> {
        self.heading("Another device copies the file by DMA, straight from the CMB")?;
        if self.expected.size == 0 {
            say("   the file is empty: there is nothing to copy")?;
            return Ok(0);
        }
        let file = stage.client.open(PATH, OpenMode::read())?;
        let window = file.window_size();
        let before: Moved = stage.server.ask("counters")?;
        let pushed_out = stage.client.status()?.host_windows;
        let peer = stage.client.attach_peer(window)?;
        let (mut by_dma, mut bounced, mut why_bounced) = (0, 0, None);
        let (mut got, mut expected) = (vec![0; window as usize], vec![0; window as usize]);
        let mut sum = Checksum::new();
        let mut mapped = Vec::new();
        let mut last = None;
        for offset in (0..self.expected.size).step_by(window as usize) {
            let n = window.min(self.expected.size - offset);
            let piece = n as usize;
            if mapped.len() == PEER_WINDOWS {
                peer.revoke()?;
                mapped.clear();
            }
            let held = file.map_read(offset, n)?;
            match peer.map(&file, offset, false) {
                Ok(at) => {
                    // DMA in whole 8-byte words; what lies behind the end of the file reads as zeros.
                    by_dma += peer.dma_read(at.iova, 0, n.next_multiple_of(8))?;
                    last = Some(at.iova);
                }
                Err(e) if e.code() == Some(ErrorCode::Unsupported) => {
                    held.read(0, &mut got[..piece])?;
                    peer.local().write(0, &got[..piece])?;
                    bounced += n;
                    why_bounced = Some(e.to_string());
                }
                Err(e) => return Err(e.into()),
            }
            mapped.push(held);
            peer.local().read(0, &mut got[..piece])?;
            self.expected.read(offset, &mut expected[..piece])?;
            sum.add(&got[..piece]);
            demand(differing(&got[..piece], &expected[..piece]), "what the peer's DMA brought")?;
        }
        self.same_checksum(&sum.hex(), "copied by the peer")?;
        let moved = stage.server.ask::<Moved>("counters")?.since(before);
        say(format_args!(
            "   {} by DMA from the CMB, {} through host memory; identical",
            Bytes(by_dma),
            Bytes(bounced)
        ))?;
        if pushed_out > 0 {
            let pushed_out = Bytes(pushed_out * window);
            say(format_args!(
                "   the file is larger than the CMB: {pushed_out} came back into it from the host cache"
            ))?;
        }
        if let Some(why) = why_bounced {
            say(format_args!("   through host memory because: {}", one_line(&why)))?;
        }
        say(format_args!(
            "   for that the drive moved {} into the CMB and {} into host memory",
            Bytes(moved.drive_to_cmb),
            Bytes(moved.drive_to_host)
        ))?;
        let Some(iova) = last else { return Ok(by_dma) };
        peer.revoke()?;
        match peer.dma_read(iova, 0, 8) {
            Err(e) if e.code() == Some(ErrorCode::PeerFault) => {
                let why = one_line(&e.to_string());
                say(format_args!("   its mappings are revoked; its next DMA: {why}"))?;
                Ok(by_dma)
            }
            Err(e) => Err(e.into()),
            Ok(_) => Err(Failure::damaged("the revoked peer's DMA went through")),
        }
    }

    fn revoke(&mut self, stage: &mut Stage) -> Result<Latencies, Failure> {
        self.heading("The CMB is taken back while they read")?;
        for reader in &mut stage.readers {
            reader.tell("watch")?;
        }
        std::thread::sleep(CALM);
        let before = watched(&mut stage.readers, "watch")?;
        let file = stage.client.open(PATH, OpenMode::read())?;
        let (mut moved, mut freed, mut quarantined, mut times) = (0, 0, 0, Vec::new());
        let mut count = |report: cmbfs::RevokeReport| {
            moved += report.windows;
            freed += report.freed_pages;
            quarantined += report.quarantined_pages;
            times.push(report.nanoseconds);
        };
        // Window by window where they read, then whatever is left at once.
        let end = self.expected.size.min(WATCHED);
        let mapped = file.map_read(0, end)?;
        for offset in (0..end).step_by(file.window_size() as usize) {
            count(file.revoke_window(offset)?);
            std::thread::sleep(BETWEEN);
        }
        drop(mapped);
        count(stage.client.revoke(PATH)?);
        let during = watched(&mut stage.readers, "watch")?;
        std::thread::sleep(CALM);
        let after = watched(&mut stage.readers, "pause")?;
        times.sort_unstable();
        let median = times.get(times.len() / 2).copied().unwrap_or(0);
        let pages = |n: u64| Bytes(n * 4096);
        say(format_args!(
            "   {} revocations moved {moved} windows, median {}; {} of the CMB free again, {} quarantined",
            times.len(),
            Took(Duration::from_nanos(median)),
            pages(freed),
            pages(quarantined)
        ))?;
        say(format_args!("   meanwhile the readers read pages of 4 KiB; every byte compared, none wrong:"))?;
        say(format_args!("            {:>9} {:>10} {:>10}", "reads", "CMB", "host cache"))?;
        for (name, (latency, paths)) in [("before", &before), ("during", &during), ("after", &after)] {
            say(format_args!(
                "   {name:<8} {:>9} {:>10} {:>10}",
                latency.reads,
                Bytes(paths.cmb_bytes),
                Bytes(paths.host_bytes)
            ))?;
        }
        Ok(Latencies { before: before.0, during: during.0, after: after.0 })
    }

    fn commit(&mut self, stage: &mut Stage) -> Result<(), Failure> {
        self.heading("A client writes into windows and commits")?;
        let size = self.expected.size;
        let over = OVERWRITE.min(size - size / 2);
        let text: Vec<u8> = APPENDED.iter().copied().cycle().take(over as usize).collect();
        self.expected.changes = vec![(size / 2, text), (size, APPENDED.to_vec())];
        self.expected.size = size + APPENDED.len() as u64;
        self.sha256 = self.expected.checksum()?;
        let file = stage.client.open(PATH, OpenMode::write())?;
        for (at, bytes) in &self.expected.changes {
            file.write_at(*at, bytes)?;
        }
        let start = Instant::now();
        let report = file.commit()?;
        say(format_args!(
            "   {} over the middle and {} behind the end, durable in {}: {} went to the drive from the CMB, {} from the host cache",
            Bytes(over),
            Bytes(APPENDED.len() as u64),
            Took(start.elapsed()),
            Bytes(report.from_cmb),
            Bytes(report.from_host)
        ))
    }

    fn kill_and_remount(
        &mut self,
        mut stage: Stage,
        peer_bytes: u64,
        latencies: &Latencies,
    ) -> Result<(), Failure> {
        self.heading("The server is killed with SIGKILL, the drive mounted again")?;
        let moved = stage.server.ask::<Moved>("counters")?.since(stage.start);
        // The readers are still connected: they see it die.
        stage.server.kill()?;
        for reader in stage.readers {
            reader.finish()?;
        }
        drop(stage.client);
        let place = Place::Device(self.url.clone());
        let mut store = Store::open(&place)?;
        let mut sum = Checksum::new();
        store.read_file(PATH, &mut |bytes| {
            sum.add(bytes);
            Ok(())
        })?;
        store.close()?;
        self.same_checksum(&sum.hex(), "after the kill")?;
        say(format_args!("   the file, with what was committed, is identical: sha256 {}", self.sha256))?;
        let report = check::check(&self.url, &CheckOptions::default())?;
        if !report.is_clean() {
            return Err(Failure::damaged("check found damage after the kill"));
        }
        say("   check: sound")?;

        say("\nbytes by path, counted by the emulated devices")?;
        for (name, bytes) in [
            ("drive -> CMB", moved.drive_to_cmb),
            ("CMB -> drive", moved.cmb_to_drive),
            ("drive -> host memory", moved.drive_to_host),
            ("host memory -> drive", moved.host_to_drive),
            ("CMB -> peer", peer_bytes),
        ] {
            say(format_args!("   {name:<22} {:>10}", Bytes(bytes)))?;
        }
        say("\nread latency, 4 KiB, the slowest of the clients")?;
        say(format_args!("            {:>9} {:>9} {:>9}", "median", "99%", "max"))?;
        for (name, s) in
            [("before", latencies.before), ("during", latencies.during), ("after", latencies.after)]
        {
            let t = |ns| Took(Duration::from_nanos(ns));
            say(format_args!("   {name:<8} {:>9} {:>9} {:>9}", t(s.p50_ns), t(s.p99_ns), t(s.max_ns)))?;
        }
        Ok(())
    }
}

/// Tells every reader `line` and adds up what they saw until then.
fn watched(readers: &mut [Process], line: &str) -> Result<(Summary, Paths), Failure> {
    for reader in readers.iter_mut() {
        reader.tell(line)?;
    }
    let (mut summaries, mut paths) = (Vec::new(), Paths::default());
    for reader in readers {
        let seen: Watched = reader.answer()?;
        demand(seen.wrong, "what a client read while windows moved")?;
        summaries.push(seen.latency);
        paths.cmb_bytes += seen.paths.cmb_bytes;
        paths.host_bytes += seen.paths.host_bytes;
    }
    Ok((Summary::worst(&summaries), paths))
}
