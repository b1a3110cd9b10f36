//! Mapped device memory whose device is gone. A file that is cut short raises the same SIGBUS.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed call fails the test")]
#![expect(unsafe_code, reason = "a signal handler that was there before")]
mod wrap;

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nvme_driver::clock::ManualClock;
use nvme_driver::controller::{Controller, ControllerError, ControllerOptions};
use nvme_driver::emu::{Config, EmulatedController};
use nvme_driver::mem::{Access, Mapping, PAGE};
use nvme_driver::pci::PciError;
use wrap::{Hands, Wrapped};

/// Memory of a device, and the file that stands for it.
fn device(pages: usize) -> (File, Arc<Mapping>) {
    let file = tempfile::tempfile().unwrap();
    file.set_len((pages * PAGE) as u64).unwrap();
    let memory = Mapping::of_device(file.try_clone().unwrap().into(), 0, pages * PAGE).unwrap();
    memory.write(0, &vec![7; pages * PAGE]).unwrap();
    (file, memory)
}

fn read(memory: &Mapping, offset: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read(offset, &mut bytes).unwrap();
    bytes
}

#[test]
fn it_reads_as_ones_and_says_so() {
    let (file, memory) = device(8);
    let (_other_file, other) = device(1);
    file.set_len(PAGE as u64).unwrap();
    assert_eq!(read(&memory, 0, PAGE), [7; PAGE]);
    assert!(!memory.is_lost());
    // Half in the page that is there, half in one that is not.
    let across = read(&memory, PAGE - 64, 128);
    assert_eq!(across, [[7; 64], [0xff; 64]].concat());
    assert!(memory.is_lost());
    memory.write(3 * PAGE - 100, &[1; 200]).unwrap();
    memory.u32_at(5 * PAGE).unwrap().store(9, Ordering::Release);
    assert_eq!(memory.u64_at(7 * PAGE + 8).unwrap().load(Ordering::Acquire), u64::MAX);
    assert_eq!(read(&memory, 6 * PAGE, PAGE), [0xff; PAGE]);
    assert!(!other.is_lost());
    assert_eq!(read(&other, 0, PAGE), [7; PAGE]);
    drop(memory);
    let (_file, again) = device(8);
    assert!(!again.is_lost());
}

#[test]
fn many_devices_may_go_at_once() {
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for round in 0..200 {
                    let (file, memory) = device(4);
                    let (_file, stays) = device(2);
                    file.set_len((round % 4 * PAGE) as u64).unwrap();
                    assert_eq!(read(&memory, 3 * PAGE, PAGE), [0xff; PAGE]);
                    assert!(memory.is_lost() && !stays.is_lost());
                    assert_eq!(read(&stays, PAGE, PAGE), [7; PAGE]);
                }
            });
        }
    });
}

/// Runs the test `name` of this binary in a process of its own, where [`is_child`] is true.
fn in_child(name: &str) -> ExitStatus {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", name]).env("CMBFS_TEST_CHILD", "1");
    child.output().unwrap().status
}

fn is_child() -> bool {
    std::env::var_os("CMBFS_TEST_CHILD").is_some()
}

/// An access to a page that is gone, and that nobody watches: of a file, as any program may have it.
fn stray_access() {
    let _ = rustix::process::setrlimit(
        rustix::process::Resource::Core,
        rustix::process::Rlimit { current: Some(0), maximum: Some(0) },
    );
    let file = tempfile::tempfile().unwrap();
    file.set_len(PAGE as u64).unwrap();
    let plain = Mapping::from_fd(file.try_clone().unwrap().into(), 0, PAGE, Access::ReadWrite).unwrap();
    file.set_len(0).unwrap();
    read(&plain, 0, 8);
}

#[test]
fn another_sigbus_ends_the_process_as_before() {
    if is_child() {
        let (_file, _watched) = device(4);
        stray_access();
        return;
    }
    let status = in_child("another_sigbus_ends_the_process_as_before");
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
}

extern "C" fn leave(_: libc::c_int) {
    // SAFETY: ends the process, and nothing else.
    unsafe { libc::_exit(42) }
}

#[test]
fn an_earlier_handler_gets_what_is_not_ours() {
    if is_child() {
        // SAFETY: `leave` does only what a handler may.
        unsafe { libc::signal(libc::SIGBUS, leave as *const () as usize) };
        let (file, watched) = device(4);
        file.set_len(0).unwrap();
        assert_eq!(read(&watched, 0, 8), [0xff; 8]);
        stray_access();
        return;
    }
    assert_eq!(in_child("an_earlier_handler_gets_what_is_not_ours").code(), Some(42));
}

/// A CMB in a BAR that goes away.
struct Cmb(Arc<Mapping>);

impl Hands for Cmb {
    fn map_bar(&self, bar: u8) -> Option<Arc<Mapping>> {
        (bar == 2).then(|| Arc::clone(&self.0))
    }
}

#[test]
fn a_controller_whose_memory_is_gone_is_removed() {
    let (file, cmb) = device(256);
    let emulated = EmulatedController::new(&Config { cmb_size: 1 << 20, ..Config::default() }).unwrap();
    let function = Arc::new(Wrapped { inner: emulated.function(), hands: Cmb(cmb) });
    let clock = Arc::new(ManualClock::new());
    let controller = Controller::new(function, ControllerOptions::default(), clock).unwrap();
    let memory = Arc::clone(&controller.cmb().cmb().unwrap().data.memory);
    controller.check().unwrap();
    file.set_len(0).unwrap();
    controller.check().unwrap();
    assert_eq!(read(&memory, 4096, 8), [0xff; 8]);
    let removed = |e: &ControllerError| matches!(e, ControllerError::Pci(PciError::Removed(_)));
    assert!(removed(&controller.check().unwrap_err()));
    // A reset does not bring it back: the function would have to be opened again.
    assert!(removed(&controller.reset(controller.epoch()).unwrap_err()));
    assert!(matches!(controller.check(), Err(ControllerError::Dead { .. })));
}
