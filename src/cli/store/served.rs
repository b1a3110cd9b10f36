//! Files through a server.

use cmbfs::{Client, ClientStat, OpenMode, Placement};

use super::{Entry, Files, PIECE, WriteJob};
use crate::cli::failure::Failure;
use crate::cli::server::Server;

/// How much is mapped at a time.
const MAPPED: u64 = 32 << 20;

pub(super) struct Served(Client);

impl Served {
    pub(super) fn connect(server: &Server) -> Result<Self, Failure> {
        Ok(Self(server.connect()?))
    }
}

fn entry(name: &str, stat: &ClientStat) -> Entry {
    Entry {
        name: name.to_owned(),
        kind: if stat.is_dir { "directory" } else { "file" },
        inode: stat.ino,
        size: stat.size,
        allocated: stat.allocated,
        mode: stat.mode,
        uid: stat.uid,
        gid: stat.gid,
        links: stat.links,
        modified_ns: stat.mtime_ns,
        changed_ns: stat.ctime_ns,
        placement: stat.placement,
        placed_by: stat.placed_by,
    }
}

impl Files for Served {
    fn stat(&mut self, path: &str) -> Result<Entry, Failure> {
        Ok(entry(path, &self.0.stat(path)?))
    }

    fn list(&mut self, path: &str) -> Result<Vec<Entry>, Failure> {
        let mut entries = Vec::new();
        for found in self.0.list(path)? {
            let full = format!("{}/{}", path.trim_end_matches('/'), found.name);
            // It may have been removed since it was listed.
            if let Ok(stat) = self.0.stat(&full) {
                entries.push(entry(&found.name, &stat));
            }
        }
        Ok(entries)
    }

    fn names(&mut self, path: &str) -> Result<Vec<String>, Failure> {
        Ok(self.0.list(path)?.into_iter().map(|entry| entry.name).collect())
    }

    fn read(
        &mut self,
        path: &str,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let file = self.0.open(path, OpenMode::read())?;
        let size = file.size()?;
        let mut buffer = vec![0; PIECE];
        let mut at = 0;
        while at < size {
            let mapped = file.map_read(at, MAPPED.min(size - at))?;
            let mut inside = 0;
            while inside < mapped.len() {
                let n = (mapped.len() - inside).min(PIECE as u64);
                let piece = &mut buffer[..n as usize];
                mapped.read(inside, piece)?;
                sink(piece)?;
                inside += n;
            }
            at += mapped.len();
        }
        Ok(())
    }

    fn write(&mut self, job: &mut WriteJob<'_>) -> Result<(), Failure> {
        let file = self.0.open(&job.temporary, OpenMode::create().temporary().mode(job.mode))?;
        let mut buffer = vec![0; PIECE];
        let mut at = 0;
        loop {
            let piece = job.piece(&mut buffer)?;
            if piece.is_empty() {
                break;
            }
            file.write_at(at, piece)?;
            at += piece.len() as u64;
            (job.progress)(piece.len() as u64);
        }
        // The bytes first, then the name: nobody ever sees the name without the bytes.
        file.commit()?;
        self.0.rename(&job.temporary, job.path)?;
        file.commit()?;
        Ok(())
    }

    fn unlink(&mut self, path: &str) -> Result<(), Failure> {
        Ok(self.0.unlink(path)?)
    }

    fn rmdir(&mut self, path: &str) -> Result<(), Failure> {
        Ok(self.0.rmdir(path)?)
    }

    fn mkdir(&mut self, path: &str) -> Result<(), Failure> {
        Ok(self.0.mkdir(path, 0o755)?)
    }

    fn rename(&mut self, from: &str, to: &str) -> Result<(), Failure> {
        Ok(self.0.rename(from, to)?)
    }

    fn place(&mut self, path: &str, wanted: Option<Placement>) -> Result<(), Failure> {
        self.0.set_placement(path, wanted)?;
        Ok(())
    }

    fn sync(&mut self) -> Result<(), Failure> {
        Ok(self.0.sync()?)
    }

    fn close(self: Box<Self>) -> Result<(), Failure> {
        Ok(())
    }
}
