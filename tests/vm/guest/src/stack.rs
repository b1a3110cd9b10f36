//! The whole stack on QEMU's drive, through the `cmbfs` command: mkfs, put, serve, read by a client, revoke, remount, check.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nvme_driver::vfio;

use crate::lab::{Case, Outcome, addresses, expect, pattern};

pub(crate) const CASES: &[(&str, Case)] = &[("whole-stack", whole_stack), ("copy-peer", copy_peer)];

/// Runs `cmbfs` and gives back what it printed; a failure is an error with its output.
pub(crate) fn cmbfs(args: &[&str]) -> Outcome<Vec<u8>> {
    let out = Command::new("/bin/cmbfs").args(args).output()?;
    let said = String::from_utf8_lossy(&out.stderr);
    if !said.is_empty() {
        println!("cmbfs {}: {}", args.join(" "), said.trim_end());
    }
    expect(out.status.success(), format!("cmbfs {} failed: {} {said}", args.join(" "), out.status))?;
    Ok(out.stdout)
}

/// A server process; killed when dropped.
pub(crate) struct Server(Child);

impl Server {
    pub(crate) fn start(device: &str, socket: &str, options: &[&str]) -> Outcome<Self> {
        // One that was killed leaves its socket behind, and this is to wait for the new one's.
        let _ = std::fs::remove_file(socket);
        let child = Command::new("/bin/cmbfs")
            .args(["serve", device, "--socket", socket, "--placement", "cmb"])
            .args(options)
            .stdout(Stdio::null())
            .spawn()?;
        let mut server = Self(child);
        let deadline = Instant::now() + Duration::from_secs(30);
        while !Path::new(socket).exists() {
            expect(server.0.try_wait()?.is_none(), "the server ended")?;
            expect(Instant::now() < deadline, "the server does not listen")?;
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Asks the server what it did.
fn status_has(words: &[&str]) -> Outcome {
    let said = String::from_utf8_lossy(&cmbfs(&["status", "--socket", "/tmp/sock"])?).into_owned();
    println!("{said}");
    for word in words {
        expect(said.contains(word), format!("the status does not say {word:?}"))?;
    }
    Ok(())
}

fn whole_stack() -> Outcome {
    let address = addresses()?[0];
    vfio::bind(address)?;
    let device = format!("pci:{address}");
    let bytes = pattern(77, 700_000);
    std::fs::write("/tmp/local", &bytes)?;
    println!("{}", String::from_utf8_lossy(&cmbfs(&["identify", &device])?));
    cmbfs(&["mkfs", &device, "--force"])?;
    cmbfs(&["put", &device, "/tmp/local", "/one"])?;
    expect(cmbfs(&["cat", &device, "/one"])? == bytes, "read directly: differs")?;
    {
        let _server = Server::start(&device, "/tmp/sock", &[])?;
        expect(
            cmbfs(&["cat", "--socket", "/tmp/sock", "/one"])? == bytes,
            "read through the server: differs",
        )?;
        // The path it took: 700,000 bytes in windows of 256 KiB.
        status_has(&["windows      3 in the CMB, 0 in the host cache"])?;
        cmbfs(&["revoke", "--socket", "/tmp/sock", "/one"])?;
        expect(
            cmbfs(&["cat", "--socket", "/tmp/sock", "/one"])? == bytes,
            "read after a revocation: differs",
        )?;
        cmbfs(&["put", "--socket", "/tmp/sock", "/tmp/local", "/two"])?;
        // What was revoked is read from the host cache; what was put there was written to the drive from the CMB.
        status_has(&["revocations  3,", "revoked", "write-back"])?;
        // The server is killed here, not shut down.
    }
    println!("{}", String::from_utf8_lossy(&cmbfs(&["check", &device])?));
    expect(cmbfs(&["cat", &device, "/one"])? == bytes, "after a remount: differs")?;
    expect(cmbfs(&["cat", &device, "/two"])? == bytes, "put through the server, after a remount: differs")
}

/// A file from drive to drive: the first one reads it into its CMB, the second one writes from there, through the IOMMU.
fn copy_peer() -> Outcome {
    let [a, b] = addresses()?;
    vfio::bind(a)?;
    vfio::bind(b)?;
    let (a, b) = (format!("pci:{a}"), format!("pci:{b}"));
    println!("{}", String::from_utf8_lossy(&cmbfs(&["peers", "--explain", &b, &a])?));
    let bytes = pattern(78, 3 << 20);
    std::fs::write("/tmp/local", &bytes)?;
    cmbfs(&["mkfs", &a, "--force"])?;
    cmbfs(&["mkfs", &b, "--force"])?;
    cmbfs(&["put", &a, "/tmp/local", "/from"])?;
    let said = String::from_utf8_lossy(&cmbfs(&["copy", "--peer", &a, "/from", &b, "/to"])?).into_owned();
    println!("{said}");
    expect(said.contains("peer to peer: 3 MiB"), "not all of it went from drive to drive")?;
    expect(cmbfs(&["cat", &b, "/to"])? == bytes, "the copy differs")
}
