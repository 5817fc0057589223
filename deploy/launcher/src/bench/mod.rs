//! `phalanx bench`: how fast a running server is, or with `--engine` how fast the workers are without a gateway.

mod engine;
mod serving;
pub(crate) mod sse;

use anyhow::Result;
use hdrhistogram::Histogram;
use serde::Serialize;

use crate::cli::BenchArgs;

/// Longest time that is told apart, in microseconds.
const LONGEST_US: u64 = 3_600_000_000;

/// Measures and prints a table, or JSON.
pub(crate) async fn run(args: BenchArgs) -> Result<()> {
    if args.engine { engine::run(args).await } else { serving::run(args).await }
}

/// Percentiles of a time, in milliseconds.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Percentiles {
    p50: f64,
    p95: f64,
    p99: f64,
}

/// Times, gathered.
struct Times(Histogram<u64>);

impl Times {
    fn new() -> Result<Self> {
        Ok(Self(Histogram::new_with_bounds(1, LONGEST_US, 3)?))
    }

    fn record(&mut self, time: std::time::Duration) {
        self.0.saturating_record((time.as_micros() as u64).clamp(1, LONGEST_US));
    }

    fn percentiles(&self) -> Percentiles {
        let at = |quantile| self.0.value_at_quantile(quantile) as f64 / 1e3;
        Percentiles { p50: at(0.5), p95: at(0.95), p99: at(0.99) }
    }
}
