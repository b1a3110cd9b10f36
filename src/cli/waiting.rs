//! Says what is waited for, when it is waited for: who sees nothing happen should know why.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// How long something may take before that is said.
const SILENCE: Duration = Duration::from_secs(1);

/// Does `work`. If it takes a while, `what` is said on standard error.
pub(crate) fn saying<T>(what: String, work: impl FnOnce() -> T) -> T {
    let (working, is_done) = mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        if is_done.recv_timeout(SILENCE) == Err(RecvTimeoutError::Timeout) {
            eprintln!("cmbfs: {what}");
        }
    });
    let done = work();
    drop(working);
    // It ends at once, and only prints.
    let _ = watch.join();
    done
}
