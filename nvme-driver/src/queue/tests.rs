//! A queue pair against completions that the test writes by hand.
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

use super::{
    CompletionRing, Data, Done, Doorbell, Parts, PrpLists, QueueError, QueuePair, RingMemory, SubmissionRing,
    SubmitError, list_pages,
};
use crate::dma::DmaArena;
use crate::emu::{Config, EmulatedController};
use crate::iova::IovaAllocator;
use crate::mem::{Mapping, PAGE};
use crate::spec::{Command, Completion, Status};

const ENTRIES: u16 = 8;
const QID: u16 = 3;

/// The device's side of the queue.
struct Device {
    pair: QueuePair,
    doorbells: Arc<Mapping>,
    emulated: Arc<EmulatedController>,
    entries: u16,
    cq_tail: u16,
    phase: bool,
}

fn device(max_transfer: usize) -> Device {
    device_of(ENTRIES, max_transfer)
}

fn device_of(entries: u16, max_transfer: usize) -> Device {
    // Only its IOMMU is used.
    let emulated = EmulatedController::new(&Config::default()).unwrap();
    let function = emulated.function();
    let arena = DmaArena::new(Arc::clone(&function), Arc::new(IovaAllocator::new(function.iova_ranges())));
    let doorbells = Mapping::anonymous(PAGE).unwrap();
    let memory = |bytes| RingMemory::host(arena.alloc(bytes).unwrap());
    let pages = list_pages(max_transfer);
    let slots = usize::from(entries);
    let pair = QueuePair::new(Parts {
        qid: QID,
        entries,
        sq: SubmissionRing::new(memory(slots * 64), entries).unwrap(),
        cq: CompletionRing::new(memory(slots * 16), entries).unwrap(),
        sq_doorbell: Doorbell::mapped(&doorbells, 0).unwrap(),
        cq_doorbell: Doorbell::mapped(&doorbells, 4).unwrap(),
        lists: PrpLists::new(memory(PrpLists::bytes(slots, pages).unwrap()), slots, pages).unwrap(),
        max_transfer,
        step: None,
    })
    .unwrap();
    Device { pair, doorbells, emulated, entries, cq_tail: 0, phase: true }
}

impl Device {
    fn submit(&mut self, token: u64) -> u16 {
        self.pair.submit(Command::new(2, 1), None, token).unwrap()
    }

    fn post(&mut self, mut entry: Completion) {
        entry.status_phase = (entry.status_phase & !1) | u16::from(self.phase);
        let at = self.pair.layout().cq_address + u64::from(self.cq_tail) * 16;
        self.emulated.domain().write(at, bytemuck::bytes_of(&entry)).unwrap();
        self.cq_tail = (self.cq_tail + 1) % self.entries;
        self.phase ^= self.cq_tail == 0;
    }

    fn complete(&mut self, cid: u16, status: Status) {
        self.post(Completion { cid, sqid: QID, status_phase: status.field() << 1, ..Completion::default() });
    }

    fn reap(&mut self) -> (Result<usize, QueueError>, Vec<Done>) {
        let mut done = Vec::new();
        let result = self.pair.reap(usize::MAX, |d| done.push(d));
        (result, done)
    }

    fn sq_entry(&self, index: u16) -> Command {
        let mut bytes = [0u8; 64];
        let at = self.pair.layout().sq_address + u64::from(index) * 64;
        self.emulated.domain().read(at, &mut bytes).unwrap();
        bytemuck::pod_read_unaligned(&bytes)
    }

    fn doorbell(&self, offset: usize) -> u32 {
        self.doorbells.u32_at(offset).unwrap().load(Ordering::Relaxed)
    }
}

#[test]
fn several_completions_each_keep_their_own_status() {
    let mut d = device(PAGE);
    let cids: Vec<u16> = (10..14).map(|t| d.submit(t)).collect();
    let (bad, worse) = (Status::LBA_OUT_OF_RANGE, Status::UNRECOVERED_READ_ERROR.with_dnr());
    for (i, status) in [(2, Status::SUCCESS), (0, bad), (3, worse), (1, Status::SUCCESS)] {
        d.complete(cids[i], status);
    }
    let (result, done) = d.reap();
    assert_eq!(result, Ok(4));
    let got: Vec<_> = done.iter().map(|d| (d.token, d.status)).collect();
    assert_eq!(got, [(12, Status::SUCCESS), (10, bad), (13, worse), (11, Status::SUCCESS)]);
    assert_eq!(d.pair.in_flight(), 0);
}

#[test]
fn an_entry_of_the_last_round_is_not_a_completion() {
    let mut d = device(PAGE);
    for round in 0..40u64 {
        let cid = d.submit(round);
        assert_eq!(d.reap(), (Ok(0), vec![]), "round {round}");
        d.complete(cid, Status::SUCCESS);
        assert_eq!(d.reap().1.len(), 1);
        assert_eq!(u64::from(d.doorbell(4)), (round + 1) % 8);
    }
}

#[test]
fn the_device_has_room_for_completions_without_a_doorbell_for_each() {
    const ENTRIES: u16 = 64;
    for depth in [1, 7, 8, 32, 63] {
        let mut d = device_of(ENTRIES, PAGE);
        let mut owed: std::collections::VecDeque<u16> = (0..depth).map(|token| d.submit(token)).collect();
        let (mut done, mut rung, mut last) = (0u64, 0, 0);
        while done < 2000 {
            // A device does not post what its completion queue has no room for.
            while u32::from((d.cq_tail + 1) % ENTRIES) != d.doorbell(4)
                && let Some(cid) = owed.pop_front()
            {
                d.complete(cid, Status::SUCCESS);
            }
            let (result, got) = d.reap();
            assert!(result.unwrap() > 0, "depth {depth}: the device waits for room, and we for the device");
            done += got.len() as u64;
            owed.extend(got.iter().map(|g| d.submit(g.token)).collect::<Vec<_>>());
            rung += u64::from(d.doorbell(4) != last);
            last = d.doorbell(4);
        }
        assert!(rung * 8 <= done, "depth {depth}: {rung} doorbells for {done} completions");
    }
}

#[test]
fn doorbells_are_rung_once_a_batch() {
    let mut d = device(PAGE);
    for token in 0..5 {
        d.submit(token);
    }
    assert_eq!(d.doorbell(0), 0);
    d.pair.ring();
    assert_eq!(d.doorbell(0), 5);
    d.doorbells.u32_at(0).unwrap().store(99, Ordering::Relaxed);
    d.pair.ring();
    assert_eq!(d.doorbell(0), 99, "nothing new, nothing written");
}

#[test]
fn a_full_queue_refuses_and_goes_on_after_a_reap() {
    let mut d = device(PAGE);
    let cids: Vec<u16> = (0..7).map(|t| d.submit(t)).collect();
    assert_eq!(d.pair.submit(Command::new(2, 1), None, 9), Err(SubmitError::Full));
    assert_eq!((d.pair.capacity(), d.pair.in_flight()), (7, 7));
    d.complete(cids[4], Status::SUCCESS);
    assert_eq!(d.reap().1[0].token, 4);
    d.submit(9);
    assert_eq!(d.pair.submit(Command::new(2, 1), None, 9), Err(SubmitError::Full));
}

#[test]
fn bogus_completions_are_typed_errors_and_change_no_slot() {
    let mut d = device(PAGE);
    let (a, b) = (d.submit(1), d.submit(2));
    let entry = |cid| Completion { cid, sqid: QID, ..Completion::default() };
    let bad = |d: &mut Device, entry, error| {
        let before = d.pair.in_flight();
        d.post(entry);
        assert_eq!(d.reap(), (Err(error), vec![]));
        assert_eq!(d.pair.in_flight(), before);
    };
    bad(&mut d, entry(5), QueueError::UnknownCommand { qid: QID, cid: 5 });
    bad(&mut d, entry(a ^ 0x100), QueueError::UnknownCommand { qid: QID, cid: a ^ 0x100 });
    bad(&mut d, entry(0x7777), QueueError::UnknownCommand { qid: QID, cid: 0x7777 });
    bad(&mut d, Completion { sqid: 4, ..entry(a) }, QueueError::WrongQueue { qid: QID, sqid: 4, cid: a });
    bad(
        &mut d,
        Completion { sqhd: ENTRIES, ..entry(a) },
        QueueError::BadHead { qid: QID, sqhd: ENTRIES, entries: ENTRIES, cid: a },
    );
    d.complete(b, Status::SUCCESS);
    assert_eq!(d.reap().1[0].token, 2);
    bad(&mut d, entry(b), QueueError::Duplicate { qid: QID, cid: b });
    // The same slot again, another identifier: the old one is still refused.
    let again = d.submit(3);
    assert_ne!(again, b);
    assert_eq!(again % ENTRIES, b % ENTRIES);
    bad(&mut d, entry(b), QueueError::UnknownCommand { qid: QID, cid: b });
    d.complete(again, Status::SUCCESS);
    d.complete(a, Status::INTERNAL_ERROR);
    let (result, done) = d.reap();
    assert_eq!(result, Ok(2));
    assert_eq!((done[0].token, done[1].token, done[1].status), (3, 1, Status::INTERNAL_ERROR));
}

#[test]
fn good_completions_before_a_bogus_one_are_given_out() {
    let mut d = device(PAGE);
    let (a, b) = (d.submit(1), d.submit(2));
    d.complete(a, Status::SUCCESS);
    d.complete(77, Status::SUCCESS);
    d.complete(b, Status::SUCCESS);
    let (result, done) = d.reap();
    assert!(result.is_err());
    assert_eq!(done.len(), 1);
    let (result, done) = d.reap();
    assert_eq!((result, done[0].token), (Ok(1), 2));
    assert_eq!(d.doorbell(4), 3);
}

#[test]
fn random_completions_never_complete_what_is_not_in_flight() {
    for seed in 0..20 {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
        let mut d = device(PAGE);
        let mut live: Vec<(u16, u64)> = Vec::new();
        let (mut token, mut ok, mut bad) = (0, 0, 0);
        for _ in 0..5000 {
            if rng.next_u32().is_multiple_of(2) && live.len() < 7 {
                live.push((d.submit(token), token));
                token += 1;
            }
            let random = rng.next_u64();
            let mut entry: Completion = bytemuck::cast([rng.next_u64(), random]);
            // Mostly plausible, so that it gets past the first check.
            if random % 8 > 0 {
                (entry.sqid, entry.sqhd) = (QID, entry.sqhd % ENTRIES);
            }
            if random % 16 > 7 {
                entry.cid %= 64;
            } else if random % 16 > 3
                && let Some((cid, _)) = live.get(rng.next_u32() as usize % 7)
            {
                entry.cid = *cid;
            }
            d.post(entry);
            let (result, done) = d.reap();
            match result {
                Ok(1) => {
                    let at = live.iter().position(|&(cid, t)| cid == entry.cid && t == done[0].token);
                    live.swap_remove(
                        at.unwrap_or_else(|| panic!("seed {seed}: {entry:?} completed {done:?}")),
                    );
                    assert_eq!(done[0].status, entry.status());
                    ok += 1;
                }
                Err(_) => bad += 1,
                other => panic!("seed {seed}: {other:?}"),
            }
            assert_eq!(d.pair.in_flight(), live.len(), "seed {seed}");
        }
        assert!(ok > 100 && bad > 100, "seed {seed}: {ok} good, {bad} bad");
    }
}

/// The pages that a command's data pointer describes, as the specification says to walk it.
fn walk(d: &Device, command: &Command, len: usize) -> Vec<u64> {
    let page = PAGE as u64;
    let mut pages = vec![command.prp1];
    let mut left = len as u64 - (page - command.prp1 % page).min(len as u64);
    if left > 0 && left <= page {
        pages.push(command.prp2);
    } else if left > 0 {
        let mut list = command.prp2;
        assert_eq!(list % 8, 0);
        while left > 0 {
            let mut entry = [0; 8];
            d.emulated.domain().read(list, &mut entry).unwrap();
            let entry = u64::from_le_bytes(entry);
            assert_eq!(entry % page, 0, "list entries have no offset");
            if list % page == page - 8 && left > page {
                list = entry;
                continue;
            }
            pages.push(entry);
            left -= left.min(page);
            list += 8;
        }
    }
    pages
}

#[test]
fn prps_describe_every_page_once() {
    let max = 5 << 20;
    let mut d = device(max);
    let base = 0x4000_0000u64;
    let mut index = 0;
    for offset in [0, 4, 512, 4092] {
        for len in [4, 4096, 4100, 8192, 8196, 12288, 2 << 20, (2 << 20) + 4096, (4 << 20) + 4096, max] {
            let cid =
                d.pair.submit(Command::new(2, 1), Some(Data { address: base + offset, len }), 0).unwrap();
            let command = d.sq_entry(index);
            assert_eq!(command.cid(), cid);
            let pages = walk(&d, &command, len);
            let first = base / 4096;
            let last = (base + offset + len as u64 - 1) / 4096;
            let expected: Vec<u64> =
                (first..=last).map(|p| if p == first { base + offset } else { p * 4096 }).collect();
            assert!(pages == expected, "offset {offset}, {len} bytes");
            d.complete(cid, Status::SUCCESS);
            assert_eq!(d.reap().0, Ok(1));
            index = (index + 1) % ENTRIES;
        }
    }
}

#[test]
fn data_that_cannot_be_described_is_refused() {
    let mut d = device(8192);
    for data in [
        Data { address: 0x1000, len: 0 },
        Data { address: 0x1000, len: 8193 },
        Data { address: 0x1002, len: 512 },
        Data { address: u64::MAX - 3, len: 512 },
    ] {
        assert_eq!(
            d.pair.submit(Command::new(2, 1), Some(data), 0),
            Err(SubmitError::BadData { data, max: 8192 })
        );
        assert_eq!(d.pair.in_flight(), 0);
    }
}

#[test]
fn late_commands_are_named_and_a_restart_gives_all_tokens_back() {
    let mut d = device(PAGE);
    let (a, b) = (d.submit(1), d.submit(2));
    let late = |d: &mut Device, now| {
        let mut late = Vec::new();
        d.pair
            .check_timeouts(Duration::from_secs(now), Duration::from_secs(30), |cid, t| late.push((cid, t)));
        late
    };
    // Time starts with the first look, however long ago the submission was.
    assert_eq!(late(&mut d, 1000), []);
    d.complete(a, Status::SUCCESS);
    assert_eq!(d.reap().0, Ok(1));
    let c = d.submit(3);
    assert_eq!(late(&mut d, 1029), []);
    assert_eq!(late(&mut d, 1030), [(b, 2)]);
    let mut both = late(&mut d, 1059);
    both.sort_unstable_by_key(|l| l.1);
    assert_eq!(both, [(b, 2), (c, 3)]);
    let mut tokens = Vec::new();
    d.pair.restart(|t| tokens.push(t)).unwrap();
    tokens.sort_unstable();
    assert_eq!((tokens, d.pair.in_flight()), (vec![2, 3], 0));
    (d.cq_tail, d.phase) = (0, true);
    // What the device still has to say about the old ones is not believed.
    let new = d.submit(4);
    d.complete(c, Status::SUCCESS);
    assert!(d.reap().0.is_err());
    d.complete(new, Status::SUCCESS);
    assert_eq!(d.reap().1[0].token, 4);
}
