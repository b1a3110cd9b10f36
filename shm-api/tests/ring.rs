//! The rings between a client and a server, without either.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use nvme_driver::mem::Mapping;
use shm_api::transport::ring::{
    ClientRing, ENTRIES, RING_FAULT, RingError, RingReply, RingRequest, ServerRing, word,
};

fn pair() -> (ServerRing, ClientRing, Arc<Mapping>) {
    let server = ServerRing::create().unwrap();
    let memory = Arc::clone(server.memory());
    (server, ClientRing::attach(Arc::clone(&memory)).unwrap(), memory)
}

fn request(n: u64) -> RingRequest {
    RingRequest { request: n, handle: n * 3, offset: n << 20, opcode: RING_FAULT, ..Default::default() }
}

#[test]
fn entries_come_out_as_they_went_in_for_many_rounds() {
    let (mut server, mut client, _) = pair();
    for n in 0..1000 {
        client.put(&request(n)).unwrap();
        if n % 3 == 0 {
            client.put(&request(n + 5000)).unwrap();
        }
        assert_eq!(server.take().unwrap(), Some(request(n)));
        if n % 3 == 0 {
            assert_eq!(server.take().unwrap(), Some(request(n + 5000)));
        }
        assert_eq!(server.take().unwrap(), None);
        let reply = RingReply { request: n, slot: 7, ..Default::default() };
        server.put(&reply).unwrap();
        assert_eq!(client.take().unwrap(), Some(reply));
        assert_eq!(client.take().unwrap(), None);
    }
}

#[test]
fn a_full_ring_is_refused() {
    let (mut server, mut client, _) = pair();
    for n in 0..u64::from(ENTRIES) {
        client.put(&request(n)).unwrap();
    }
    assert!(!client.has_room().unwrap());
    assert!(client.put(&request(0)).is_err());
    server.take().unwrap();
    assert!(client.has_room().unwrap());
}

#[test]
fn a_tail_that_cannot_be_is_an_error() {
    let (mut server, _, memory) = pair();
    memory.u32_at(word::REQUEST_TAIL).unwrap().store(ENTRIES + 1, Ordering::Relaxed);
    assert!(matches!(server.take(), Err(RingError::Broken(_))));
    memory.u32_at(word::REQUEST_TAIL).unwrap().store(u32::MAX, Ordering::Relaxed);
    assert!(matches!(server.take(), Err(RingError::Broken(_))));
}

#[test]
fn replies_that_nobody_takes_are_an_error_and_not_overwritten() {
    let (mut server, mut client, memory) = pair();
    for n in 0..u64::from(ENTRIES) {
        server.put(&RingReply { request: n, ..Default::default() }).unwrap();
    }
    assert!(matches!(server.put(&RingReply::default()), Err(RingError::Broken(_))));
    assert_eq!(client.take().unwrap().unwrap().request, 0);
    server.put(&RingReply::default()).unwrap();
    memory.u32_at(word::REPLY_HEAD).unwrap().store(12345, Ordering::Relaxed);
    assert!(server.put(&RingReply::default()).is_err());
}

#[test]
fn a_sleeping_server_is_kicked_once() {
    let (mut server, mut client, _) = pair();
    assert!(server.about_to_sleep().unwrap());
    assert!(client.put(&request(1)).unwrap(), "it sleeps: kick it");
    assert!(!client.put(&request(2)).unwrap(), "it was kicked already");
    assert!(!server.about_to_sleep().unwrap(), "there is something to do");
    server.awake().unwrap();
    assert!(!client.put(&request(3)).unwrap());
    while server.take().unwrap().is_some() {}
    assert!(server.about_to_sleep().unwrap());
}
