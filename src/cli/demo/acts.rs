//! What happens while the server runs: reading, a peer's DMA, revocation, a commit.

use std::time::{Duration, Instant};

use cmbfs::OpenMode;
use cmbfs::shm_api::protocol::ErrorCode;

use super::latency::Summary;
use super::reader::{Paths, WATCHED, Watched, Whole, differing};
use super::sample::Checksum;
use super::scene::Process;
use super::server::Moved;
use super::story::{Latencies, PATH, READERS, Stage, Story, demand, say};
use crate::cli::failure::{Failure, one_line};
use crate::cli::units::{Bytes, Count, Took};

/// How long the readers are watched before and after the revocations.
const CALM: Duration = Duration::from_millis(300);
/// Pause between two revocations: readers are to be seen while windows move, not only before and after.
const BETWEEN: Duration = Duration::from_millis(2);
/// What the write puts over the middle of the file, at most, and behind its end.
const OVERWRITE: u64 = 8192;
const APPENDED: &[u8] = b"committed through a CMB window\n";
/// Windows that the peer has mapped at one time: they stay in the CMB for that long.
const PEER_WINDOWS: usize = 32;

impl Story<'_> {
    pub(super) fn read_all(&mut self, stage: &mut Stage) -> Result<(), Failure> {
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
    pub(super) fn peer(&mut self, stage: &mut Stage) -> Result<u64, Failure> {
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

    pub(super) fn revoke(&mut self, stage: &mut Stage) -> Result<Latencies, Failure> {
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
            "   {} moved {}, median {}; {} of the CMB freed, {} quarantined",
            Count(times.len() as u64, "revocation"),
            Count(moved, "window"),
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

    pub(super) fn commit(&mut self, stage: &mut Stage) -> Result<(), Failure> {
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
