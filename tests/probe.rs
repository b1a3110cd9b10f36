//! `cmbfs probe`: every line is measured, and nothing on the drives changes. No figure is compared with another: this machine is busy.

use cmbfs_tests::{Lab, pattern};

const A: &str = "emu:a.img?cmb=2M&size=64M";
const B: &str = "emu:b.img?cmb=0&size=64M";

#[test]
fn every_access_is_measured_and_the_drives_stay_as_they_were() {
    let lab = Lab::new(env!("CARGO_BIN_EXE_cmbfs"));
    let bytes = pattern(1, 3_000_000);
    lab.file("in", &bytes);
    for device in [A, B] {
        lab.ok(&["mkfs", device]);
        lab.ok(&["put", device, "in", "/f"]);
    }
    let out = lab.ok(&["probe", A, "--peer", B, "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&out).unwrap();
    let rows = report["access"].as_array().unwrap();
    let measured: Vec<_> =
        rows.iter().map(|r| (r["memory"].as_str().unwrap(), r["bytes"].as_u64().unwrap())).collect();
    let expected = [8, 64, 4096].map(|n| ("CMB", n)).into_iter();
    assert_eq!(measured, expected.chain([8, 64, 4096].map(|n| ("host memory", n))).collect::<Vec<_>>());
    for row in rows.iter().filter(|r| r["bytes"] == 4096) {
        assert!(row["read_ns"].as_u64() > Some(0) && row["write_ns"].as_u64() > Some(0), "{row}");
    }
    let dma = report["dma"].as_array().unwrap();
    assert_eq!(dma.len(), 4);
    assert!(dma.iter().all(|d| d["bytes_per_second"].as_u64() > Some(0)), "{report}");
    assert!(["CMB", "host cache"].contains(&report["auto"].as_str().unwrap()), "{report}");
    let text = String::from_utf8(lab.ok(&["probe", A])).unwrap();
    assert!(text.contains("auto: ") && text.contains("host memory"), "{text}");
    for device in [A, B] {
        assert!(lab.ok(&["cat", device, "/f"]) == bytes, "{device} changed");
        lab.ok(&["check", device]);
    }
    assert!(lab.fails(1, &["probe", B]).stderr.contains("no CMB"));
}
