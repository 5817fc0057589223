//! A token bucket: a pure function of what was taken and of the time that is passed in.

use std::time::{Duration, Instant};

/// So many units a minute, of which a whole minute's worth may be saved up.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Bucket {
    per_minute: u32,
    /// What is left; below zero after more was taken than there was.
    level: f64,
    /// When `level` was true.
    at: Instant,
}

impl Bucket {
    pub(super) fn full(per_minute: u32, now: Instant) -> Self {
        Self { per_minute, level: f64::from(per_minute), at: now }
    }

    /// Units a minute.
    pub(super) fn limit(&self) -> u32 {
        self.per_minute
    }

    /// Changes the limit; what was used of the old one stays used.
    pub(super) fn set_limit(&mut self, per_minute: u32, now: Instant) {
        let level = self.level_at(now) + f64::from(per_minute) - f64::from(self.per_minute);
        *self = Self { per_minute, level, at: now.max(self.at) };
    }

    /// Takes units even if there are fewer: the debt is paid back by waiting.
    pub(super) fn take(&mut self, units: f64, now: Instant) {
        self.level = self.level_at(now) - units;
        self.at = now.max(self.at);
    }

    /// Whole units that are left.
    pub(super) fn left(&self, now: Instant) -> u32 {
        // The cast saturates: a debt is nothing left.
        self.level_at(now) as u32
    }

    /// How long until a whole unit is there; zero when there is one.
    pub(super) fn wait(&self, now: Instant) -> Duration {
        self.wait_for(1.0, now)
    }

    /// How long until nothing counts as used any more.
    pub(super) fn until_full(&self, now: Instant) -> Duration {
        self.wait_for(f64::from(self.per_minute), now)
    }

    fn wait_for(&self, level: f64, now: Instant) -> Duration {
        let missing = (level - self.level_at(now)).max(0.0);
        Duration::try_from_secs_f64(missing * 60.0 / f64::from(self.per_minute.max(1))).unwrap_or(Duration::MAX)
    }

    /// Clocks of several threads may be passed in slightly out of order; then no time has passed.
    fn level_at(&self, now: Instant) -> f64 {
        let limit = f64::from(self.per_minute);
        let came = now.saturating_duration_since(self.at).as_secs_f64() * limit / 60.0;
        (self.level + came).min(limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minutes_worth_may_go_at_once_and_comes_back_evenly() {
        let start = Instant::now();
        let mut bucket = Bucket::full(60, start);
        for _ in 0..60 {
            assert_eq!(bucket.wait(start), Duration::ZERO);
            bucket.take(1.0, start);
        }
        assert_eq!((bucket.left(start), bucket.wait(start)), (0, Duration::from_secs(1)));
        assert_eq!(bucket.until_full(start), Duration::from_secs(60));
        let later = start + Duration::from_millis(2500);
        assert_eq!((bucket.left(later), bucket.wait(later)), (2, Duration::ZERO));
        assert_eq!(bucket.left(start + Duration::from_secs(3600)), 60, "no more than a minute's worth is saved up");
    }

    #[test]
    fn a_debt_is_paid_back_before_anything_is_left() {
        let start = Instant::now();
        let mut bucket = Bucket::full(600, start);
        bucket.take(900.0, start);
        assert_eq!(bucket.left(start), 0);
        assert_eq!(bucket.wait(start), Duration::from_millis(30_100));
        assert_eq!(bucket.left(start + Duration::from_secs(31)), 10);
    }

    #[test]
    fn over_any_span_no_more_is_taken_than_a_minutes_worth_and_the_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::full(120, start);
        let (mut taken, span_ms) = (0_u32, 90_000);
        for ms in (0..=span_ms).step_by(6) {
            let now = start + Duration::from_millis(ms);
            while bucket.wait(now).is_zero() {
                bucket.take(1.0, now);
                taken += 1;
            }
        }
        assert_eq!(taken, 120 + 180);
    }

    #[test]
    fn a_new_limit_keeps_what_was_used() {
        let start = Instant::now();
        let mut bucket = Bucket::full(60, start);
        bucket.take(50.0, start);
        bucket.set_limit(100, start);
        assert_eq!(bucket.left(start), 50);
        bucket.set_limit(10, start);
        assert_eq!((bucket.left(start), bucket.limit()), (0, 10));
        assert_eq!(bucket.until_full(start), Duration::from_secs(300));
    }
}
