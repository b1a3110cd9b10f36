//! Devices with a runtime of their own as peers: the worked example, and what is tried and said where a kind of memory is refused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
#![allow(clippy::print_stdout, dead_code, reason = "the example prints, and only part of it is used here")]
use std::sync::Arc;

use nvme_driver::mem::Mapping;
use nvme_driver::pci::DmaAccess;
use p2p::peer::{CmbExporter, ExternalPeer, Mapper, SharedMemoryExporter};

#[path = "../examples/external_device.rs"]
mod example;
use example::Accelerator;

#[test]
fn the_worked_example_works() {
    example::main().unwrap();
}

fn map(device: &Accelerator, exporter: Option<Box<dyn p2p::peer::Exporter>>) -> Result<u64, String> {
    let memory = Mapping::memfd("cmb", 1 << 20).unwrap();
    memory.write(4096, b"here").unwrap();
    let mut peer = ExternalPeer::new(device.clone(), exporter);
    let iova = peer.map(&memory, 0, 4096, 8192, DmaAccess::Read).map_err(|e| e.to_string())?;
    // It is the right part of the right memory, for reading only.
    let engine = device.engine();
    engine.copy(iova, 0, 8192, false).unwrap();
    let mut got = [0; 4];
    engine.local().read(0, &mut got).unwrap();
    assert_eq!(&got, b"here");
    assert!(engine.copy(iova, 0, 8, true).unwrap_err().to_string().contains("may not write"));
    assert!(peer.is_mapped(iova, 8192));
    peer.unmap(iova, 8192).unwrap();
    assert!(!peer.is_mapped(iova, 8192));
    assert!(engine.copy(iova, 0, 8, false).is_err());
    assert_eq!(Arc::strong_count(&memory), 1, "the device keeps memory that it gave back");
    Ok(iova)
}

#[test]
fn the_right_bytes_are_registered_either_way_and_let_go() {
    map(&Accelerator::new(true, false).unwrap(), Some(Box::new(SharedMemoryExporter))).unwrap();
    map(&Accelerator::new(false, true).unwrap(), None).unwrap();
    // What cannot be exported is registered by its address.
    map(&Accelerator::new(true, true).unwrap(), None).unwrap();
}

#[test]
fn every_way_that_was_refused_is_named() {
    let why = map(&Accelerator::new(true, false).unwrap(), None).unwrap_err();
    assert!(why.contains("as a dma-buf: nothing exports the memory"), "{why}");
    let why = map(&Accelerator::new(false, false).unwrap(), None).unwrap_err();
    assert!(why.contains("takes no memory"), "{why}");
    // A drive whose transport exports nothing, and memory that is not its own.
    let emulated = nvme_driver::emu::EmulatedController::new(&nvme_driver::emu::Config {
        cmb_size: 1 << 20,
        ..Default::default()
    });
    let clock = Arc::new(nvme_driver::clock::ManualClock::new());
    let controller =
        nvme_driver::controller::Controller::new(emulated.unwrap().function(), Default::default(), clock)
            .unwrap();
    let own = Arc::clone(&controller.cmb().cmb().unwrap().data.memory);
    let exporter = CmbExporter(controller);
    let why =
        map(&Accelerator::new(true, false).unwrap(), Some(Box::new(CmbExporter(Arc::clone(&exporter.0)))));
    assert!(why.unwrap_err().contains("not the CMB of"));
    let mut peer = ExternalPeer::new(Accelerator::new(true, false).unwrap(), Some(Box::new(exporter)));
    let why = peer.map(&own, 0, 0, 4096, DmaAccess::Read).unwrap_err().to_string();
    assert!(why.contains("does not support exporting"), "{why}");
}
