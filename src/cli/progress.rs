//! A progress bar for long copies: on a terminal only, so that a script's log stays clean.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar over `bytes` bytes on standard error; it draws nothing where standard error is no terminal, or nothing
/// is left to see because the copy is small.
pub(crate) fn bar(what: &str, bytes: u64) -> ProgressBar {
    const WORTH_SHOWING: u64 = 4 << 20;
    if bytes < WORTH_SHOWING || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(Some(bytes), ProgressDrawTarget::stderr_with_hz(10));
    let template = "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message(what.to_owned());
    bar
}
