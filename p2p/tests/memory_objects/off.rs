//! Memory whose device was off for a while.

use std::sync::Arc;

use nvme_driver::mem::Mapping;
use p2p::backing::{Backing, BackingError};
use p2p::counters::Reason;
use p2p::layout::Home;
use p2p::region::RegionKind;
use p2p::windows::{Ensured, Scope, Want, WindowsError};

use crate::common::{Drive, W, config, pattern};
use crate::world::{AT, N, OBJECT, want, world, world_with};

/// The device was off for a while, and took no stores. What was brought there from the host cache is brought again, by the next commit or
/// a move; what was stored there directly is not known to have arrived, which is a loss.
#[test]
fn what_was_brought_to_memory_that_was_off_is_brought_again() {
    let mut w = world();
    w.ensure_all();
    w.rig.revoke(&Scope::Object(OBJECT));
    for n in 0..3 {
        w.write(n, 4096, b"cached");
    }
    w.commit().unwrap();
    // As if the stores of that commit had gone nowhere.
    w.memory.write(AT, &(0..N * W).map(|i| pattern(OBJECT, i)).collect::<Vec<_>>()).unwrap();
    w.promote(0);
    assert_eq!(w.home(0), Home::Cmb);
    w.rig.windows.memory_interrupted(OBJECT);
    assert_eq!(w.rig.windows.losses(OBJECT, &mut w.rig.drive, w.rig.now).events, 1);
    w.promote(1);
    assert_eq!((w.home(1), w.raw(1, 4096, 6)), (Home::Cmb, b"cached".to_vec()), "by the move");
    assert_eq!(w.raw(2, 4096, 6), want(2, 4096, 6));
    let done = w.commit().unwrap();
    assert_eq!((done.host_bytes as usize, w.raw(2, 4096, 6)), (2 * W, b"cached".to_vec()), "by the commit");
    assert_eq!(w.commit().unwrap().host_bytes, 0, "once");
    // Any other object has no such memory.
    w.rig.windows.memory_interrupted(OBJECT + 1);
    assert!(!w.rig.windows.memory_is_gone(OBJECT));
}

/// The drive whose device memory reads as ones while it is off.
struct Reviving<'a> {
    drive: &'a mut Drive,
    memory: Arc<Mapping>,
    works: bool,
    asked: u32,
}

impl Backing for Reviving<'_> {
    fn read_to_cmb(&mut self, o: u64, f: u64, at: usize, len: usize) -> Result<(), BackingError> {
        self.drive.read_to_cmb(o, f, at, len)
    }
    fn read_to_host(&mut self, o: u64, f: u64, into: &mut [u8]) -> Result<(), BackingError> {
        self.drive.read_to_host(o, f, into)
    }
    fn write_from_cmb(&mut self, o: u64, f: u64, at: usize, n: usize) -> Result<(), BackingError> {
        self.drive.write_from_cmb(o, f, at, n)
    }
    fn write_from_host(&mut self, o: u64, f: u64, from: &[u8]) -> Result<(), BackingError> {
        self.drive.write_from_host(o, f, from)
    }
    fn revive_memory(&mut self, object: u64) {
        assert_eq!(object, OBJECT);
        self.asked += 1;
        if self.works {
            self.memory.write(AT + N * W, &[0; 8]).unwrap();
        }
    }
}

#[test]
fn memory_that_is_only_off_is_brought_back_and_not_given_up() {
    let canary = (AT + N * W) as u64;
    for by_a_commit in [false, true] {
        let mut w = world_with(0, config(), RegionKind::Device { canary });
        w.ensure_all();
        w.rig.revoke(&Scope::Window(w.index(1)));
        w.write(1, 0, b"cached");
        w.memory.write(canary as usize, &[0xff; 8]).unwrap();
        let memory = Arc::clone(&w.memory);
        let mut drive = Reviving { drive: &mut w.rig.drive, memory, works: true, asked: 0 };
        if by_a_commit {
            w.rig.windows.commit(OBJECT, &(0..(N * W) as u64), &mut drive).unwrap();
        } else {
            let index = w.holds[0].handle.index;
            let ensured = w.rig.windows.ensure(index, Want::Auto, &mut drive, 0).unwrap();
            assert_eq!(ensured, Ensured::Ready(Home::Cmb, Reason::Policy));
        }
        assert_eq!(drive.asked, 1);
        assert_eq!(w.read(0, 8, 8).1, want(0, 8, 8));
        w.commit().unwrap();
        assert_eq!(w.raw(1, 0, 6), b"cached");
        // One that does not come back is gone.
        w.memory.write(canary as usize, &[0xff; 8]).unwrap();
        let memory = Arc::clone(&w.memory);
        let mut drive = Reviving { drive: &mut w.rig.drive, memory, works: false, asked: 0 };
        let index = w.holds[0].handle.index;
        let gone = w.rig.windows.ensure(index, Want::Auto, &mut drive, 0);
        assert!(matches!(gone, Err(WindowsError::MemoryGone(OBJECT))), "{gone:?}");
        assert_eq!(drive.asked, 1);
        assert!(w.rig.windows.memory_is_gone(OBJECT));
    }
}
