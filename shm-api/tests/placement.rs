//! Placements are kept with files and filesystems, and whose word counts.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod common;
#[path = "common/four.rs"]
mod four;

use common::{SMALL, Serving, options, until};
use extent_fs::{Filesystem, FormatOptions, MountOptions};
use four::{four_windows, map_four, pattern};
use nvme_driver::Device;
use nvme_driver::disk::Disk;
use shm_api::client::{Client, ClientError, File, OpenMode};
use shm_api::protocol::ErrorCode;
use shm_api::server::ServerOptions;
use shm_api::{PlacedBy, Placement};

const WINDOW: usize = SMALL.window;

/// A device that outlives its servers, with a filesystem of this placement.
fn device(placement: Option<Placement>) -> Device {
    let device = nvme_driver::open(&SMALL.url.parse().unwrap(), &Default::default()).unwrap();
    let options = FormatOptions { placement: Placement::kept(placement), ..Default::default() };
    common::format(&mut device.disk().unwrap(), options);
    device
}

fn mount(device: &Device, read_only: bool) -> Filesystem<Box<dyn Disk>> {
    Filesystem::mount(device.disk().unwrap(), MountOptions { read_only, ..Default::default() }).unwrap()
}

fn serve(device: &Device) -> Serving {
    Serving::over(mount(device, false), SMALL)
}

fn serve_with(device: &Device, placement: Placement) -> Serving {
    Serving::with(mount(device, false), |socket| ServerOptions { placement, ..options(socket, SMALL) })
}

/// How many of the file's four windows are read from the CMB, if they are asked for there.
fn in_cmb(file: &File) -> u64 {
    let mapped = map_four(file);
    mapped.prefer_cmb().unwrap();
    four::in_cmb(&mapped)
}

fn placed(client: &Client, path: &str) -> (Placement, PlacedBy) {
    let stat = client.stat(path).unwrap();
    (stat.placement, stat.placed_by)
}

fn code(result: Result<impl Sized, ClientError>) -> Option<ErrorCode> {
    result.err().and_then(|e| e.code())
}

#[test]
fn a_files_choice_is_on_the_drive_when_it_is_made_and_counts_in_the_next_server() {
    let device = device(None);
    {
        let serving = serve(&device);
        let client = serving.client();
        assert_eq!(in_cmb(&four_windows(&client, "/a")), 4);
        four_windows(&client, "/b");
        client.set_placement("/a", Placement::Host).unwrap();
        assert_eq!(placed(&client, "/a"), (Placement::Host, PlacedBy::File));
        // While that server still runs, and without a commit: it is in the log.
        let kept = mount(&device, true);
        let [a, b] = ["/a", "/b"].map(|path| kept.stat(kept.lookup(path).unwrap()).unwrap().placement);
        assert_eq!((a, b), (Placement::kept(Some(Placement::Host)), Placement::kept(None)));
        client.rename("/a", "/moved").unwrap();
    }
    let serving = serve(&device);
    let client = serving.client();
    let open = |path| client.open(path, OpenMode::read()).unwrap();
    assert_eq!((in_cmb(&open("/moved")), in_cmb(&open("/b"))), (0, 4));
    assert_eq!(placed(&client, "/moved"), (Placement::Host, PlacedBy::File));
    assert_eq!(placed(&client, "/b"), (Placement::Auto, PlacedBy::Nobody));
    // It takes its choice back.
    client.set_placement("/moved", None).unwrap();
    assert_eq!(placed(&client, "/moved"), (Placement::Auto, PlacedBy::Nobody));
    until("it goes back", || in_cmb(&open("/moved")) == 4);
}

#[test]
fn no_byte_of_a_filesystem_that_opted_out_goes_through_the_cmb_whoever_wants_it() {
    let device = device(Some(Placement::Host));
    let serving = serve(&device);
    let client = serving.client();
    let file = four_windows(&client, "/a");
    assert_eq!(placed(&client, "/a"), (Placement::Host, PlacedBy::Filesystem));
    assert_eq!(client.status().unwrap().placement, Placement::Host);
    assert_eq!(in_cmb(&file), 0);
    // Written back and read anew.
    client.revoke("/a").unwrap();
    file.write_at(0, &pattern(4 * WINDOW)).unwrap();
    assert_eq!(file.commit().unwrap().from_cmb, 0);
    assert_eq!(in_cmb(&file), 0);
    // A peer gets the bytes through host memory, and is told why.
    let held = file.map_read(0, 4 * WINDOW as u64).unwrap();
    let peer = client.attach_peer(WINDOW as u64).unwrap();
    for n in 0..4 {
        let moved = peer.read(&file, n * WINDOW as u64, 0, WINDOW as u64).unwrap();
        assert_eq!((moved.direct, moved.reason.as_str()), (false, "asked for"));
        let mut got = vec![0; WINDOW];
        peer.local().read(0, &mut got).unwrap();
        let from = n as usize * WINDOW;
        assert!(got == pattern(4 * WINDOW)[from..from + WINDOW], "window {n} differs");
    }
    drop(held);
    let status = client.status().unwrap();
    assert_eq!((status.cmb_windows, status.cmb_used), (0, 0));
    let by = |path: &str| status.paths.iter().filter(|p| p.path == path).map(|p| p.bytes).sum::<u64>();
    assert_eq!((by("CMB"), by("peer to peer"), by("bounce")), (0, 0, 4 * WINDOW as u64), "{status:?}");
    let drive = device.emulated().unwrap().counters();
    assert_eq!((drive.drive_to_cmb, drive.cmb_to_drive), (0, 0), "the drive's own count");
    // One file of it opts in, and nothing else.
    client.open("/b", OpenMode::create()).unwrap();
    client.set_placement("/b", Placement::Cmb).unwrap();
    assert_eq!(in_cmb(&four_windows(&client, "/b")), 4);
    assert_eq!((in_cmb(&file), placed(&client, "/b")), (0, (Placement::Cmb, PlacedBy::File)));
}

#[test]
fn a_filesystem_opts_out_under_its_server_and_in_again() {
    let device = device(None);
    {
        let serving = serve(&device);
        let client = serving.client();
        let (a, b) = (four_windows(&client, "/a"), four_windows(&client, "/b"));
        client.set_placement("/b", Placement::Cmb).unwrap();
        assert_eq!((in_cmb(&a), in_cmb(&b)), (4, 4));
        assert!(client.set_placement("/", Placement::Host).unwrap().windows >= 4);
        assert_eq!(in_cmb(&a), 0);
        assert_eq!(placed(&client, "/a"), (Placement::Host, PlacedBy::Filesystem));
        until("the file that asked for it is back", || in_cmb(&b) == 4);
        assert_eq!(in_cmb(&four_windows(&client, "/new")), 0);
        client.mkdir("/d", 0o755).unwrap();
        assert_eq!(code(client.set_placement("/d", Placement::Host)), Some(ErrorCode::IsADirectory));
    }
    let serving = serve(&device);
    let client = serving.client();
    let a = client.open("/a", OpenMode::read()).unwrap();
    assert_eq!((in_cmb(&a), placed(&client, "/")), (0, (Placement::Host, PlacedBy::Filesystem)));
    client.set_placement("/", Placement::Auto).unwrap();
    until("it goes back", || in_cmb(&a) == 4);
    assert_eq!(placed(&client, "/a"), (Placement::Auto, PlacedBy::Filesystem));
}

#[test]
fn what_a_server_was_told_goes_before_what_files_say() {
    let device = device(None);
    {
        let serving = serve_with(&device, Placement::Host);
        let client = serving.client();
        let file = four_windows(&client, "/a");
        client.set_placement("/a", Placement::Cmb).unwrap();
        assert_eq!((in_cmb(&file), placed(&client, "/a")), (0, (Placement::Host, PlacedBy::Server)));
        assert_eq!(
            (client.status().unwrap().cmb_used, client.status().unwrap().placement),
            (0, Placement::Host)
        );
        four_windows(&client, "/b");
        client.set_placement("/b", Placement::Host).unwrap();
    }
    {
        let serving = serve_with(&device, Placement::Cmb);
        let client = serving.client();
        let file = client.open("/b", OpenMode::read()).unwrap();
        assert_eq!((in_cmb(&file), placed(&client, "/b")), (4, (Placement::Cmb, PlacedBy::Server)));
    }
    // Both choices were kept all the same.
    let serving = serve(&device);
    let client = serving.client();
    let open = |path| client.open(path, OpenMode::read()).unwrap();
    assert_eq!((in_cmb(&open("/a")), in_cmb(&open("/b"))), (4, 0));
}

#[test]
fn a_filesystem_mounted_read_only_keeps_its_choices_and_says_why() {
    let device = device(None);
    {
        let serving = serve(&device);
        four_windows(&serving.client(), "/a");
    }
    let serving = Serving::over(mount(&device, true), SMALL);
    let client = serving.client();
    for path in ["/a", "/"] {
        let refused = client.set_placement(path, Placement::Host).unwrap_err();
        assert_eq!(refused.code(), Some(ErrorCode::ReadOnly), "{refused}");
        assert!(refused.to_string().contains("mounted read-only"), "{refused}");
    }
    assert_eq!(placed(&client, "/a"), (Placement::Auto, PlacedBy::Nobody));
    assert_eq!(in_cmb(&client.open("/a", OpenMode::read()).unwrap()), 4);
}
