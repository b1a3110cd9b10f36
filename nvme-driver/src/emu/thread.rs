//! A controller that runs on a thread of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::controller::EmulatedController;

/// Idle steps after which the thread lets others run.
const SPIN: u32 = 2000;

/// A running controller; it stops when this is dropped.
#[derive(Debug)]
pub struct ControllerThread {
    controller: Arc<EmulatedController>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

pub(super) fn spawn(
    controller: &Arc<EmulatedController>,
    core: Option<usize>,
) -> std::io::Result<ControllerThread> {
    let stop = Arc::new(AtomicBool::new(false));
    let (mine, its) = (Arc::clone(controller), Arc::clone(controller));
    let stopped = Arc::clone(&stop);
    let thread = std::thread::Builder::new().name("emulated-nvme".to_owned()).spawn(move || {
        if let Some(id) = core
            && !core_affinity::set_for_current(core_affinity::CoreId { id })
        {
            tracing::warn!(
                "cannot pin the emulated controller to CPU {id}; it runs where the system puts it"
            );
        }
        run(&its, &stopped);
    })?;
    mine.has_thread.store(true, Ordering::Release);
    Ok(ControllerThread { controller: mine, stop, thread: Some(thread) })
}

fn run(controller: &EmulatedController, stop: &AtomicBool) {
    let mut idle = 0;
    while !stop.load(Ordering::Relaxed) {
        if controller.step() {
            idle = 0;
        } else {
            idle += 1;
        }
        if idle >= SPIN || controller.is_waited_for() {
            idle = 0;
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }
}

impl Drop for ControllerThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the emulated controller's thread panicked");
        }
        self.controller.has_thread.store(false, Ordering::Release);
    }
}
