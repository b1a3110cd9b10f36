//! The end of a lease whose holder neither answers nor can be fenced: the file moves off the blocks, and they wait.

use nvme_driver::disk::Disk;

use crate::data::{How, MAX_PIECES, Target, WRITE_ITEM};
use crate::error::FsError;
use crate::extents::{Piece, Run};
use crate::fs::Filesystem;
use crate::inode::Ino;
use crate::io::{BLOCK, BLOCK_LEN};
use crate::item::Item;
use crate::leases::{Access, Lease};

impl<D: Disk> Filesystem<D> {
    /// Ends a lease without its holders, who may go on to touch its blocks. Of a write lease the file's contents move to other
    /// blocks, so that nothing they write shows in the file any more; uncommitted writes of theirs may be among what moves.
    /// The blocks stay out of use until each holder has called [`release`](Self::release) or is known to be gone.
    pub fn sever(&mut self, lease: Lease) -> Result<(), FsError> {
        let entry =
            self.leases.get(lease).map_err(|reason| FsError::StaleLease { lease: lease.id, reason })?;
        if entry.access == Access::Write {
            let (ino, pieces) = (entry.ino, entry.pieces.clone());
            self.move_off(ino, &pieces)?;
        }
        tracing::warn!(
            lease = lease.id,
            "a lease was severed: its holder did not answer, its blocks wait for it"
        );
        self.leases.sever(lease.id);
        Ok(())
    }

    /// Moves what a file still has on these blocks to others.
    fn move_off(&mut self, ino: Ino, pieces: &[Piece]) -> Result<(), FsError> {
        let Some(map) = self.state.get(ino).and_then(|i| i.extents()) else { return Ok(()) };
        let mut moving = [Vec::new(), Vec::new()];
        for p in pieces {
            let same = |now: &Piece| now.run.disk + p.file == p.run.disk + now.file;
            for now in map.range(p.file, p.end()).filter(same) {
                let (file, len, old) = (now.file, u64::from(now.run.len), Some(now.run.disk));
                moving[usize::from(now.run.written)].push(Target { file, disk: 0, len, old, how: How::Map });
            }
        }
        self.io.writable()?;
        for (written, targets) in [false, true].into_iter().zip(moving) {
            let blocks = targets.iter().map(|t| t.len).sum();
            let goal = self.goal;
            let targets = self.fill(targets, blocks, goal)?;
            for batch in targets.chunks(MAX_PIECES) {
                self.begin(WRITE_ITEM)?;
                let mut maps = Vec::new();
                for t in batch {
                    if written {
                        self.copy_blocks(t)?;
                    }
                    let len = u32::try_from(t.len).unwrap_or(u32::MAX);
                    maps.push(Piece { file: t.file, run: Run { disk: t.disk, len, written } });
                }
                let (size, time) = (self.file(ino)?.size, self.now());
                self.log(&Item::Write { ino, size, time, maps, commits: Vec::new() })?;
            }
        }
        Ok(())
    }

    fn copy_blocks(&mut self, t: &Target) -> Result<(), FsError> {
        let Some(old) = t.old else { return Ok(()) };
        let mut block = vec![0; BLOCK_LEN];
        for i in 0..t.len {
            self.io.read((old + i) * BLOCK, &mut block)?;
            self.put_data(t.disk + i, &block, true)?;
        }
        Ok(())
    }
}
