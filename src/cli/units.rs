//! Sizes and times as people read them.

use std::fmt;
use std::time::Duration;

/// A number of bytes in binary units: `17 B`, `4 KiB`, `1.5 GiB`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bytes(pub(crate) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        if self.0 < 1024 {
            return f.pad(&format!("{} B", self.0));
        }
        let mut value = self.0 as f64 / 1024.0;
        let mut unit = 0;
        // 1023.95 would print as 1024.0.
        while value >= 1023.95 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        let text = format!("{value:.1}");
        f.pad(&format!("{} {}", text.strip_suffix(".0").unwrap_or(&text), UNITS[unit]))
    }
}

/// A duration with three digits: `850 ns`, `12.3 us`, `4.56 ms`, `1.20 s`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Took(pub(crate) Duration);

impl fmt::Display for Took {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ns = self.0.as_nanos() as f64;
        let (value, unit) = match ns {
            ns if ns < 1e3 => return f.pad(&format!("{ns:.0} ns")),
            ns if ns < 1e6 => (ns / 1e3, "us"),
            ns if ns < 1e9 => (ns / 1e6, "ms"),
            ns => (ns / 1e9, "s"),
        };
        let digits = if value < 10.0 {
            2
        } else if value < 100.0 {
            1
        } else {
            0
        };
        f.pad(&format!("{value:.digits$} {unit}"))
    }
}

/// A number of things, each called by its noun: `1 window`, `3 windows`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Count(pub(crate) u64, pub(crate) &'static str);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{} {}{}", self.0, self.1, if self.0 == 1 { "" } else { "s" }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (1024 * 1024 - 1, "1 MiB"),
            (1 << 30, "1 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
        assert_eq!(format!("{:>8}", Bytes(4096)), "   4 KiB");
    }

    #[test]
    fn one_is_no_plural() {
        let said = [0, 1, 2].map(|n| Count(n, "window").to_string());
        assert_eq!(said, ["0 windows", "1 window", "2 windows"]);
    }

    #[test]
    fn times_read_well() {
        for (ns, text) in
            [(850, "850 ns"), (12_345, "12.3 us"), (4_560_000, "4.56 ms"), (1_200_000_000, "1.20 s")]
        {
            assert_eq!(Took(Duration::from_nanos(ns)).to_string(), text);
        }
    }
}
