//! Crash states: what may be on the medium when the power goes, and whether the filesystem takes it up rightly.

use extent_fs::{CheckOptions, Filesystem, FormatOptions, MountOptions, NewInode, check, format};

use super::Dice;
use super::model::{Found, Id, Model, Node, read_whole};
use super::ops::Op;
use super::tape::{Event, Image, SECTOR, TapeDisk};

/// A run: what was done, what should be there after each step, and what the disk saw.
pub struct Run {
    pub base: Image,
    pub ops: Vec<Op>,
    /// The model after 0, 1, 2 ... operations.
    pub models: Vec<Model>,
    /// Events on the tape when each operation had returned.
    pub done_at: Vec<usize>,
    pub events: Vec<Event>,
}

pub const PAGES: usize = 192;

pub fn formatted(seed: u64) -> Image {
    let mut disk = TapeDisk::new(Image::poisoned(PAGES));
    let options = FormatOptions {
        uuid: Some((u128::from(seed) << 64 | 0xc0ffee).to_le_bytes()),
        log_bytes: Some(64 << 10),
        time: Some(1),
        ..Default::default()
    };
    format(&mut disk, &options).unwrap();
    disk.image()
}

pub fn quiet() -> MountOptions {
    MountOptions { clock: Box::new(|| 7), ..Default::default() }
}

impl Run {
    /// Does `ops` on `base`, whose contents `model` describes.
    pub fn record(base: &Image, model: &Model, ops: Vec<Op>) -> Self {
        let disk = TapeDisk::new(base.clone());
        let mut fs = Filesystem::mount(disk.clone(), quiet()).unwrap();
        let mut models = vec![model.clone()];
        let mut done_at = Vec::new();
        let mut open = None;
        for op in &ops {
            let mut m = models.last().unwrap().clone();
            let want = op.on_model(&mut m);
            let got = op.on_fs(&mut fs, &mut open);
            match (&want, &got) {
                (Ok(()), Ok(())) => {}
                // Where two errors apply, either is right.
                (Err(w), Err(g)) if *w == g.errno() || matches!(op, Op::Rename(..) | Op::Link(..)) => {
                    m = models.last().unwrap().clone();
                }
                _ => panic!("{op:?}: the model says {want:?}, the filesystem {got:?}\nafter {ops:?}"),
            }
            let faults = fs.verify();
            assert!(faults.is_empty(), "after {op:?} of {ops:?}: {faults:?}");
            models.push(m);
            done_at.push(disk.events());
        }
        let last = models.last().unwrap();
        let found = read_whole(&mut fs);
        if let Err(why) = matches_model(&found, last, std::slice::from_ref(last)) {
            panic!("running, before any crash: {why}\nafter {ops:?}");
        }
        let events = disk.tape.lock().unwrap().events.clone();
        Self { base: base.clone(), ops, models, done_at, events }
    }

    /// The range of models that may be found after a crash behind `events` events: from the last acknowledged sync to
    /// the operation under way.
    fn window(&self, events: usize) -> (&[Model], &[Op]) {
        let done = self.done_at.iter().take_while(|&&d| d <= events).count();
        let synced =
            (0..done).rev().find(|&i| self.ops[i].is_sync() && self.succeeded(i)).map_or(0, |i| i + 1);
        let upto = (done + 1).min(self.ops.len());
        (&self.models[synced..=upto], &self.ops[synced..upto])
    }

    fn succeeded(&self, i: usize) -> bool {
        !matches!(&self.ops[i], Op::Sync(p) if self.models[i].lookup(p).is_err())
    }

    /// Visits every crash state of every prefix: all subsets of a short unflushed tail, `samples` random ones (subsets,
    /// tears) of a longer one. Returns how many.
    pub fn explore(&self, dice: &mut Dice, samples: u64, from: usize, visit: &mut Visit<'_>) -> u64 {
        let mut durable = self.base.clone();
        let mut tail: Vec<(usize, &[u8])> = Vec::new();
        let mut count = 0;
        for upto in 0..=self.events.len() {
            if upto > 0 {
                match &self.events[upto - 1] {
                    Event::Write { at, data } => tail.push((*at, data)),
                    Event::Flush => {
                        for (at, data) in tail.drain(..) {
                            durable.write(at, data);
                        }
                    }
                }
            }
            if upto < from {
                continue;
            }
            let n = tail.len();
            let whole = if n <= 3 { 1 << n } else { 0 };
            for choice in 0..whole + samples.min(if n == 0 { 0 } else { samples }) {
                let mut image = durable.clone();
                if choice < whole {
                    for (i, (at, data)) in tail.iter().enumerate() {
                        if choice >> i & 1 == 1 {
                            image.write(*at, data);
                        }
                    }
                } else {
                    scatter(&mut image, &tail, dice);
                }
                count += 1;
                let (window, ops) = self.window(upto);
                visit(image, window, &|| {
                    format!(
                        "crash after event {upto}, choice {choice}, operations since the last sync: {ops:?}"
                    )
                });
            }
        }
        count
    }
}

/// Given the image, the models that it may hold, and words for the place in the run.
pub type Visit<'a> = dyn FnMut(Image, &[Model], &dyn Fn() -> String) + 'a;

/// Some of the writes, some of them torn between sectors, in some order.
pub fn scatter(image: &mut Image, tail: &[(usize, &[u8])], dice: &mut Dice) {
    let mut order: Vec<_> = tail.to_vec();
    if dice.one_in(2) {
        for i in (1..order.len()).rev() {
            order.swap(i, dice.below(i as u64 + 1) as usize);
        }
    }
    let mercy = 1 + dice.below(4);
    for (at, data) in order {
        match dice.below(4) {
            0 if !dice.one_in(mercy) => {}
            1 => {
                for (i, sector) in data.chunks(SECTOR).enumerate() {
                    if dice.one_in(2) {
                        image.write(at + i * SECTOR, sector);
                    }
                }
            }
            2 => image.write(at, &data[..dice.below((data.len() / SECTOR) as u64 + 1) as usize * SECTOR]),
            _ => image.write(at, data),
        }
    }
}

/// Checks, mounts and reads a crash state. Returns what it holds.
pub fn take_up(image: Image) -> Result<(Found, TapeDisk), String> {
    let mut disk = TapeDisk::new(image);
    let report = check(&mut disk, &CheckOptions::default()).map_err(|e| format!("check: {e}"))?;
    // A superblock that was being written may be torn; its other copy is whole.
    let worse = report.findings.iter().find(|f| !matches!(f.fault, extent_fs::Fault::Superblock { .. }));
    if let Some(f) = worse.or(report.findings.get(1)) {
        return Err(format!("check found: {}", f.fault));
    }
    let mut fs = Filesystem::mount(disk.clone(), quiet()).map_err(|e| format!("mount: {e}"))?;
    let faults = fs.verify();
    if !faults.is_empty() {
        return Err(format!("after the mount: {faults:?}"));
    }
    Ok((read_whole(&mut fs), disk))
}

/// The found tree equals one of the `window`'s, sector by sector with bytes that the file had in the window (or zeros
/// where it changed).
pub fn matches_window(found: &Found, window: &[Model]) -> Result<(), String> {
    let mut why = Vec::new();
    for model in window.iter().rev() {
        match matches_model(found, model, window) {
            Ok(()) => return Ok(()),
            Err(e) => why.push(e),
        }
    }
    Err(format!("no point between the last sync and the crash fits: {why:#?}"))
}

fn matches_model(found: &Found, model: &Model, window: &[Model]) -> Result<(), String> {
    let mut tree = model.tree();
    tree.sort();
    let names = |f: &Found| f.iter().map(|e| e.0.clone()).collect::<Vec<_>>();
    if tree.iter().map(|t| &t.0).ne(found.iter().map(|f| &f.0)) {
        return Err(format!(
            "names {:?} instead of {:?}",
            names(found),
            tree.iter().map(|t| &t.0).collect::<Vec<_>>()
        ));
    }
    for ((path, id), (_, bytes, links, placement)) in tree.iter().zip(found) {
        let want = model.placement(*id);
        if *placement != want {
            return Err(format!("{path}: placement {placement} instead of {want}"));
        }
        match (&model.nodes[id], bytes) {
            (Node::Dir { entries }, None) => {
                let dirs = entries.values().filter(|c| matches!(model.nodes[c], Node::Dir { .. })).count();
                if *links as usize != 2 + dirs {
                    return Err(format!("{path}: {links} links"));
                }
            }
            (Node::File { data, links: want }, Some(bytes)) => {
                if links != want {
                    return Err(format!("{path}: {links} links instead of {want}"));
                }
                if bytes.len() != data.len() {
                    return Err(format!("{path}: {} bytes instead of {}", bytes.len(), data.len()));
                }
                sectors(path, *id, bytes, data, window)?;
            }
            _ => return Err(format!("{path}: file or directory?")),
        }
    }
    Ok(())
}

fn sectors(path: &str, id: Id, bytes: &[u8], here: &[u8], window: &[Model]) -> Result<(), String> {
    if bytes == here {
        return Ok(());
    }
    for (i, got) in bytes.chunks(SECTOR).enumerate() {
        let at = i * SECTOR;
        let version = |m: &Model| {
            let data = m.file(id)?;
            let have = data.get(at..data.len().min(at + got.len())).unwrap_or_default();
            let mut v = have.to_vec();
            v.resize(got.len(), 0);
            Some(v)
        };
        let versions: Vec<_> = window.iter().filter_map(version).collect();
        let changed = versions.windows(2).any(|w| w[0] != w[1]);
        let zeros = changed && got.iter().all(|&b| b == 0);
        if !zeros && !versions.iter().any(|v| v == got) {
            let differ = (0..got.len()).find(|&j| versions.iter().all(|v| v[j] != got[j])).unwrap_or(0);
            let show = |v: &[u8]| v[differ..v.len().min(differ + 8)].to_vec();
            return Err(format!(
                "{path}: bytes {}.. are {:02x?}, which they never were since the last sync ({:02x?})",
                at + differ,
                show(got),
                versions.iter().map(|v| show(v)).collect::<Vec<_>>()
            ));
        }
    }
    Ok(())
}

/// Goes on after a crash, crashes again, and looks whether anything of the first recovery is lost.
pub fn crash_again(image: &Image, found: &Found, dice: &mut Dice, states: &mut u64) -> Result<(), String> {
    let disk = TapeDisk::new(image.clone());
    let mut fs = Filesystem::mount(disk.clone(), quiet()).map_err(|e| format!("mount: {e}"))?;
    let mut after = found.clone();
    let mut synced = 0;
    let step = |e: extent_fs::FsError| format!("after recovery: {e}");
    let ino = fs.create("/zz", &NewInode::file()).map_err(step)?;
    fs.write_at(ino, 0, &[0x5a; 5000]).map_err(step)?;
    if dice.one_in(4) {
        fs.checkpoint_now().map_err(step)?;
    } else {
        fs.sync(ino).map_err(step)?;
    }
    after.push(("/zz".to_owned(), Some(vec![0x5a; 5000]), 1, 0));
    after.sort();
    synced += disk.events();
    let events = disk.tape.lock().unwrap().events.clone();
    let mut durable = image.clone();
    let mut tail: Vec<(usize, &[u8])> = Vec::new();
    for (i, event) in events.iter().enumerate() {
        match event {
            Event::Write { at, data } => tail.push((*at, data)),
            Event::Flush => tail.drain(..).for_each(|(at, data)| durable.write(at, data)),
        }
        let mut torn = durable.clone();
        scatter(&mut torn, &tail, dice);
        *states += 1;
        let (second, _) = take_up(torn).map_err(|e| format!("second crash, event {i}: {e}"))?;
        let fits = second == after || (i + 1 < synced && (second == *found || half_made(&second, found)));
        if !fits {
            let names =
                |f: &Found| f.iter().map(|e| (e.0.clone(), e.1.as_ref().map(Vec::len))).collect::<Vec<_>>();
            return Err(format!(
                "second crash, event {i}: {:?} instead of {:?} or {:?}",
                names(&second),
                names(found),
                names(&after)
            ));
        }
    }
    Ok(())
}

/// Whether the only difference is a new file that lacks its bytes.
fn half_made(second: &Found, found: &Found) -> bool {
    let rest: Found = second.iter().filter(|f| f.0 != "/zz").cloned().collect();
    rest == *found
}
