//! Clients that stop, die or hang up.

use std::time::Duration;

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use rustix::process::Signal;
use shm_api::client::OpenMode;

use crate::common::{SMALL, Serving, Setup, until};
use crate::{WINDOW, file_of, next_word, signal, started};

#[test]
fn a_stopped_writer_delays_nobody_beyond_the_grace_and_its_pages_wait_for_it() {
    let serving = Serving::start(Setup { grace_ms: 60, ..SMALL });
    let client = serving.client();
    file_of(&client, &[1; WINDOW]);
    let socket = serving.socket.to_str().unwrap();
    let (stopped, mut out) = started("hold", &[socket, "1000"]);
    signal(&stopped, Signal::STOP);
    let reader = client.open("/a", OpenMode::read()).unwrap().map_read(0, WINDOW as u64).unwrap();
    let report = client.revoke("/a").unwrap();
    assert_eq!((report.windows, report.fenced), (1, 1), "{report:?}");
    assert_eq!(
        (report.freed_pages, report.quarantined_pages),
        (0, 16),
        "its late stores may still land there"
    );
    // Two graces at most (the writers', then the borrows'); the rest is for a busy machine.
    assert!(report.nanoseconds < 2_000_000_000, "{report:?}");
    let mut bytes = vec![0; WINDOW];
    reader.read(0, &mut bytes).unwrap();
    assert!(bytes[8192..].iter().all(|&b| b == 1));
    assert_eq!(client.status().unwrap().cmb_quarantined, WINDOW as u64);
    // Others write on meanwhile.
    let writer = client.open("/a", OpenMode::write()).unwrap().map(0, WINDOW as u64).unwrap();
    writer.write(16384, &[7; 100]).unwrap();

    signal(&stopped, Signal::CONT);
    assert_eq!(next_word(&mut out), "fenced 1", "it was told, and wrote again");
    reader.read(0, &mut bytes).unwrap();
    assert_eq!((bytes[0], bytes[4096], bytes[8192], bytes[16384]), (0xaa, 0xbb, 1, 7));
    until("its pages come back", || client.status().unwrap().cmb_quarantined == 0);
}

#[test]
fn a_writer_that_is_killed_in_its_section_gives_everything_back() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    file_of(&client, &[1; WINDOW]);
    let socket = serving.socket.to_str().unwrap();
    let (mut killed, _) = started("hold", &[socket, "100000"]);
    signal(&killed, Signal::STOP);
    assert_eq!(client.revoke("/a").unwrap().quarantined_pages, 16);
    killed.0.kill().unwrap();
    killed.0.wait().unwrap();
    until("its pages come back", || client.status().unwrap().cmb_quarantined == 0);
    assert_eq!(client.status().unwrap().died, 1);
    // A live section that dies: what it stored may be there, whole pages of it; nothing else is harmed.
    let (mut killed, _) = started("hold", &[socket, "100000"]);
    killed.0.kill().unwrap();
    killed.0.wait().unwrap();
    until("it is noticed", || client.status().unwrap().died == 2);
    let report = client.revoke("/a").unwrap();
    assert_eq!((report.quarantined_pages, report.fenced), (0, 0));
    client.open("/a", OpenMode::write()).unwrap().commit().unwrap();
    let mut bytes = vec![0; WINDOW];
    client.open("/a", OpenMode::read()).unwrap().read_at(0, &mut bytes).unwrap();
    assert!(bytes[8192..].iter().all(|&b| b == 1));
}

#[test]
fn a_stopped_borrower_keeps_its_snapshot_and_delays_nobody() {
    let serving = Serving::start(Setup { grace_ms: 60, ..SMALL });
    let client = serving.client();
    file_of(&client, &[1; WINDOW]);
    let (stopped, mut out) = started("borrow", &[serving.socket.to_str().unwrap(), "1000"]);
    signal(&stopped, Signal::STOP);
    let report = client.revoke("/a").unwrap();
    assert_eq!((report.freed_pages, report.quarantined_pages), (0, 16), "borrowed: {report:?}");
    // One grace, to know that nobody answers; the rest is for a busy machine.
    assert!(report.nanoseconds < 2_000_000_000, "{report:?}");
    // Others write, commit, and take the window here and there meanwhile.
    let file = client.open("/a", OpenMode::write()).unwrap();
    let mapped = file.map(0, WINDOW as u64).unwrap();
    let mut bytes = vec![0; WINDOW];
    for round in 2..6 {
        mapped.write(0, &[round; WINDOW]).unwrap();
        file.commit().unwrap();
        client.revoke_all().unwrap();
        mapped.prefer_cmb().unwrap();
        mapped.read(0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|b| *b == round));
    }
    assert_eq!(client.status().unwrap().cmb_quarantined, WINDOW as u64, "its place, and no more");
    signal(&stopped, Signal::CONT);
    assert_eq!(next_word(&mut out), "borrowed (false, true)", "a snapshot");
    until("its pages come back", || client.status().unwrap().cmb_quarantined == 0);
}

/// A closed socket proves nothing about the process behind it: what it may still touch is not reused before it is dead.
#[test]
fn a_process_that_hangs_up_in_its_section_keeps_its_pages_until_it_is_dead() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    file_of(&client, &[1; WINDOW]);
    let (mut hung_up, _) = started("hang up", &[serving.socket.to_str().unwrap()]);
    until("its windows are taken back", || client.status().unwrap().cmb_quarantined == WINDOW as u64);
    assert_eq!(client.status().unwrap().clients, 1);
    hung_up.0.kill().unwrap();
    hung_up.0.wait().unwrap();
    until("its pages come back", || client.status().unwrap().cmb_quarantined == 0);
}

#[test]
fn clients_are_killed_at_random_points() {
    let serving = Serving::start(SMALL);
    let client = serving.client();
    file_of(&client, &vec![0; 3 * WINDOW]);
    let seed = 0x5eed_0002;
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    for _ in 0..12 {
        let (mut worker, _) = started("work", &[serving.socket.to_str().unwrap()]);
        std::thread::sleep(Duration::from_micros(random.next_u64() % 20_000));
        if random.next_u32() % 2 == 0 {
            client.revoke("/a").unwrap();
        }
        worker.0.kill().unwrap();
        worker.0.wait().unwrap();
    }
    // One whose connection ended a moment before its process keeps its files until the process is seen to be dead.
    until(&format!("seed {seed:#x}: all are gone, and all they had is back"), || {
        let status = client.status().unwrap();
        (status.clients, status.cmb_quarantined, status.open_files) == (1, 0, 0)
    });
    let file = client.open("/a", OpenMode::write()).unwrap();
    let bytes = vec![9; 3 * WINDOW];
    file.write_at(0, &bytes).unwrap();
    file.commit().unwrap();
    client.revoke_all().unwrap();
    let mut got = vec![0; 3 * WINDOW];
    file.read_at(0, &mut got).unwrap();
    assert_eq!(got, bytes);
}
