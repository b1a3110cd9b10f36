//! The Linux kernel's own nvme driver on *our* controller, which QEMU reaches over vfio-user: `/dev/nvme0n1`.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, OFlags};

use crate::lab::{Case, Outcome, expect, pattern, wait_for};

pub(crate) const CASES: &[(&str, Case)] = &[
    ("identify", identify),
    ("write-and-verify", write_and_verify),
    ("depth-32", depth_32),
    ("zeroes-and-discard", zeroes_and_discard),
    ("nvme-cli", nvme_cli),
    ("fio-verify", fio_verify),
    ("reset-under-load", reset_under_load),
    ("mkfs-ext4", mkfs_ext4),
    ("log-is-clean", log_is_clean),
];

/// With kernel 7.3, which takes the CMB for its submission queues.
pub(crate) const NEWER_CASES: &[(&str, Case)] = &[
    ("identify", identify),
    ("cmb-is-used", cmb_is_used),
    ("write-and-verify", write_and_verify),
    ("depth-32", depth_32),
    ("fio-verify", fio_verify),
    ("reset-under-load", reset_under_load),
    ("log-is-clean", log_is_clean),
];

/// Run in a second guest, on the image that the first one left.
pub(crate) const REBOOT_CASES: &[(&str, Case)] =
    &[("verify-after-reboot", verify_after_reboot), ("log-is-clean", log_is_clean)];

const NODE: &str = "/dev/nvme0n1";

fn attribute(name: &str) -> Outcome<String> {
    Ok(fs::read_to_string(format!("/sys/class/nvme/nvme0/{name}"))?.trim().to_owned())
}

fn identify() -> Outcome {
    wait_for(NODE)?;
    for name in ["model", "serial", "firmware_rev", "subsysnqn", "state", "queue_count", "sqsize"] {
        println!("{name}: {}", attribute(name)?);
    }
    expect(attribute("serial")? == "CMBFS-EMULATED", "serial number")?;
    expect(attribute("subsysnqn")?.starts_with("nqn."), "subsystem name")?;
    expect(attribute("state")? == "live", "state")?;
    expect(attribute("queue_count")?.parse::<u32>()? >= 3, "one I/O queue a CPU")?;
    expect(fs::read_to_string("/sys/block/nvme0n1/size")?.trim() == (256u64 << 11).to_string(), "size")?;
    let interrupts = fs::read_to_string("/proc/interrupts")?;
    expect(interrupts.contains("nvme0q1"), "no MSI-X vector for an I/O queue")
}

/// The drive, past the page cache.
fn direct() -> Outcome<File> {
    let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    Ok(rustix::fs::open(NODE, flags, rustix::fs::Mode::empty())?.into())
}

/// A page-aligned part of a buffer that is big enough for it.
struct Aligned {
    bytes: Vec<u8>,
    at: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let bytes = vec![0u8; len + 4096];
        let at = bytes.as_ptr().align_offset(4096);
        Self { bytes, at, len }
    }

    fn get(&mut self) -> &mut [u8] {
        &mut self.bytes[self.at..self.at + self.len]
    }
}

/// Sizes from one block to more than MDTS allows in one command.
fn write_and_verify() -> Outcome {
    let file = direct()?;
    for (i, len) in [512, 4096, 8192, 128 << 10, 1 << 20, 4 << 20].into_iter().enumerate() {
        let mut buffer = Aligned::new(len);
        let bytes = pattern(i as u64, len);
        buffer.get().copy_from_slice(&bytes);
        let offset = (i as u64) * (8 << 20) + 512;
        file.write_all_at(buffer.get(), offset)?;
        buffer.get().fill(0);
        file.read_exact_at(buffer.get(), offset)?;
        expect(buffer.get() == bytes, format!("{len} bytes differ"))?;
    }
    file.sync_all()?;
    Ok(())
}

/// 32 threads with one request each in flight.
fn depth_32() -> Outcome {
    let file = direct()?;
    let wrong = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..32u64 {
            let (file, wrong) = (&file, &wrong);
            scope.spawn(move || {
                let mut buffer = Aligned::new(4096);
                for round in 0..16 {
                    let bytes = pattern(thread * 1000 + round, 4096);
                    buffer.get().copy_from_slice(&bytes);
                    let offset = (round * 32 + thread) * 4096;
                    let written = file.write_all_at(buffer.get(), offset);
                    buffer.get().fill(0);
                    let read = file.read_exact_at(buffer.get(), offset);
                    if written.is_err() || read.is_err() || buffer.get() != bytes {
                        println!("thread {thread}, round {round}: {written:?} {read:?}");
                        wrong.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    expect(!wrong.into_inner(), "data differ")
}

/// Write Zeroes and Dataset Management, as the block layer sends them.
fn zeroes_and_discard() -> Outcome {
    let file = direct()?;
    let mut buffer = Aligned::new(1 << 20);
    buffer.get().fill(0xa5);
    file.write_all_at(buffer.get(), 0)?;
    rustix::fs::fallocate(&file, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, 4096, 512 << 10)?;
    file.read_exact_at(buffer.get(), 0)?;
    let (before, rest) = buffer.get().split_at(4096);
    let (zeroed, after) = rest.split_at(512 << 10);
    expect(zeroed.iter().all(|b| *b == 0), "not zeroed")?;
    expect(before.iter().chain(after).all(|b| *b == 0xa5), "zeroed too much")?;
    rustix::fs::fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, 4096)?;
    file.read_exact_at(buffer.get(), 0)?;
    expect(buffer.get()[..4096].iter().all(|b| *b == 0), "a hole does not read as zeros")?;
    // What deallocated blocks read as is undefined: the command must work, and leave the others alone.
    let discard = Command::new("/bin/blkdiscard").args(["-o", "0", "-l", "262144", NODE]).status()?;
    expect(discard.success(), "blkdiscard failed")?;
    file.read_exact_at(buffer.get(), 0)?;
    expect(buffer.get()[(512 << 10) + 4096..].iter().all(|b| *b == 0xa5), "discarded too much")
}

/// nvme-cli's view: every command must succeed, and say what is expected where something is.
fn nvme_cli() -> Outcome {
    let commands: [(&[&str], &str); 11] = [
        (&["id-ctrl", "/dev/nvme0"], "CMBFS-EMULATED"),
        (&["id-ctrl", "-H", "/dev/nvme0"], "Format NVM"),
        (&["id-ns", NODE], "nsze"),
        (&["ns-descs", NODE], "uuid"),
        (&["list-ns", "/dev/nvme0"], "0x1"),
        (&["smart-log", "/dev/nvme0"], "critical_warning"),
        (&["error-log", "/dev/nvme0"], "Error Log Entries"),
        (&["fw-log", "/dev/nvme0"], "frs1"),
        (&["get-feature", "-f", "7", "/dev/nvme0"], "Number of Queues"),
        (&["flush", NODE], ""),
        (&["format", "--force", "--lbaf=0", NODE], "Success"),
    ];
    let mut failed = false;
    for (args, expected) in commands {
        let loader = ["--library-path", "/tool", "/tool/nvme"];
        let out = Command::new("/tool/ld-linux-x86-64.so.2").args(loader).args(args).output()?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        if !out.status.success() || !text.contains(expected) {
            failed = true;
            println!("nvme {}: {} without {expected:?}:", args.join(" "), out.status);
            text.lines().take(12).for_each(|line| println!("    {line}"));
        }
    }
    expect(!failed, "nvme-cli found something to complain about")
}

/// fio's own verification: 32 requests in flight, of one block each and of mixed sizes, each with a CRC of its own.
fn fio_verify() -> Outcome {
    let common = [
        "--thread",
        "--ioengine=io_uring",
        "--direct=1",
        "--iodepth=32",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--filename=/dev/nvme0n1",
        "--output-format=terse",
    ];
    let jobs: [&[&str]; 2] = [
        &["--name=blocks", "--rw=randwrite", "--bs=4k", "--offset=64m", "--size=8m"],
        &["--name=mixed", "--rw=randwrite", "--bsrange=512-128k", "--offset=96m", "--size=16m"],
    ];
    for job in jobs {
        let out = Command::new("/bin/fio").args(common).args(job).output()?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        println!("{}{text}", String::from_utf8_lossy(&out.stderr));
        // Terse, version 3: the fifth field is the error, the sixth how many KiB were read, here to verify them.
        let fields: Vec<&str> = text.lines().find(|l| l.starts_with("3;")).unwrap_or("").split(';').collect();
        let read = fields.get(5).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
        expect(out.status.success() && fields.get(4) == Some(&"0"), format!("fio {}", out.status))?;
        expect(read >= 4096, format!("fio read {read} KiB only"))?;
    }
    Ok(())
}

/// The kernel put its submission queues into the CMB, and offers the rest to others.
fn cmb_is_used() -> Outcome {
    let cmb = attribute("cmb")?;
    let (size, free) = (attribute("device/p2pmem/size")?, attribute("device/p2pmem/available")?);
    println!("{cmb}\np2pmem: {free} of {size} bytes free");
    let (size, free) = (size.parse::<u64>()?, free.parse::<u64>()?);
    expect(size == 64 << 20, "the kernel sees another size")?;
    expect(free < size, "no queue is in the CMB")
}

/// `reset_controller` while writers are at work: the kernel retries, and no write is lost.
fn reset_under_load() -> Outcome {
    let stop = AtomicBool::new(false);
    let failure = std::sync::Mutex::new(None);
    std::thread::scope(|scope| -> Outcome {
        for thread in 0..4u64 {
            let (stop, failure) = (&stop, &failure);
            scope.spawn(move || {
                let work = || -> Result<u64, String> {
                    let file = direct().map_err(|e| e.to_string())?;
                    let mut buffer = Aligned::new(16384);
                    let mut round = 0;
                    while !stop.load(Ordering::Relaxed) {
                        let bytes = pattern(thread * 100_000 + round, 16384);
                        let offset = (32 << 20) + (thread * 64 + round % 64) * 16384;
                        buffer.get().copy_from_slice(&bytes);
                        file.write_all_at(buffer.get(), offset).map_err(|e| format!("write: {e}"))?;
                        buffer.get().fill(0);
                        file.read_exact_at(buffer.get(), offset).map_err(|e| format!("read: {e}"))?;
                        if buffer.get() != bytes {
                            return Err(format!("thread {thread}, round {round}: data differ"));
                        }
                        round += 1;
                    }
                    Ok(round)
                };
                match work() {
                    Ok(rounds) => println!("thread {thread}: {rounds} rounds"),
                    Err(e) => *failure.lock().unwrap_or_else(|p| p.into_inner()) = Some(e),
                }
            });
        }
        let mut resets = Ok(());
        for _ in 0..5 {
            std::thread::sleep(std::time::Duration::from_millis(200));
            resets = resets.and(fs::write("/sys/class/nvme/nvme0/reset_controller", "1"));
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
        stop.store(true, Ordering::Relaxed);
        Ok(resets?)
    })?;
    match failure.into_inner().unwrap_or_else(|p| p.into_inner()) {
        Some(e) => Err(e.into()),
        None => expect(attribute("state")? == "live", "the controller is not live"),
    }
}

/// The files of the test tree: path and content.
fn tree() -> impl Iterator<Item = (String, Vec<u8>)> {
    (0..120u64).map(|i| {
        let len = [0, 1, 511, 4096, 5000, 70_000, 300_000][(i % 7) as usize];
        (format!("/mnt/d{}/e{}/f{i}", i % 5, i % 3), pattern(5000 + i, len))
    })
}

fn mount() -> Outcome {
    let done = Command::new("/bin/mount").args(["-t", "ext4", NODE, "/mnt"]).status()?;
    expect(done.success(), "mount failed")
}

fn umount() -> Outcome {
    expect(Command::new("/bin/umount").arg("/mnt").status()?.success(), "umount failed")
}

fn verify() -> Outcome {
    for (path, expected) in tree() {
        let mut bytes = Vec::new();
        File::open(&path)?.read_to_end(&mut bytes)?;
        expect(bytes == expected, format!("{path} differs"))?;
    }
    Ok(())
}

/// mkfs.ext4, a tree of files with fsync, unmount, mount, verify.
fn mkfs_ext4() -> Outcome {
    let made = Command::new("/bin/mkfs.ext4").args(["-q", "-F", NODE]).status()?;
    expect(made.success(), "mkfs.ext4 failed")?;
    mount()?;
    for (path, bytes) in tree() {
        fs::create_dir_all(Path::new(&path).parent().ok_or("no parent")?)?;
        let mut file = File::create(&path)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
    }
    umount()?;
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    mount()?;
    verify()?;
    umount()
}

fn verify_after_reboot() -> Outcome {
    wait_for(NODE)?;
    mount()?;
    verify()?;
    umount()
}

/// Nothing of nvme's in the kernel's log but what it says on success.
fn log_is_clean() -> Outcome {
    let out = Command::new("/bin/dmesg").output()?;
    let log = String::from_utf8_lossy(&out.stdout);
    let bad = ["timeout", "error", "fail", "abort", "down", "invalid", "stuck", "quirk", "unable", "I/O"];
    // The kernel of Debian 12 is built without PCI_P2PDMA.
    let expected = ["failed to register the CMB"];
    let mut lines = log.lines().filter(|line| line.contains("nvme"));
    let complaint = lines.find(|line| {
        bad.iter().any(|word| line.contains(word)) && !expected.iter().any(|known| line.contains(known))
    });
    match complaint {
        Some(line) => Err(format!("the kernel said: {line}").into()),
        None => Ok(()),
    }
}
