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

#[test]
fn only_who_may_want_a_pmr_makes_one_and_a_new_image_gets_no_old_one() {
    let lab = Lab::new(env!("CARGO_BIN_EXE_cmbfs"));
    let kept = lab.path("disk.img.pmr");
    lab.ok(&["mkfs", "emu:disk.img?size=64M&cmb=4M"]);
    for command in [&["ls", DRIVE, "/"][..], &["mkdir", DRIVE, "/d"], &["check", DRIVE], &["identify", DRIVE]]
    {
        lab.ok(command);
        assert!(!kept.exists(), "{command:?} made a PMR");
    }
    assert_eq!(lab.serve(DRIVE, "s", &[]).stop(), Some(0));
    assert!(kept.exists(), "the server did not");

    std::fs::write(&kept, vec![7; 1 << 20]).unwrap();
    std::fs::remove_file(lab.path("disk.img")).unwrap();
    for drive in [DRIVE, "emu:disk.img?size=64M&cmb=4M"] {
        let said = lab.fails(1, &["mkfs", "--force", drive]).stderr;
        assert!(said.contains("disk.img.pmr") && said.contains("remove it"), "{said}");
        assert!(!lab.path("disk.img").exists(), "and left an image");
    }
    assert_eq!(std::fs::read(&kept).unwrap(), vec![7; 1 << 20]);
    std::fs::remove_file(&kept).unwrap();
    // Too small for a filesystem: neither file stays.
    lab.fails(1, &["mkfs", "emu:disk.img?size=100K&pmr=1M"]);
    assert!(!lab.path("disk.img").exists() && !kept.exists());
    lab.ok(&["mkfs", DRIVE]);
    assert_eq!(std::fs::read(&kept).unwrap(), vec![0; 1 << 20]);
    let help = String::from_utf8(lab.ok(&["--help"])).unwrap();
    for name in ["size=", "cmb=", "pmr=", "lba=", "cache="] {
        assert!(help.contains(name), "{name} is not in the help");
    }
}
