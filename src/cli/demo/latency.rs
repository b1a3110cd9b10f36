//! How long reads took.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::cli::failure::Failure;

/// Durations, in buckets of 1% width.
pub(super) struct Latencies(Histogram<u64>);

/// What is told of them.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Summary {
    pub(super) reads: u64,
    pub(super) p50_ns: u64,
    pub(super) p99_ns: u64,
    pub(super) max_ns: u64,
}

impl Latencies {
    pub(super) fn new() -> Result<Self, Failure> {
        Ok(Self(Histogram::new_with_bounds(1, 60_000_000_000, 2)?))
    }

    pub(super) fn add(&mut self, took: Duration) {
        self.0.saturating_record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    pub(super) fn summary(&self) -> Summary {
        Summary {
            reads: self.0.len(),
            p50_ns: self.0.value_at_quantile(0.5),
            p99_ns: self.0.value_at_quantile(0.99),
            max_ns: self.0.max(),
        }
    }
}

impl Summary {
    /// Several processes as one: counts add up, the percentiles are those of the slowest.
    pub(super) fn worst(all: &[Self]) -> Self {
        all.iter().fold(Self::default(), |a, b| Self {
            reads: a.reads + b.reads,
            p50_ns: a.p50_ns.max(b.p50_ns),
            p99_ns: a.p99_ns.max(b.p99_ns),
            max_ns: a.max_ns.max(b.max_ns),
        })
    }
}
