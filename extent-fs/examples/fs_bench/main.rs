//! Measures the filesystem. Processor time where one thread does all the work; pairs taken in turns where two are compared.
//!
//! ```text
//! fs_bench scale                  files, extents and free runs from 10^3 to 10^6: time per operation, mount, memory
//! fs_bench stall                  the longest sync while a checkpoint of 10^6 files is written
//! fs_bench raw [URL]              reads and writes through the filesystem and through the raw driver, on the same device;
//!                                 by default on an emulated drive in memory with a thread of its own
//! fs_bench count                  what `benches/fs_io_instructions` counts
//! fs_bench ours FILE SECONDS      create + write 4 KiB + sync, rename + sync, unlink + sync on an image: each per second
//! fs_bench kernel DIR SECONDS     the same in a folder of a kernel filesystem, with fsync of the file or of the folder
//! ```
//!
//! `benches/fs_vs_kernel` compares with ext4 and xfs by the last two. `FS_BENCH_MOST` bounds 10^6.
#![expect(unsafe_code, reason = "a global allocator that counts")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a benchmark that fails has nothing to say")]
#![allow(unreachable_pub, reason = "one program of several files")]

mod count;
mod measure;
mod ram;
mod raw;
mod scale;
mod stall;
mod sync;

use std::path::Path;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["scale"] => scale::run(),
        ["stall"] => stall::run(),
        ["raw"] => raw::run("emu:ram?size=256M"),
        ["raw", url] => raw::run(url),
        ["count"] => count::run(),
        ["ours", file, seconds] => sync::ours(Path::new(file), seconds.parse().unwrap()),
        ["kernel", dir, seconds] => sync::kernel(Path::new(dir), seconds.parse().unwrap()),
        _ => panic!("see the head of extent-fs/examples/fs_bench/main.rs"),
    }
}

/// Up to how many files, extents and free runs: 10^6, or less for a quick look.
fn most() -> u64 {
    std::env::var("FS_BENCH_MOST").map_or(1_000_000, |v| v.parse().unwrap())
}
