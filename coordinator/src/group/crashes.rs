//! Failed epochs of the last minute: how long to wait before the next one, and when to call the group degraded.

use std::{collections::VecDeque, time::Duration};

/// How far back failures count.
const MEMORY: Duration = Duration::from_secs(60);
/// More failures than this within [`MEMORY`] and the group is degraded, though it may well serve.
const TOLERATED: usize = 5;
/// An epoch that ran for this long had nothing wrong with it: what ended it came from outside, and the next one need not
/// wait for whatever else had failed before.
const SOUND: Duration = Duration::from_secs(1);
/// Waits between the second failure in a row and the third, and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// Failed epochs, oldest first.
#[derive(Debug, Default)]
pub(super) struct Crashes {
    recent: VecDeque<Duration>,
    /// Without a sound epoch in between.
    in_a_row: u32,
}

impl Crashes {
    /// Counts the failure of an epoch that ran for `ran` (nothing if it was never formed), and gives how long to wait
    /// before the next one: the first is repaired at once, later ones wait longer each time.
    pub(super) fn record(&mut self, now: Duration, ran: Duration) -> Duration {
        self.recent.retain(|&then| now.saturating_sub(then) <= MEMORY);
        if ran >= SOUND || self.recent.is_empty() {
            self.in_a_row = 0;
        }
        self.recent.push_back(now);
        self.in_a_row += 1;
        match self.in_a_row {
            0 | 1 => Duration::ZERO,
            crashes => BACKOFF.0.saturating_mul(1 << (crashes - 2).min(16)).min(BACKOFF.1),
        }
    }

    /// The number of failures within the last minute, if they are too many.
    pub(super) fn too_many(&self, now: Duration) -> Option<usize> {
        let recent = self.recent.iter().filter(|&&then| now.saturating_sub(then) <= MEMORY).count();
        (recent > TOLERATED).then_some(recent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_first_failure_is_repaired_at_once_and_later_ones_wait_longer() {
        let mut crashes = Crashes::default();
        let waits: Vec<u128> = (0..10).map(|_| crashes.record(SECOND, Duration::ZERO).as_millis()).collect();
        assert_eq!(waits, [0, 100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        assert_eq!(crashes.record(62 * SECOND, Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn a_sound_epoch_in_between_ends_the_row() {
        let mut crashes = Crashes::default();
        for _ in 0..4 {
            crashes.record(SECOND, Duration::ZERO);
        }
        assert_eq!(crashes.record(3 * SECOND, SECOND), Duration::ZERO);
        assert_eq!(crashes.record(4 * SECOND, SECOND / 2), BACKOFF.0);
    }

    #[test]
    fn more_than_five_failures_in_a_minute_are_too_many_however_long_each_epoch_ran() {
        let mut crashes = Crashes::default();
        for second in 0..5 {
            crashes.record(second * 5 * SECOND, 2 * SECOND);
            assert_eq!(crashes.too_many(second * 5 * SECOND), None);
        }
        crashes.record(25 * SECOND, 2 * SECOND);
        assert_eq!(crashes.too_many(60 * SECOND), Some(6));
        assert_eq!(crashes.too_many(61 * SECOND), None);
    }
}
