//! Everything that the coordinator counts beside the engine's own totals. `Watch` reports them; the gateway's
//! `/metrics` shows them.

use std::time::Duration;

use phalanx_proto::v1;

/// Totals of one deployment since the coordinator started.
#[derive(Clone, Debug, Default)]
pub(crate) struct Instruments {
    /// From when the ranks could begin a step to when the last one answered.
    step: Duration,
    /// What rank 0 spent in steps, and within that in collectives and in sampling.
    execute_us: u64,
    collective_us: u64,
    sample_us: u64,
    /// Requests refused before they reached the engine.
    pub refused: u64,
    /// Epochs that ended because a rank was lost, hung or differed.
    pub failed_epochs: u64,
    /// Checks of the engine's books while idle, and those that found a mistake.
    pub integrity_checks: u64,
    pub integrity_failures: u64,
}

impl Instruments {
    /// Counts one completed step.
    pub(crate) fn step(&mut self, took: Duration, timing: Option<&v1::StepTiming>) {
        self.step += took;
        if let Some(timing) = timing {
            self.execute_us += timing.execute_us;
            self.collective_us += timing.collective_us;
            self.sample_us += timing.sample_us;
        }
    }

    /// Adds these totals to the engine's.
    pub(crate) fn add_to(&self, totals: &mut v1::Totals) {
        totals.step_us = self.step.as_micros() as u64;
        totals.execute_us = self.execute_us;
        totals.collective_us = self.collective_us;
        totals.sample_us = self.sample_us;
        totals.refused += self.refused;
        totals.failed_epochs = self.failed_epochs;
        totals.integrity_checks = self.integrity_checks;
        totals.integrity_failures = self.integrity_failures;
    }
}
