//! SIGTERM ends a server in an orderly way. Without the test harness, because its threads would take the signal.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod common;

use std::path::Path;
use std::process::{Command, ExitCode};

use common::{Process, SMALL, connect};
use rustix::process::{Pid, Signal, kill_process};
use shm_api::client::OpenMode;

fn main() -> ExitCode {
    if let Some((_, args)) = common::role() {
        let server = shm_api::server::Server::new(
            common::filesystem(&args[1]),
            common::options(Path::new(&args[0]), SMALL),
        );
        server.unwrap().stop_on_signals().unwrap().run().unwrap();
        return ExitCode::SUCCESS;
    }
    // The lines that the usual harness prints, for whoever reads them.
    println!("\nrunning 2 tests");
    let tests: [(&str, fn()); 2] = [
        ("what_was_not_committed_is_written_back", what_was_not_committed_is_written_back),
        ("an_idle_server_uses_no_processor_time", an_idle_server_uses_no_processor_time),
    ];
    let mut failed = 0;
    for (name, test) in tests {
        let ok = std::panic::catch_unwind(test).is_ok();
        println!("test {name} ... {}", if ok { "ok" } else { "FAILED" });
        failed += usize::from(!ok);
    }
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {verdict}. {} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
        tests.len() - failed
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn serve(socket: &Path, url: &str) -> Process {
    let args = format!("{}\n{url}", socket.display());
    let mut command = Command::new(std::env::current_exe().unwrap());
    Process(command.env("CMBFS_TEST_ROLE", "serve").env("CMBFS_TEST_ARGS", args).spawn().unwrap())
}

fn what_was_not_committed_is_written_back() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("emu:{}?cmb=4M&size=64M", dir.path().join("disk.img").display());
    let socket = dir.path().join("s");
    let mut server = serve(&socket, &url);
    let client = connect(&socket);
    let file = client.open("/a", OpenMode::create()).unwrap();
    file.write_at(0, &[5; 100_000]).unwrap();
    kill_process(Pid::from_child(&server.0), Signal::TERM).unwrap();
    assert!(server.0.wait().unwrap().success());
    assert!(!socket.exists(), "it took its socket along");
    assert!(!client.server_lives());
    let mut fs = common::filesystem(&url);
    let ino = fs.lookup("/a").unwrap();
    let mut got = vec![0; 100_000];
    assert_eq!(fs.read_at(ino, 0, &mut got).unwrap(), 100_000);
    assert!(got.iter().all(|&b| b == 5));
}

/// Clock ticks (10 ms) of processor time that a process has used.
fn ticks(process: &Process) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.0.id())).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

fn an_idle_server_uses_no_processor_time() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let server = serve(&socket, "emu:ram?size=16M&cmb=1M");
    let client = connect(&socket);
    let file = client.open("/a", OpenMode::create()).unwrap();
    let mapped = file.map(0, 65536).unwrap();
    mapped.write(0, &[1; 65536]).unwrap();
    client.revoke("/a").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    let before = ticks(&server);
    std::thread::sleep(std::time::Duration::from_millis(1000));
    let used = ticks(&server) - before;
    assert!(used <= 2, "{used} ticks of 10 ms in a second of nothing to do");
}
