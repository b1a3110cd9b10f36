//! Which windows have one.

use nvme_driver::mem::Mapping;
use p2p::layout::Home;
use p2p::peer::EmulatedEngine;
use p2p::reader::Outcome;
use p2p::region::RegionKind;
use p2p::windows::{DeviceMemory, ObjectOptions, PeerPath, Placement, Want};
use std::sync::Arc;

use crate::common::{Rig, W, config};
use crate::world::{PAGES, assert_bytes, assert_spare, promote, revoke, rig};

#[test]
fn a_window_that_only_peers_use_has_none() {
    let mut rig = Rig::new(8 * W, config());
    rig.object(7, W, W);
    let c = rig.client();
    let hold = rig.hold(&c, 7, 0, false);
    rig.ensure_want(&hold, Want::Host);
    rig.windows.release(c.id, hold.handle.index).unwrap();
    let engine = EmulatedEngine::new("dma", W).unwrap();
    let peer = rig.windows.register_peer(Box::new(engine));
    let path = rig.windows.map_peer(peer, hold.handle.index, false, &mut rig.drive, 0).unwrap();
    assert!(matches!(path, PeerPath::Direct(_)), "{path:?}");
    assert_spare(&rig, &hold, false);
    assert_eq!(rig.windows.host_bytes().0, 0);
}

#[test]
fn nor_has_one_that_may_not_use_the_host_cache() {
    let (mut rig, _c, hold) = rig();
    let options = ObjectOptions { window_size: W, placement: Placement::CmbOnly };
    rig.windows.add_object(7, options).unwrap();
    assert_spare(&rig, &hold, false);
    assert_eq!(rig.windows.host_bytes().0, 0);
}

/// It may store in its memory by itself, and tells nobody.
#[test]
fn a_window_of_a_devices_own_memory_has_none() {
    let mut rig = Rig::new(8 * W, config());
    let memory = Mapping::memfd("pmr", W).unwrap();
    let options = ObjectOptions { window_size: W, ..ObjectOptions::default() };
    let own = DeviceMemory {
        memory: Arc::clone(&memory),
        bus_address: 0,
        offset: 0,
        len: W,
        kind: RegionKind::Ordinary,
    };
    rig.windows.add_memory(9, own, options).unwrap();
    let mut c = rig.client();
    rig.map_host(&mut c, 9, W);
    let hold = rig.hold(&c, 9, 0, false);
    rig.ensure_want(&hold, Want::Host);
    promote(&mut rig, &hold);
    assert_spare(&rig, &hold, false);
    memory.write(4096, b"by the device").unwrap();
    assert_eq!(revoke(&mut rig, &hold), PAGES);
    assert_eq!(c.read(hold.handle, 4096, 13), (Outcome::Copied(Home::Host), b"by the device".to_vec()));
}

#[test]
fn raw_memory_has_spares_too() {
    let mut rig = Rig::new(8 * W, config());
    let options = ObjectOptions { window_size: W, ..ObjectOptions::default() };
    rig.windows.add_raw(9, W as u64, options).unwrap();
    let mut c = rig.client();
    rig.map_host(&mut c, 9, W);
    let hold = rig.hold(&c, 9, 0, true);
    rig.ensure_want(&hold, Want::Host);
    c.write(&hold, 0, b"raw");
    promote(&mut rig, &hold);
    assert_spare(&rig, &hold, true);
    c.write(&hold, 4096, b"memory");
    assert_eq!(revoke(&mut rig, &hold), 1);
    let mut want = vec![0; W];
    want[..3].copy_from_slice(b"raw");
    want[4096..4102].copy_from_slice(b"memory");
    assert_bytes(&c, &hold, Home::Host, &want);
}
