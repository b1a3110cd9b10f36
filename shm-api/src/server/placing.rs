//! Where the windows of files may live: who has the say, and what happens when somebody changes it.

use std::collections::BTreeSet;

use extent_fs::{ROOT, SetAttr};
use p2p::windows::Scope;

use super::core::{Core, windows_error};
use super::jobs::Work;
use super::names::fs_error;
use super::permission::WRITE;
use super::raw::is_raw;
use super::session::Session;
use crate::protocol::messages as m;
use crate::protocol::{ErrorCode, WireError};
use crate::{PlacedBy, Placement};

impl Core {
    /// Where a file's windows may live, and who says so. Of the root directory: of all files without a choice of their own.
    pub(super) fn placement_of(&self, ino: u64) -> (Placement, PlacedBy) {
        let kept = |ino| self.backing.fs.stat(ino).map_or(0, |stat| stat.placement);
        // Raw memory is no file: nobody has kept anything for it.
        let (own, all) = if is_raw(ino) { (0, 0) } else { (kept(ino), kept(ROOT)) };
        Placement::decide(self.placement, if ino == ROOT { 0 } else { own }, all)
    }

    /// Attributes, with where the windows may live.
    pub(super) fn with_placement(&self, stat: m::StatReply) -> m::StatReply {
        let (placement, placed_by) = self.placement_of(stat.ino);
        m::StatReply { placement: placement.number(), placed_by: placed_by.number(), ..stat }
    }

    /// Keeps where a file's windows may live, or those of all files without a choice of their own (the root directory's), with the
    /// filesystem. Windows that may not stay where they are leave, as in a revocation.
    pub(super) fn set_placement(
        &mut self,
        session: &Session,
        request: &m::SetPlacementRequest,
        path: &str,
        now: u64,
    ) -> Result<Work, WireError> {
        let wanted = match request.placement {
            m::PLACEMENT_NONE => None,
            number => Some(
                Placement::from_number(number)
                    .ok_or_else(|| WireError::new(ErrorCode::Invalid, format!("placement {number}")))?,
            ),
        };
        let view = self.view(session);
        let ino = view.walk(path)?;
        if ino != ROOT {
            view.require_file(ino, WRITE, "place", path)?;
        } else if !self.is_server(session) {
            let text = format!("uid {} may not place everybody's files", session.identity.uid);
            return Err(WireError::new(ErrorCode::Denied, text));
        }
        let set = SetAttr { placement: Some(Placement::kept(wanted)), ..SetAttr::default() };
        let fs = &mut self.backing.fs;
        fs.set_attr(ino, &set).and_then(|()| fs.sync(ino)).map_err(|e| fs_error(&e))?;
        let mut leave = false;
        for object in self.placed_by(ino) {
            self.place_object(object).map_err(|e| windows_error(&e))?;
            leave |= self.placement_of(object).0 == Placement::Host;
        }
        let scope = match leave {
            // Of all files at once: who has asked for the CMB comes back to it.
            true if ino == ROOT => Scope::Everything,
            true => Scope::Object(ino),
            // An empty range: nothing has to leave.
            false => Scope::Range { object: ino, bytes: 0..0 },
        };
        let ticket = self.windows.revoke(&scope, &mut self.backing, now).map_err(|e| windows_error(&e))?;
        Ok(Work::Revoke { ticket, since: now })
    }

    /// Files with windows whose place hangs on this inode's choice.
    fn placed_by(&self, ino: u64) -> Vec<u64> {
        if ino != ROOT {
            return self.windows.has_object(ino).then_some(ino).into_iter().collect();
        }
        let with_windows = self.windows.iter().map(|(_, window)| window.object);
        let known = with_windows.chain(self.opened.keys().copied()).chain(self.closed.iter().copied());
        let files: BTreeSet<u64> = known.filter(|object| !is_raw(*object)).collect();
        files.into_iter().filter(|object| self.windows.has_object(*object)).collect()
    }
}
