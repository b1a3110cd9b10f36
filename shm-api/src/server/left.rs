//! Clients whose connection is gone and whose process lives: what they had mapped they may still touch, so it stays theirs until the
//! process ends. What nobody will ever ask for again does not stay: their peers' memory, and the bytes of files that have no name.

use p2p::windows::Scope;

use super::core::Core;
use super::jobs::Job;
use super::session::{OpenFile, Session};

impl Core {
    /// The client's connection is gone but its process lives. True: it still had windows or leases, and is to be watched until it dies.
    pub(crate) fn client_left(&mut self, session: &mut Session, now: u64) -> bool {
        let Some(client) = session.client else { return false };
        if session.maps.is_empty() && self.leases.of(session.id).is_empty() {
            // It gave everything back before it left.
            self.client_died(session, now);
            return false;
        }
        match self.windows.revoke(&Scope::Client(client), &mut self.backing, now) {
            Ok(_) => tracing::info!(id = session.id, "client left with windows mapped: they are taken back"),
            Err(e) => tracing::warn!(id = session.id, "client left with windows mapped: {e}"),
        }
        for (_, peer) in session.peers.drain() {
            self.detach_peer(peer, now);
        }
        for (handle, path) in std::mem::take(&mut session.temporary) {
            if let Some(file) = session.files.get(&handle) {
                self.drop_temporary(session, file.ino, &path);
            }
        }
        session.has_left = true;
        let inodes: Vec<u64> = session.files.values().map(|file| file.ino).collect();
        for ino in &inodes {
            if let Some(opened) = self.opened.get_mut(ino) {
                opened.left += 1;
            }
        }
        inodes.iter().for_each(|ino| self.empty_if_deserted(*ino, now));
        true
    }

    /// The files of a session are about to be closed: if it had left, they are no longer those of one that has.
    pub(super) fn came_back(&mut self, session: &Session, files: &[OpenFile]) {
        for file in files.iter().filter(|_| session.has_left) {
            if let Some(opened) = self.opened.get_mut(&file.ino) {
                opened.left = opened.left.saturating_sub(1);
            }
        }
    }

    /// Cuts a file to nothing that has no name, and that only clients have open who have left. Its number stays taken as long as they may touch
    /// what they had mapped of it: another file by that number would have their mappings.
    pub(super) fn empty_if_deserted(&mut self, ino: u64, now: u64) {
        let deserted = self.opened.get(&ino).is_some_and(|o| o.count > 0 && o.left == o.count);
        if !deserted || !self.backing.fs.stat(ino).is_ok_and(|s| s.nlink == 0 && s.size > 0) {
            return;
        }
        match self.truncate(ino, 0, now) {
            Ok(Some(work)) => self.jobs.push(Job::unasked(work)),
            Ok(None) => {}
            Err(e) => tracing::warn!("inode {ino}, which nobody can reach any more, keeps its bytes: {e}"),
        }
    }
}
