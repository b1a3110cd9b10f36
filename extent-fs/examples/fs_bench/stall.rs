//! How long a sync takes while a checkpoint of a large filesystem is written.

use extent_fs::{BLOCK, Falloc, NewInode};

use crate::measure::{cpu, percentile};
use crate::most;
use crate::scale::{Fs, comb, folders, fresh, name, small_file};

/// Syncs, each after `change`, until two checkpoints have come and gone.
fn measure(what: &str, mut fs: Fs, mut change: impl FnMut(&mut Fs, u64)) {
    fs.checkpoint_now().unwrap();
    let (mut alone, mut during) = (Vec::new(), Vec::new());
    let begun = fs.disk().first_block;
    let mut i = 0;
    while fs.disk().first_block < begun + 2 {
        change(&mut fs, i);
        let writes = fs.disk().writes;
        let begun = cpu();
        fs.sync_all().unwrap();
        let took = (cpu() - begun).as_nanos() as f64 / 1e3;
        // More than the record was written: a checkpoint is under way.
        if fs.disk().writes > writes + 1 { &mut during } else { &mut alone }.push(took);
        i += 1;
    }
    print!("{what:44}");
    for mut v in [alone, during] {
        v.sort_by(f64::total_cmp);
        print!("{:>8.1}{:>8.1}{:>9.1}", percentile(&v, 50.0), percentile(&v, 99.9), percentile(&v, 100.0));
    }
    println!();
}

pub fn run() {
    let n = most();
    println!("Microseconds of processor time of a sync of one change:");
    println!("{:44}{:^25}{:^25}", "", "no checkpoint", "a chunk of one written");
    println!(
        "{:44}{:>8}{:>8}{:>9}{:>8}{:>8}{:>9}",
        "", "median", "99.9 %", "longest", "median", "99.9 %", "longest"
    );

    let mut fs = fresh();
    let dirs = folders(&mut fs, n);
    for i in 0..n {
        small_file(&mut fs, dirs[(i % dirs.len() as u64) as usize], &name(i));
    }
    let at = dirs[dirs.len() / 2];
    measure(&format!("{n} files in {} folders", dirs.len()), fs, |fs, i| {
        fs.create_at(at, &name(n + i), extent_fs::Kind::File, &NewInode::file()).unwrap();
    });

    let mut fs = fresh();
    let dir = fs.mkdir("/d", &NewInode::directory()).unwrap();
    for i in 0..n {
        small_file(&mut fs, dir, &name(i));
    }
    measure(&format!("{n} files in one folder"), fs, |fs, i| {
        fs.create_at(dir, &name(n + i), extent_fs::Kind::File, &NewInode::file()).unwrap();
    });

    let mut fs = fresh();
    let f = comb(&mut fs, n);
    measure(&format!("one file of {n} extents"), fs, |fs, i| {
        fs.fallocate(f, (n + i) * 2 * BLOCK, BLOCK, Falloc::Extend).unwrap();
    });
}
