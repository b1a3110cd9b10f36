//! The power goes at every point of many runs; what is on the medium then is checked, mounted and compared with a model.
//!
//! `CMBFS_SEED` reproduces a run, `CMBFS_CRASH_STATES` makes the random ones longer (`tests/fuzz crash`).
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed call fails the test")]

mod common;

use common::crash::{Run, crash_again, formatted, matches_window, take_up};
use common::model::Model;
use common::ops::{Op, random};
use common::tape::Image;
use common::{Dice, env};

/// Explores all crash states of a run.
fn examine(run: &Run, dice: &mut Dice, samples: u64, from: usize, seed: u64) -> u64 {
    let mut again = Dice::new(seed);
    let mut extra = 0;
    let states = run.explore(dice, samples, from, &mut |image, window, place| {
        let result = take_up(image.clone()).and_then(|(found, _)| {
            matches_window(&found, window)?;
            if again.one_in(40) { crash_again(&image, &found, &mut again, &mut extra) } else { Ok(()) }
        });
        if let Err(why) = result {
            panic!("CMBFS_SEED={seed}: {}: {why}\nall operations: {:?}", place(), run.ops);
        }
    });
    states + extra
}

fn set_up(ops: &[Op]) -> (Image, Model) {
    let mut all = ops.to_vec();
    all.push(Op::SyncAll);
    let run = Run::record(&formatted(1), &Model::default(), all);
    let mut image = run.base.clone();
    for e in &run.events {
        if let common::tape::Event::Write { at, data } = e {
            image.write(*at, data);
        }
    }
    (image, run.models.last().unwrap().clone())
}

/// The small set that short sequences are made of.
fn small_set() -> Vec<Op> {
    use Op::*;
    vec![
        Create("/n"),
        Mkdir("/m"),
        Unlink("/a"),
        Unlink("/d/b"),
        Rmdir("/e"),
        Rename("/a", "/n"),
        Rename("/a", "/d/b"),
        Rename("/d", "/e"),
        Rename("/d/b", "/a"),
        Link("/a", "/d/n"),
        Write("/a", 0, 4096, 1),
        Write("/a", 3000, 3000, 2),
        Write("/a", 5000, 100, 3),
        Write("/a", 20_000, 10, 4),
        Write("/d/b", 0, 12_288, 5),
        Direct("/a", 4096, 8192, 6),
        Direct("/d/b", 0, 5000, 7),
        Truncate("/a", 0),
        Truncate("/a", 4500),
        Truncate("/a", 9000),
        Punch("/a", 1000, 4000),
        Allocate("/d/b", 0, 16_384),
        Place("/a", 3),
        Place("/", 2),
        Open("/a"),
        WriteOpen(2000, 5000, 8),
        Close,
        Sync("/a"),
        Checkpoint,
        Trim,
    ]
}

fn small_setup() -> (Image, Model) {
    set_up(&[
        Op::Create("/a"),
        Op::Write("/a", 0, 5000, 100),
        Op::Mkdir("/d"),
        Op::Create("/d/b"),
        Op::Write("/d/b", 0, 6000, 101),
        Op::Mkdir("/e"),
    ])
}

#[test]
fn all_sequences_of_one_and_two_operations() {
    let seed = env("CMBFS_SEED", 1);
    let (image, model) = small_setup();
    let mut dice = Dice::new(seed);
    let mut states = 0;
    let set = small_set();
    for a in &set {
        let run = Run::record(&image, &model, vec![a.clone(), Op::SyncAll]);
        states += examine(&run, &mut dice, 4, 0, seed);
        for b in &set {
            let run = Run::record(&image, &model, vec![a.clone(), b.clone(), Op::SyncAll]);
            states += examine(&run, &mut dice, 2, 0, seed);
        }
    }
    println!("{states} crash states");
    assert!(states > 12_000, "{states}");
}

#[test]
fn sampled_sequences_of_three_operations() {
    let seed = env("CMBFS_SEED", 2);
    let (image, model) = small_setup();
    let mut dice = Dice::new(seed);
    let set = small_set();
    let mut states = 0;
    while states < 3_000 {
        let mut ops: Vec<Op> = (0..3).map(|_| dice.pick(&set).clone()).collect();
        ops.push(Op::SyncAll);
        states += examine(&Run::record(&image, &model, ops), &mut dice, 3, 0, seed);
    }
    println!("{states} crash states");
}

#[test]
fn long_random_runs() {
    let first = env("CMBFS_SEED", 3);
    let target = env("CMBFS_CRASH_STATES", 10_000);
    let mut states = 0;
    let mut seed = first;
    while states < target {
        let mut dice = Dice::new(seed);
        let ops: Vec<Op> = (0..250).map(|_| random(&mut dice)).collect();
        let run = Run::record(&formatted(seed), &Model::default(), ops);
        states += examine(&run, &mut dice, 2, 0, seed);
        seed += 1;
    }
    println!("{states} crash states in runs with CMBFS_SEED={first} to {}", seed - 1);
}

#[test]
fn syncs_that_fill_the_log_crash_inside_checkpoints() {
    let seed = env("CMBFS_SEED", 4);
    let mut dice = Dice::new(seed);
    // Enough names that a checkpoint takes several chunks' worth of steps, and enough syncs that several are written.
    let mut ops = Vec::new();
    for i in 0..400u64 {
        let file = ["/a", "/b", "/c", "/d"][i as usize % 4];
        if i % 9 == 8 {
            ops.push(Op::Unlink(file));
        }
        ops.push(Op::Create(file));
        ops.push(Op::Write(file, (i as usize % 7) * 1000, 600, i));
        ops.push(Op::Sync(file));
    }
    let ops: Vec<Op> = {
        let mut m = Model::default();
        ops.into_iter().filter(|op| op.on_model(&mut m).is_ok()).collect()
    };
    let run = Run::record(&formatted(seed), &Model::default(), ops);
    let states = examine(&run, &mut dice, 1, 0, seed);
    println!("{states} crash states");
    let superblocks =
        run.events.iter().filter(|e| matches!(e, common::tape::Event::Write { at: 0, .. })).count();
    assert!(superblocks >= 3, "only {superblocks} checkpoints");
}
