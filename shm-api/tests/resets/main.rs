//! A controller that is reset under a running server: what its CMB held is gone, and nobody is shown or told anything else.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

#[path = "../common/mod.rs"]
mod common;
mod peers;
#[path = "../common/raw.rs"]
mod raw;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{SMALL, Serving};
use extent_fs::{Filesystem, FormatOptions, MountOptions};
use nvme_driver::emu::{EmulatedController, Fault, Rule, Target};
use nvme_driver::spec::NvmOpcode;
use shm_api::client::{Client, ClientError, File, OpenMode};
use shm_api::protocol::ErrorCode;

const WINDOW: usize = SMALL.window;

struct Rig {
    serving: Serving,
    emulated: Arc<EmulatedController>,
}

impl Rig {
    fn new() -> Self {
        let device = nvme_driver::open(&SMALL.url.parse().unwrap(), &Default::default()).unwrap();
        let emulated = Arc::clone(device.emulated().unwrap());
        let mut disk = device.disk().unwrap();
        common::format(&mut disk, FormatOptions::default());
        let filesystem = Filesystem::mount(disk, MountOptions::default()).unwrap();
        Self { serving: Serving::over(filesystem, SMALL), emulated }
    }

    /// The next command of this kind ends in a reset: its completion names a command that nobody sent.
    fn reset_at(&self, opcode: NvmOpcode) {
        self.emulated.faults().inject(Rule::once(Target::io(opcode as u8), Fault::WrongCid(1)));
    }

    fn resets(&self, client: &Client) -> u64 {
        client.status().unwrap().resets
    }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 4096 * 7) as u8 ^ seed).collect()
}

fn put(client: &Client, path: &str, bytes: &[u8]) -> File {
    let file = client.open(path, OpenMode::create()).unwrap();
    file.write_at(0, bytes).unwrap();
    file.commit().unwrap();
    file
}

fn get(file: &File, len: usize) -> Vec<u8> {
    let mut got = vec![0; len];
    assert_eq!(file.read_at(0, &mut got).unwrap(), len);
    got
}

fn is_lost(result: &Result<impl Sized, ClientError>) -> bool {
    matches!(result, Err(ClientError::Server(e)) if e.code == ErrorCode::DataLost)
}

#[test]
fn a_commit_does_not_claim_bytes_that_a_reset_took() {
    let rig = Rig::new();
    let client = rig.serving.client();
    let old = pattern(2 * WINDOW, 1);
    let file = put(&client, "/a", &old);
    let same = client.open("/a", OpenMode::write()).unwrap();
    let reader = put(&client, "/b", &pattern(WINDOW, 3));
    file.write_at(5000, b"newer").unwrap();
    let fresh = client.open("/c", OpenMode::create()).unwrap();
    fresh.write_at(0, b"x").unwrap();
    rig.reset_at(NvmOpcode::Write);
    let result = fresh.commit();
    assert!(is_lost(&result), "its own byte was in the CMB: {result:?}");
    assert_eq!(rig.resets(&client), 1);

    assert_eq!(get(&file, 2 * WINDOW), old, "read anew: as it was committed");
    assert_eq!(get(&reader, WINDOW), pattern(WINDOW, 3));
    assert!(is_lost(&file.commit()));
    assert!(is_lost(&same.commit()), "every handle that was open is told");
    file.commit().unwrap();
    assert!(client.open("/a", OpenMode::write()).unwrap().commit().is_ok(), "told before it was opened");
    file.write_at(5000, b"again").unwrap();
    file.commit().unwrap();
    client.revoke_all().unwrap();
    let mut new = old;
    new[5000..5005].copy_from_slice(b"again");
    assert_eq!(get(&file, 2 * WINDOW), new);
    let status = client.status().unwrap();
    assert_eq!(status.lost_bytes, 2 * 4096, "one page of /a, one of /c");
}

#[test]
fn a_loss_that_nobody_was_told_of_is_told_to_the_next_who_opens_the_file() {
    let rig = Rig::new();
    let client = rig.serving.client();
    put(&client, "/a", &pattern(WINDOW, 1)).write_at(0, b"lost").unwrap();
    rig.reset_at(NvmOpcode::Flush);
    put(&client, "/b", b"");
    assert_eq!(rig.resets(&client), 1);
    let file = client.open("/a", OpenMode::write()).unwrap();
    assert!(is_lost(&file.commit()));
    file.commit().unwrap();
}

#[test]
fn a_reset_in_the_flush_of_a_commit_takes_nothing_that_it_had_written() {
    let rig = Rig::new();
    let client = rig.serving.client();
    let file = client.open("/a", OpenMode::create()).unwrap();
    file.write_at(0, &pattern(3 * WINDOW, 5)).unwrap();
    rig.reset_at(NvmOpcode::Flush);
    file.commit().unwrap();
    assert_eq!(rig.resets(&client), 1);
    assert_eq!(get(&file, 3 * WINDOW), pattern(3 * WINDOW, 5));
    // With another window still dirty the same flush is an error.
    file.write_at(0, b"a").unwrap();
    file.write_at(2 * WINDOW as u64, b"b").unwrap();
    rig.reset_at(NvmOpcode::Flush);
    assert!(is_lost(&file.commit_range(0, WINDOW as u64, 0)));
    let got = get(&file, 3 * WINDOW);
    assert_eq!((got[0], got[2 * WINDOW]), (b'a', pattern(3 * WINDOW, 5)[2 * WINDOW]));
}

#[test]
fn readers_are_never_shown_what_a_reset_left() {
    let rig = Rig::new();
    let client = rig.serving.client();
    let bytes = pattern(4 * WINDOW, 7);
    put(&client, "/shared", &bytes);
    let stop = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..2)
        .map(|_| {
            let (stop, bytes) = (Arc::clone(&stop), bytes.clone());
            let file = rig.serving.client().open("/shared", OpenMode::read()).unwrap();
            std::thread::spawn(move || {
                let mapped = file.map_read(0, bytes.len() as u64).unwrap();
                let mut got = vec![0; bytes.len()];
                let mut reads = 0;
                while !stop.load(Ordering::Relaxed) || reads == 0 {
                    mapped.read(0, &mut got).unwrap();
                    assert!(got == bytes, "read {reads} shows something else");
                    reads += 1;
                }
                mapped.paths().cmb_reads
            })
        })
        .collect();
    let other = client.open("/other", OpenMode::create()).unwrap();
    for n in 1..=40 {
        other.write_at(0, &[n]).unwrap();
        rig.reset_at(if n % 2 == 0 { NvmOpcode::Flush } else { NvmOpcode::Write });
        let _ = other.commit();
        assert_eq!(rig.resets(&client), u64::from(n));
    }
    stop.store(true, Ordering::Relaxed);
    let from_cmb: u64 = readers.into_iter().map(|r| r.join().unwrap()).sum();
    assert!(from_cmb > 0);
}
