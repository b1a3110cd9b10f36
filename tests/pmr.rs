//! A drive's Persistent Memory Region, from the URL to a client: what was committed survives the server, however that ends.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed step fails the test")]

use cmbfs::Client;
use cmbfs_tests::Lab;

const DRIVE: &str = "emu:disk.img?size=64M&cmb=4M&pmr=1M";

#[test]
fn a_pmr_is_served_and_keeps_what_was_committed_when_the_server_is_killed() {
    let lab = Lab::new(env!("CARGO_BIN_EXE_cmbfs"));
    lab.ok(&["mkfs", DRIVE]);
    let server = lab.serve(DRIVE, "s", &[]);
    {
        let pmr = Client::connect(lab.path("s")).unwrap().pmr().unwrap();
        assert_eq!(pmr.size().unwrap(), 1 << 20);
        let mapped = pmr.map(300_000, 9).unwrap();
        mapped.write(0, b"committed").unwrap();
        assert_eq!(pmr.revoke_window(300_000).unwrap().windows, 1);
        mapped.write(0, b"twice").unwrap();
        pmr.commit().unwrap();
        let status = String::from_utf8(lab.ok(&["status", "--socket", "s"])).unwrap();
        assert!(status.contains("1 MiB of devices"), "{status}");
    }
    server.kill();
    assert_eq!(std::fs::read(lab.path("disk.img.pmr")).unwrap()[300_000..300_009], *b"twicetted");
    let server = lab.serve(DRIVE, "s", &[]);
    let pmr = Client::connect(lab.path("s")).unwrap().pmr().unwrap();
    let mut got = [0; 9];
    pmr.read_at(300_000, &mut got).unwrap();
    assert_eq!(&got, b"twicetted");
    drop(pmr);
    assert_eq!(server.stop(), Some(0));
    // The drive is as good without it, and nothing of it goes.
    lab.ok(&["ls", "emu:disk.img?cmb=4M", "/"]);
    assert!(lab.path("disk.img.pmr").exists());
    let said = lab.fails(1, &["ls", "emu:disk.img?pmr=2M", "/"]).stderr;
    assert!(said.contains("keeps a PMR of 1048576 bytes"), "{said}");
}

#[test]
fn the_pmr_of_a_drive_in_another_process_is_served_too() {
    let lab = Lab::new(env!("CARGO_BIN_EXE_cmbfs"));
    lab.ok(&["mkfs", DRIVE]);
    std::fs::create_dir(lab.path("run")).unwrap();
    let _drive = lab.emulate("disk.img?cmb=4M&pmr=1M", "run/cntrl");
    let server = lab.serve("vfio-user:run/cntrl", "s", &[]);
    let pmr = Client::connect(lab.path("s")).unwrap().pmr().unwrap();
    pmr.direct_access().unwrap();
    pmr.write_at(5000, b"kept").unwrap();
    pmr.commit().unwrap();
    server.kill();
    assert_eq!(std::fs::read(lab.path("disk.img.pmr")).unwrap()[5000..5004], *b"kept");
}
