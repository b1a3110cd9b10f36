//! A file from a filesystem on one device to one on another, block by block, without going through the files' contents here.

use cmbfs::extent_fs::{Access, BLOCK, BlockState, Extent};
use cmbfs::nvme_driver::emu::Counters;
use cmbfs::p2p::counters::{Path, Reason};
use cmbfs::p2p::drive_copy::{DriveCopy, Obstacle};
use cmbfs::{Device, DeviceUrl, Disk};
use serde::Serialize;

use super::direct::Direct;
use super::{Files, leftover};
use crate::cli::device::{self, AnyDisk};
use crate::cli::failure::Failure;

/// Bytes of the destination that are mapped, filled and committed at a time.
const STRETCH: u64 = 64 << 20;

/// One file on one device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    pub(crate) device: &'a DeviceUrl,
    pub(crate) path: &'a str,
}

/// How the bytes went.
#[derive(Debug, Serialize)]
pub(crate) struct Route {
    /// The path of most of them: "peer to peer" or "bounce".
    pub(crate) path: String,
    /// Bytes that went from the source's CMB into the destination.
    pub(crate) peer_bytes: u64,
    /// Bytes that went through host memory.
    pub(crate) bounce_bytes: u64,
    /// Why not all of them went peer to peer.
    pub(crate) reason: Option<String>,
    /// The same in words.
    pub(crate) why: Option<String>,
    /// What the drives themselves counted, if both are emulated here.
    pub(crate) counted: Option<Counted>,
}

/// Bytes of the file as two emulated drives moved them.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Counted {
    /// By the source into its CMB.
    pub(crate) source_to_cmb: u64,
    /// By the destination out of that CMB.
    pub(crate) cmb_to_destination: u64,
    /// By either, into or out of host memory.
    pub(crate) through_host: u64,
}

/// What there was to copy, and how it went.
#[derive(Debug)]
pub(crate) struct Copied {
    /// Where it went.
    pub(crate) path: String,
    pub(crate) size: u64,
    /// Bytes that there were blocks for: holes stay holes.
    pub(crate) bytes: u64,
    pub(crate) route: Route,
}

/// The two ends of a copy.
struct Ends {
    from: (Device, Direct, AnyDisk),
    to: (Device, Direct, AnyDisk),
}

fn end(url: &DeviceUrl) -> Result<(Device, Direct, AnyDisk), Failure> {
    let device = device::open_existing(url)?;
    // A queue of its own for the data, beside the filesystem's.
    let (fs, disk) = (device::mount(&device)?, device.disk()?);
    Ok((device, Direct::on(fs), disk))
}

/// Copies a file. `way` makes the way between the two drives, knowing a block of the destination that may be overwritten; `begun` is
/// told the size, and `progress` what has been moved.
pub(crate) fn copy(
    from: Place<'_>,
    to: Place<'_>,
    way: impl FnOnce(&mut dyn Disk, &mut dyn Disk, u64) -> DriveCopy,
    begun: &mut dyn FnMut(u64),
    progress: &mut dyn FnMut(u64),
) -> Result<Copied, Failure> {
    let named = |what: DeviceUrl| move |f: Failure| f.doing(what);
    let mut ends = Ends {
        from: end(from.device).map_err(named(from.device.clone()))?,
        to: end(to.device).map_err(named(to.device.clone()))?,
    };
    let source = ends.from.1.stat(from.path)?;
    if source.is_directory() {
        return Err(Failure::new(format!("{} is a directory", from.path)).hint("copy copies one file"));
    }
    let target = super::destination(&mut ends.to.1, to.path, super::last_part(from.path).ok())?;
    super::no_directory(&mut ends.to.1, &target)?;
    leftover::remove(&mut ends.to.1, &target);
    begun(source.size);
    let temporary = leftover::temporary_name(&target);
    let result =
        ends.fill(source.inode, source.size, source.mode, &temporary, way, progress).and_then(|done| {
            let fs = ends.to.1.fs();
            let inode = fs.lookup(&temporary)?;
            fs.rename(&temporary, &target)?;
            // One commit for bytes and name: a cut before it leaves neither.
            fs.sync(inode)?;
            Ok(done)
        });
    if result.is_err() {
        // Whatever stopped the copy may stop this too; what counts is said already.
        let _ = ends.to.1.unlink(&temporary).and_then(|()| ends.to.1.sync());
    }
    let (size, bytes, route) = result?;
    Box::new(ends.from.1).close()?;
    Box::new(ends.to.1).close()?;
    Ok(Copied { path: target, size, bytes, route })
}

impl Ends {
    /// Makes `temporary` hold what the source's inode holds: its size, the bytes that there were blocks for, and how they went.
    fn fill(
        &mut self,
        inode: u64,
        size: u64,
        mode: u32,
        temporary: &str,
        way: impl FnOnce(&mut dyn Disk, &mut dyn Disk, u64) -> DriveCopy,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(u64, u64, Route), Failure> {
        let target = self.to.1.fs().create(temporary, &Direct::new_inode(mode))?;
        self.to.1.fs().truncate(target, size)?;
        let extents = if size == 0 { Vec::new() } else { self.from.1.fs().query_blocks(inode, 0, size)? };
        let source_block = block_size(&self.from.2);
        let written = extents.iter().filter(|e| e.state == BlockState::Written);
        let (mut way, mut made) = (Some(way), None);
        let mut counted = Counted::default();
        let mut bytes = 0;
        for stretch in written.flat_map(|e| stretches(e, source_block)) {
            let layout =
                self.to.1.fs().map_blocks(target, stretch.file_offset, stretch.bytes(), Access::Write)?;
            let mut done = 0;
            for part in &layout.extents {
                let copy = match (&mut made, way.take()) {
                    (Some(copy), _) => copy,
                    (none, Some(way)) => none.insert(way(&mut self.from.2, &mut self.to.2, part.lba)),
                    // One of the two is always there.
                    (None, None) => return Err(Failure::new("no way between the drives")),
                };
                let at = stretch.lba + done / source_block;
                let before = self.counters();
                let moved =
                    copy.copy((&mut self.from.2, at), (&mut self.to.2, part.lba), part.bytes(), progress);
                counted.add(before, self.counters());
                moved?;
                done += part.bytes();
            }
            let fs = self.to.1.fs();
            fs.commit_blocks(layout.lease, &layout.extents, None)?;
            fs.release(layout.lease)?;
            bytes += done;
        }
        let both = self.counters().is_some();
        let way = made
            .unwrap_or_else(|| DriveCopy::bounce(Obstacle::new(Reason::Asked, "there was nothing to copy")));
        Ok((size, bytes, route(&way, both.then_some(counted))))
    }

    fn counters(&self) -> Option<(Counters, Counters)> {
        Some((self.from.0.emulated()?.counters(), self.to.0.emulated()?.counters()))
    }
}

impl Counted {
    fn add(&mut self, before: Option<(Counters, Counters)>, after: Option<(Counters, Counters)>) {
        let (Some((a, b)), Some((a2, b2))) = (before, after) else { return };
        self.source_to_cmb += a2.drive_to_cmb - a.drive_to_cmb;
        self.cmb_to_destination += b2.peer_to_drive - b.peer_to_drive;
        for (now, before) in [(a2, a), (b2, b)] {
            self.through_host += now.drive_to_host - before.drive_to_host;
            self.through_host += now.host_to_drive - before.host_to_drive;
        }
    }
}

fn block_size(disk: &AnyDisk) -> u64 {
    u64::from(disk.geometry().block_size)
}

/// An extent of the source in stretches, so that leases and commits stay small.
fn stretches(extent: &Extent, block_size: u64) -> impl Iterator<Item = Extent> + use<> {
    let extent = *extent;
    (0..extent.bytes()).step_by(STRETCH as usize).map(move |at| Extent {
        file_offset: extent.file_offset + at,
        lba: extent.lba + at / block_size,
        blocks: (extent.bytes() - at).min(STRETCH) / BLOCK,
        state: extent.state,
    })
}

fn route(way: &DriveCopy, counted: Option<Counted>) -> Route {
    let (peer, bounce) =
        (way.counters().path(Path::PeerToPeer).bytes, way.counters().path(Path::Bounce).bytes);
    let why = way.obstacle();
    Route {
        path: if peer > bounce { Path::PeerToPeer } else { Path::Bounce }.to_string(),
        peer_bytes: peer,
        bounce_bytes: bounce,
        reason: why.map(|o| o.reason.to_string()),
        why: why.map(|o| o.text.clone()),
        counted,
    }
}
