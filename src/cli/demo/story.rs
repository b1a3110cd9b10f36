//! What happens in the demo, step by step. Every step compares bytes; the first difference ends it.

use std::fs::File as LocalFile;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cmbfs::extent_fs::{self, CheckOptions};
use cmbfs::{Client, DeviceUrl, FormatOptions};

use super::expected::Expected;
use super::latency::Summary;
use super::sample::{self, Checksum};
use super::scene::{Process, Scene};
use super::server::Moved;
use crate::cli::failure::{Failure, one_line};
use crate::cli::place::Place;
use crate::cli::store::Store;
use crate::cli::units::{Bytes, Took};
use crate::cli::{check, device, progress};

/// The file's path in the demo's filesystem.
pub(super) const PATH: &str = "/demo";
/// Size of the emulated drive's Controller Memory Buffer.
const CMB: u64 = 64 << 20;
pub(super) const READERS: u64 = 3;

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
    // Files that the kernel makes up as they are read say that they are empty.
    if meta.len() == 0 && (&file).read(&mut [0]).map_err(cannot)? > 0 {
        return Err(Failure::new(format!("{} does not say how long it is", path.display()))
            .hint("copy it to a plain file, and give that"));
    }
    Ok((file, meta.len()))
}

/// The file, its changed blocks, the filesystem's own, and the sample.
fn room_for(size: u64) -> u64 {
    size.saturating_mul(9) / 8 + (64 << 20)
}

/// Prints a line of the report.
pub(super) fn say(line: impl std::fmt::Display) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

/// Ends the demo if bytes differ.
pub(super) fn demand(wrong: u64, what: &str) -> Result<(), Failure> {
    if wrong == 0 { Ok(()) } else { Err(Failure::damaged(format!("{wrong} bytes differ: {what}"))) }
}

/// What stays the same from step to step.
pub(super) struct Story<'a> {
    scene: &'a Scene,
    path: PathBuf,
    pub(super) expected: Expected<'a>,
    pub(super) sha256: String,
    url: DeviceUrl,
    step: u32,
}

/// The processes, and this process's own connection.
pub(super) struct Stage {
    pub(super) server: Process,
    pub(super) readers: Vec<Process>,
    pub(super) client: Client,
    /// The drive's counters when the server had started.
    pub(super) start: Moved,
}

pub(super) struct Latencies {
    pub(super) before: Summary,
    pub(super) during: Summary,
    pub(super) after: Summary,
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
    pub(super) fn heading(&mut self, text: impl std::fmt::Display) -> Result<(), Failure> {
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

    pub(super) fn same_checksum(&self, got: &str, what: &str) -> Result<(), Failure> {
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
