//! What a uid may do with an inode: the usual nine bits, checked against what the kernel says about the client (P8).

use crate::transport::peer::Identity;

/// Read permission bit, as in the lowest three of a mode.
pub(crate) const READ: u32 = 4;
/// Write permission bit.
pub(crate) const WRITE: u32 = 2;
/// Execute permission bit; for a directory: passing through it.
pub(crate) const SEARCH: u32 = 1;

/// The part of an inode that decides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mode: u32,
}

/// Whether all of `wanted` is allowed. As in POSIX the first class that applies decides: an owner without permission does not
/// get it from the group. Uid 0 may everything.
pub(crate) fn allowed(who: &Identity, owner: Owner, wanted: u32) -> bool {
    if who.uid == 0 {
        return true;
    }
    let granted = if who.uid == owner.uid {
        owner.mode >> 6
    } else if who.gid == owner.gid || who.groups.contains(&owner.gid) {
        owner.mode >> 3
    } else {
        owner.mode
    };
    granted & wanted == wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(uid: u32, gid: u32, groups: &[u32]) -> Identity {
        Identity { pid: 1, uid, gid, groups: groups.to_vec() }
    }

    #[test]
    fn the_first_class_that_applies_decides() {
        let owner = Owner { uid: 10, gid: 20, mode: 0o046 };
        assert!(!allowed(&who(10, 20, &[]), owner, READ));
        assert!(allowed(&who(11, 20, &[]), owner, READ));
        assert!(!allowed(&who(11, 20, &[]), owner, WRITE));
        assert!(allowed(&who(11, 21, &[3, 20]), owner, READ));
        assert!(!allowed(&who(11, 21, &[3, 20]), owner, READ | WRITE));
        assert!(allowed(&who(11, 21, &[]), owner, READ | WRITE));
        assert!(!allowed(&who(11, 21, &[]), owner, SEARCH));
        assert!(allowed(&who(0, 0, &[]), owner, READ | WRITE | SEARCH));
    }
}
