//! The judge: whether there is one order. It knows of writes and reads of words and of time, and of nothing else.
//!
//! Every write of a word has a value of its own, so each read names its write. A write and its reads are a *group*. In any order that explains
//! them, the value is there from the write to the last of the reads, and no other write comes between: so groups follow each other
//! whole. If the first end in a group is before its last begin, the group covers that stretch of time whatever the order (a *stretch*);
//! else it could be at one moment, anywhere from its last begin to its first end (a *moment*). There is an order exactly if no read ends before
//! its write begins, no two stretches overlap, and no moment must be inside a stretch (Gibbons and Korach, Testing Shared Memories, 1997).

use std::collections::BTreeMap;

use crate::history::{Ending, Entry, Kind, LOCATIONS, Location, OBJECTS, WORDS, word};

/// A write of a word.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    pub value: u64,
    pub start: u64,
    pub end: u64,
    /// It was told to have happened. Else it may have happened, or not.
    pub done: bool,
}

/// A read of a word.
#[derive(Clone, Copy, Debug)]
pub struct Read {
    pub value: u64,
    pub start: u64,
    pub end: u64,
}

#[derive(Clone, Copy, Debug)]
struct Group {
    write: Write,
    first_end: u64,
    last_begin: u64,
    reads: usize,
}

/// Why there is no order of these.
pub fn verdict(writes: &[Write], reads: &[Read]) -> Result<(), String> {
    let mut groups = BTreeMap::new();
    for &write in writes {
        let group = Group { write, first_end: write.end, last_begin: write.start, reads: 0 };
        if groups.insert(write.value, group).is_some() {
            return Err(format!("{:#x} was written twice", write.value));
        }
    }
    for read in reads {
        let Some(group) = groups.get_mut(&read.value) else {
            return Err(format!("{read:x?} is of nothing that was written"));
        };
        if read.end < group.write.start {
            return Err(format!("{read:?} had ended when {:?} began", group.write));
        }
        group.first_end = group.first_end.min(read.end);
        group.last_begin = group.last_begin.max(read.start);
        group.reads += 1;
    }
    // What nobody saw of what nobody was told has not happened.
    let happened = groups.values().filter(|group| group.write.done || group.reads > 0);
    let (mut stretches, moments): (Vec<&Group>, Vec<&Group>) =
        happened.partition(|group| group.first_end < group.last_begin);
    stretches.sort_by_key(|group| group.first_end);
    for pair in stretches.windows(2) {
        if let [before, after] = pair
            && after.first_end < before.last_begin
        {
            return Err(format!("one is read before and after the other: {before:?}, {after:?}"));
        }
    }
    for moment in moments {
        // Stretches do not overlap: the last that begins before it is the only one that it can be inside of.
        let next = stretches.partition_point(|stretch| stretch.first_end < moment.last_begin);
        if let Some(stretch) = next.checked_sub(1).and_then(|at| stretches.get(at))
            && moment.first_end < stretch.last_begin
        {
            return Err(format!("lost or stale: {moment:?} within {stretch:?}"));
        }
    }
    Ok(())
}

/// Between these two moments the drive was reset.
#[derive(Clone, Copy, Debug)]
pub struct Reset {
    pub from: u64,
    pub to: u64,
}

/// Everything that was noted, word by word.
pub fn judge(entries: &[Entry], resets: &[Reset]) {
    let mut by_location = vec![Vec::new(); LOCATIONS];
    entries.iter().filter(|e| e.kind != Kind::Commit).for_each(|e| by_location[e.at.0].push(*e));
    for (number, entries_here) in by_location.iter().enumerate() {
        let at = Location(number);
        // A reset takes what is in the CMB: of the file that may be there, and of raw memory.
        let loses = [0, 2].contains(&at.object());
        let resets = if loses { resets } else { &[] };
        let first = LOCATIONS / OBJECTS * at.object();
        let commits: Vec<Entry> = entries
            .iter()
            .filter(|e| e.kind == Kind::Commit && e.at.0 == first && e.ending == Ending::Done)
            .copied()
            .collect();
        for index in 0..WORDS {
            // At first there was the record of stamp 0.
            let mut writes = vec![Write { value: word(0, at, index), start: 0, end: 0, done: true }];
            let mut reads = Vec::new();
            for e in entries_here {
                let (value, start, end) = (e.words[index], e.start, e.end);
                match e.kind {
                    Kind::Write => writes.push(Write { value, start, end, done: e.ending == Ending::Done }),
                    _ => reads.push(Read { value, start, end }),
                }
            }
            let zeros = at.object() == 2;
            if let Err(why) = verdict_over(&writes, &reads, resets, &commits, zeros) {
                panic!("object {}, location {number}, word {index}: {why}", at.object());
            }
        }
    }
}

/// The verdict on a word that resets may have taken back, from each to the next: to something that it was before, of which no commit
/// had made something newer durable; or to zero, if nothing stands behind it (`zeros`). Who did something while a reset was is not asked.
fn verdict_over(
    writes: &[Write],
    reads: &[Read],
    resets: &[Reset],
    commits: &[Entry],
    zeros: bool,
) -> Result<(), String> {
    let mut known: BTreeMap<u64, Write> = writes.iter().map(|w| (w.value, *w)).collect();
    if zeros {
        known.insert(0, Write { value: 0, start: 0, end: u64::MAX, done: false });
    }
    let mut from = Reset { from: 0, to: 0 };
    for to in resets.iter().copied().chain([Reset { from: u64::MAX, to: u64::MAX }]) {
        let within = |start: u64, end: u64| (from.to == 0 || start > from.to) && end < to.from;
        let here: Vec<Read> = reads.iter().filter(|r| within(r.start, r.end)).copied().collect();
        // What began and ended here; what did so partly may have happened.
        let mut all: Vec<Write> = writes
            .iter()
            .filter(|w| from.to == 0 || w.end > from.from)
            .filter(|w| w.start < to.to)
            .map(|w| Write { done: w.done && within(w.start, w.end), ..*w })
            .collect();
        if from.to > 0 {
            for value in here.iter().map(|r| r.value).collect::<std::collections::BTreeSet<u64>>() {
                let Some(origin) = known.get(&value) else { continue };
                if all.iter().any(|w| w.value == value) {
                    continue;
                }
                // It is from before: the reset has brought it here.
                if let Some(lost) = committed_over(origin, writes, resets, commits, from) {
                    return Err(format!(
                        "{origin:?} is back after {from:?}, though a commit was over {lost:?}"
                    ));
                }
                all.push(Write { value, start: from.from, end: from.to, done: false });
            }
        }
        verdict(&all, &here)?;
        from = to;
    }
    Ok(())
}

/// A write after `origin` that a commit, before the reset `last` or any before it, has made durable.
fn committed_over(
    origin: &Write,
    writes: &[Write],
    resets: &[Reset],
    commits: &[Entry],
    last: Reset,
) -> Option<Write> {
    let mut began = 0;
    for reset in resets.iter().filter(|reset| reset.from <= last.from) {
        let newer = writes.iter().find(|w| {
            let commits_it = |c: &Entry| c.start > w.end && c.end < reset.from;
            w.done && w.start > origin.end && w.start > began && commits.iter().any(commits_it)
        });
        if newer.is_some() {
            return newer.copied();
        }
        began = reset.to;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::{Read, Write, verdict};

    fn written(value: u64, start: u64, end: u64) -> Write {
        Write { value, start, end, done: true }
    }

    fn read(value: u64, start: u64, end: u64) -> Read {
        Read { value, start, end }
    }

    #[test]
    fn the_judge_acquits() {
        let writes = [written(1, 0, 0), written(2, 10, 20), written(3, 15, 30)];
        // Either order of two writes at once; reads that overlap them find old or new.
        verdict(&writes, &[read(1, 11, 19), read(3, 16, 22), read(2, 23, 40)]).unwrap();
        verdict(&writes, &[read(2, 12, 17), read(3, 31, 40)]).unwrap();
        let maybe = Write { done: false, ..written(4, 50, 60) };
        // Refused: seen or not.
        verdict(&[written(1, 0, 0), maybe], &[read(1, 70, 80)]).unwrap();
        verdict(&[written(1, 0, 0), maybe], &[read(4, 70, 80), read(4, 90, 95)]).unwrap();
    }

    #[test]
    fn the_judge_convicts() {
        let writes = [written(1, 0, 0), written(2, 10, 20), written(3, 30, 40)];
        let cases: [&[Read]; 6] = [
            // Stale.
            &[read(1, 21, 25)],
            // Lost, though nobody reads it.
            &[read(2, 50, 60)],
            // Back again.
            &[read(2, 12, 14), read(1, 15, 16)],
            &[read(3, 31, 32), read(2, 33, 34), read(3, 35, 36)],
            // Before it was written, and by nobody.
            &[read(3, 22, 25)],
            &[read(9, 22, 25)],
        ];
        for reads in cases {
            verdict(&writes, reads).unwrap_err();
        }
        let maybe = Write { done: false, ..written(4, 50, 60) };
        let all = [written(1, 0, 0), maybe];
        // Seen, and gone again.
        verdict(&all, &[read(4, 70, 80), read(1, 90, 95)]).unwrap_err();
    }
}
