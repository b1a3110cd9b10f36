//! A power cut: QEMU and its drives' volatile caches are killed while files are written; then, in a second guest, everything that was
//! acknowledged has to be there.

use std::io::Write;

use extent_fs::{CheckOptions, Filesystem, FormatOptions, MountOptions, NewInode, check, format};
use nvme_driver::controller::ControllerOptions;
use nvme_driver::disk::Disk;
use nvme_driver::nvme_disk::NvmeDisk;

use crate::driver::controller;
use crate::lab::{Case, Outcome, expect, pattern};

pub(crate) const CASES: &[(&str, Case)] = &[("survives", survives)];

/// Bytes at the start of drive 1 that show whether the cut lost anything.
const WITNESS: usize = 1 << 20;

fn disk(index: usize) -> Outcome<NvmeDisk> {
    Ok(NvmeDisk::new(&controller(index, ControllerOptions::default())?)?)
}

/// File `i`: its name and content.
fn file(i: u64) -> (String, Vec<u8>) {
    (format!("/f{i}"), pattern(9000 + i, 1000 + (i as usize * 7919) % 60_000))
}

/// Not a case of its own: goes on until the guest is killed. Says "acknowledged N" when file N is durable.
pub(crate) fn write_until_killed() -> Outcome {
    let mut witness = disk(1)?;
    expect(witness.geometry().volatile_cache, "no volatile write cache")?;
    witness.write(0, &pattern(61, WITNESS))?;
    witness.flush()?;
    witness.write(0, &pattern(62, WITNESS))?;
    let mut disk = disk(0)?;
    format(&mut disk, &FormatOptions::default())?;
    let mut fs = Filesystem::mount(disk, MountOptions::default())?;
    for i in 0.. {
        let (name, bytes) = file(i);
        // Files of long ago make room. What is written beside is never synced.
        if i >= 200 {
            fs.unlink(file(i - 200).0)?;
        }
        let ino = fs.create(name, &NewInode::file())?;
        fs.write_at(ino, 0, &bytes)?;
        fs.sync(ino)?;
        let mut out = std::io::stdout();
        writeln!(out, "acknowledged {i}")?;
        out.flush()?;
        let loose = fs.create(format!("/loose{i}"), &NewInode::file())?;
        fs.write_at(loose, 0, &pattern(i, 30_000))?;
        if i >= 20 {
            fs.unlink(format!("/loose{}", i - 20))?;
        }
    }
    Ok(())
}

fn acknowledged() -> Outcome<u64> {
    let line = std::fs::read_to_string("/proc/cmdline")?;
    let word = line.split_whitespace().find_map(|w| w.strip_prefix("acknowledged="));
    Ok(word.ok_or("the command line does not say what was acknowledged")?.parse()?)
}

fn survives() -> Outcome {
    let mut got = vec![0; WITNESS];
    disk(1)?.read(0, &mut got)?;
    expect(got == pattern(61, WITNESS), "the cut lost nothing: it proves nothing")?;
    let last = acknowledged()?;
    let mut disk = disk(0)?;
    let report = check(&mut disk, &CheckOptions::default())?;
    println!("{report:?}");
    expect(report.is_clean(), "the check found faults")?;
    let mut fs = Filesystem::mount(disk, MountOptions::default())?;
    // The cut came after `last` and perhaps before the next one's unlink was durable.
    for i in last.saturating_sub(198)..=last {
        let (name, bytes) = file(i);
        let ino = fs.lookup(&name)?;
        let mut got = vec![0; bytes.len() + 1];
        let n = fs.read_at(ino, 0, &mut got)?;
        expect(got[..n] == bytes, format!("{name} differs"))?;
    }
    println!("{} files of {} are as they were acknowledged", last.min(198) + 1, last + 1);
    Ok(())
}
