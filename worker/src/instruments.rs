//! What a worker measures: where the time of each step went. It travels with the step's result; the coordinator adds it
//! up. No decision depends on it.

use std::time::{Duration, Instant};

use phalanx_proto::v1::StepTiming;

/// Measures the steps of one epoch, one after the other.
#[derive(Debug, Default)]
pub struct StepClock {
    /// End of the step before.
    ended: Option<Instant>,
}

/// One step that is being measured.
#[derive(Debug)]
pub struct StepTimer {
    started: Instant,
    idle: Duration,
    executed: Option<Instant>,
    collective: Duration,
}

impl StepClock {
    /// A step starts.
    pub fn start(&self) -> StepTimer {
        let started = Instant::now();
        let idle = self.ended.map_or(Duration::ZERO, |ended| started - ended);
        StepTimer { started, idle, executed: None, collective: Duration::ZERO }
    }

    /// The step has ended.
    pub fn stop(&mut self, timer: &StepTimer) -> StepTiming {
        let ended = Instant::now();
        self.ended = Some(ended);
        let executed = timer.executed.unwrap_or(ended);
        StepTiming {
            execute_us: micros(executed - timer.started),
            collective_us: micros(timer.collective),
            sample_us: micros(ended - executed),
            idle_us: micros(timer.idle),
        }
    }
}

impl StepTimer {
    /// The model has given its logits, after `collective` spent in sums over the group. Sampling follows.
    pub fn executed(&mut self, collective: Duration) {
        self.executed = Some(Instant::now());
        self.collective = collective;
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
