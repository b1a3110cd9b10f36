//! Encoding and decoding: what one side says the other understands, and anything else is refused with a typed error.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use shm_api::protocol::header::{self, MAGIC};
use shm_api::protocol::messages::*;
use shm_api::protocol::records::{self, DirEntry, DirRecord, PathCount};
use shm_api::protocol::wire::Wire;
use shm_api::protocol::{ErrorCode, MAX_MESSAGE, Message, Op, VERSION, WireError};

/// Every body there is, decoded from `message`; none may panic, and none may accept another length than its own.
fn decode_everything(message: &Message) {
    macro_rules! bodies {
        ($($t:ty),*) => {$(
            if let Ok((body, tail)) = message.body::<$t>() {
                let again = header::encode(message.op, message.reply, message.request, 0, &body, tail).unwrap();
                let again = Message::decode(&again).unwrap();
                assert_eq!(again.body::<$t>().unwrap(), (body, tail));
                assert_eq!(message.body_only::<$t>().is_ok(), tail.is_empty());
            }
        )*};
    }
    bodies!(
        Empty,
        HelloRequest,
        HelloReply,
        InfoReply,
        OpenRequest,
        OpenReply,
        HandleRequest,
        StatReply,
        ListRequest,
        ListReply,
        MkdirRequest,
        RenameRequest,
        TruncateRequest,
        SetAttrRequest,
        MapRequest,
        MapReply,
        UnmapRequest,
        FaultRequest,
        FaultReply,
        CommitRequest,
        CommitReply,
        RevokeRequest,
        SetPlacementRequest,
        AllocateRequest,
        MemoryRequest,
        MemoryReply,
        RevokeReply,
        StatusReply,
        PeerAttachRequest,
        PeerAttachReply,
        PeerMapRequest,
        PeerMapReply,
        PeerDmaRequest,
        PeerDmaReply,
        PeerRequest
    );
    if let Ok((body, tail)) = message.body::<ListReply>() {
        let _ = records::dir_entries(tail, body.count);
    }
    if let Ok((body, tail)) = message.body::<MapReply>() {
        let _ = records::windows(tail, body.count);
    }
    if let Ok((body, tail)) = message.body::<StatusReply>()
        && let Ok((_, tail)) = records::path_counts(tail, body.reasons)
    {
        let _ = records::clients(tail, body.listed, body.trouble_len);
    }
    if let Ok((body, tail)) = message.body::<RenameRequest>() {
        let _ = records::two_texts(tail, body.from_len, body.to_len);
    }
    let _ = message.error();
}

fn sample() -> Vec<u8> {
    let body = MapRequest { handle: 7, offset: 1 << 40, len: 12345, flags: MAP_WRITE, reserved: 0 };
    header::encode(Op::Map, false, 99, 0, &body, &[]).unwrap()
}

#[test]
fn a_message_survives_the_wire() {
    let body = MapRequest { handle: 7, offset: 1 << 40, len: 12345, flags: MAP_WRITE, reserved: 0 };
    let message = Message::decode(&sample()).unwrap();
    assert_eq!((message.op, message.reply, message.request), (Op::Map, false, 99));
    assert_eq!(message.body_only::<MapRequest>().unwrap(), body);
    assert!(message.body::<StatReply>().is_err(), "a body that is too short");
    assert!(message.body_only::<HandleRequest>().is_err(), "a body that is too long");
}

#[test]
fn integers_are_little_endian_and_fields_lie_without_gaps() {
    let bytes = sample();
    assert_eq!(&bytes[..4], b"CMBF");
    assert_eq!(&bytes[4..8], [1, 0, 32, 0]);
    assert_eq!(&bytes[8..16], 99u64.to_le_bytes());
    assert_eq!(&bytes[16..20], 64u32.to_le_bytes());
    assert_eq!(&bytes[32..40], 7u64.to_le_bytes());
    assert_eq!(&bytes[40..48], (1u64 << 40).to_le_bytes());
    assert_eq!(bytes.len(), 32 + MapRequest::SIZE);
}

#[test]
fn every_header_field_is_checked() {
    let refused = |at: usize, byte: u8, code: ErrorCode| {
        let mut bytes = sample();
        bytes[at] = byte;
        let error = Message::decode(&bytes).unwrap_err();
        assert_eq!(error.code, code, "byte {at} = {byte}: {error}");
    };
    refused(0, b'X', ErrorCode::BadMessage);
    refused(4, 2, ErrorCode::BadVersion);
    refused(6, 200, ErrorCode::BadMessage);
    refused(16, 71, ErrorCode::BadMessage);
    refused(20, 1, ErrorCode::BadMessage);
    refused(24, 200, ErrorCode::BadMessage);
    refused(28, 1, ErrorCode::BadMessage);
    assert!(Message::decode(&[]).is_err());
    assert!(Message::decode(&sample()[..31]).is_err());
    assert!(Message::decode(&vec![0; MAX_MESSAGE + 1]).is_err());
}

#[test]
fn an_error_keeps_its_code_its_errno_and_its_text() {
    for &code in ErrorCode::ALL {
        let error = WireError::new(code, format!("about {code:?}"));
        let message = Message::decode(&header::encode_error(Op::Open, 3, &error)).unwrap();
        assert_eq!(message.error(), Some(error));
        assert_eq!(ErrorCode::from_u32(code as u32), Some(code));
    }
    for &op in Op::ALL {
        assert_eq!(Op::from_u16(op as u16), Some(op));
    }
    let long = WireError::new(ErrorCode::NotFound, "x".repeat(MAX_MESSAGE * 2));
    assert!(Message::decode(&header::encode_error(Op::Open, 3, &long)).unwrap().error().is_some());
}

#[test]
fn records_survive_and_wrong_counts_are_refused() {
    let entries: Vec<DirEntry> = ["a", "ü", "long name"]
        .iter()
        .map(|n| DirEntry {
            name: (*n).to_owned(),
            record: DirRecord { ino: 5, name_len: n.len() as u32, ..Default::default() },
        })
        .collect();
    let mut tail = Vec::new();
    entries.iter().for_each(|e| records::put_dir_entry(e, &mut tail));
    assert_eq!(records::dir_entries(&tail, 3).unwrap(), entries);
    assert!(records::dir_entries(&tail, 2).is_err());
    assert!(records::dir_entries(&tail, 4).is_err());
    assert!(records::dir_entries(&tail, u32::MAX).is_err());

    let count = PathCount { path: "cmb".to_owned(), reason: "room".to_owned(), count: 1, bytes: 2 };
    let mut tail = Vec::new();
    records::put_path_count(&count, &mut tail);
    assert_eq!(records::path_counts(&tail, 1).unwrap(), (vec![count], &[][..]));
    assert!(records::path_counts(&tail[..tail.len() - 1], 1).is_err());
    assert!(records::two_texts(b"\xff", 1, 0).is_err(), "not UTF-8");
}

#[test]
fn random_bytes_and_mutated_messages_are_decoded_or_refused() {
    let seed = 0x5eed_0001;
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    for round in 0..20_000u32 {
        let mut bytes = if round % 2 == 0 {
            let mut bytes = vec![0; (random.next_u32() % 600) as usize];
            random.fill_bytes(&mut bytes);
            // A plausible start gets deeper.
            let start = header::Header {
                magic: MAGIC,
                version: VERSION,
                opcode: Op::ALL[random.next_u32() as usize % Op::ALL.len()] as u16
                    | if random.next_u32() % 2 == 0 { header::REPLY } else { 0 },
                request: random.next_u64(),
                length: bytes.len() as u32,
                ..Default::default()
            }
            .to_bytes();
            let n = start.len().min(bytes.len());
            bytes[..n].copy_from_slice(&start[..n]);
            bytes
        } else {
            sample()
        };
        for _ in 0..random.next_u32() % 4 {
            if !bytes.is_empty() {
                let at = random.next_u32() as usize % bytes.len();
                bytes[at] = random.next_u32() as u8;
            }
        }
        if let Ok(message) = Message::decode(&bytes) {
            decode_everything(&message);
        }
    }
}
