//! Header and VERSION (protocol specification, "Header", "VFIO_USER_VERSION").
use std::io::Write;

use nvme_driver::vfio_user::{Header, command};

use crate::raw::{Client, Served, words};

#[test]
fn version_with_and_without_json() {
    let served = Served::new();
    for body in [
        &b"\0\0\x01\0"[..],
        b"\0\0\x01\0\0",
        b"\0\0\x01\0{}\0",
        b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":8,\"twin_socket\":true}}\0",
    ] {
        let mut client = Client::open(&served.path);
        let reply = client.ok(command::VERSION, body, &[]);
        assert_eq!(&reply[..2], [0, 0]);
        assert!(String::from_utf8_lossy(&reply[4..]).contains("max_data_xfer_size"));
        client.ok(command::DEVICE_GET_INFO, &words(&[16, 0, 0, 0]), &[]);
    }
}

#[test]
fn a_broken_handshake_is_hung_up_on() {
    let served = Served::new();
    for body in [&b"\x01\0\0\0{}\0"[..], b"\0\0", b"\0\0\0\0{{{"] {
        let mut client = Client::open(&served.path);
        client.send(Header::command(1, command::VERSION, body.len()), body, &[]);
        assert!(client.is_closed(), "{body:?}");
    }
    let mut client = Client::open(&served.path);
    client.send(Header::command(1, command::DEVICE_GET_INFO, 16), &words(&[16, 0, 0, 0]), &[]);
    assert!(client.is_closed(), "a command before VERSION");
    served.connect();
}

#[test]
fn impossible_sizes_and_types_end_the_connection_only() {
    let served = Served::new();
    for (size, flags) in [(0u32, 0), (15, 0), (u32::MAX, 0), (1 << 24, 0), (16, 1), (16, 7)] {
        let mut client = served.connect();
        let header = Header { id: 1, command: command::DEVICE_RESET, size, flags, error: 0 };
        client.send(header, &[], &[]);
        assert!(client.is_closed(), "size {size} flags {flags}");
    }
    let mut half = served.connect();
    half.stream.write_all(&[1, 2, 3]).unwrap();
    drop(half);
    served.connect();
}

#[test]
fn unknown_commands_get_an_error() {
    let served = Served::new();
    let mut client = served.connect();
    for unknown in
        [0, command::DEVICE_GET_REGION_IO_FDS, command::DMA_READ, command::DMA_WRITE, 14, 16, 999, u16::MAX]
    {
        assert_eq!(client.err(unknown, &[1, 2, 3], &[]), libc::EOPNOTSUPP, "command {unknown}");
    }
    assert_eq!(client.err(command::VERSION, b"\0\0\0\0", &[]), libc::EINVAL, "VERSION twice");
}

#[test]
fn no_reply_is_honoured() {
    let served = Served::new();
    let mut client = served.connect();
    // One that succeeds, one that fails, one that nobody knows: none is answered.
    client.send(
        Header::command(1, command::DEVICE_GET_INFO, 16).without_reply(),
        &words(&[16, 0, 0, 0]),
        &[],
    );
    client.send(Header::command(2, command::REGION_READ, 0).without_reply(), &[], &[]);
    client.send(Header::command(3, 99, 0).without_reply(), &[], &[]);
    client.ok(command::DEVICE_GET_INFO, &words(&[16, 0, 0, 0]), &[]);
}

#[test]
fn without_agreement_there_is_no_write_multi() {
    let served = Served::new();
    let mut client = Client::open(&served.path);
    client.ok(command::VERSION, b"\0\0\0\0", &[]);
    assert_eq!(client.err(command::REGION_WRITE_MULTI, &[0; 8], &[]), libc::EOPNOTSUPP);
}
