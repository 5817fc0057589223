//! How fast tokens are served, and what that says to those who are refused.

use std::time::Duration;

/// Seconds of work after which an old measurement counts about a third.
const MEMORY_S: f64 = 10.0;
/// Seconds of work below which nothing is known yet.
const LEAST_S: f64 = 0.1;

/// Tokens served while there was work: both sums fade with the time that was worked.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Throughput {
    tokens: f64,
    seconds: f64,
    /// When the last result came.
    last: Duration,
}

impl Throughput {
    /// Counts a step that was planned at `planned_at` and whose result is there at `now`. Steps overlap: a step's time
    /// begins with the result before it.
    pub(super) fn record(&mut self, tokens: usize, planned_at: Duration, now: Duration) {
        let worked = now.saturating_sub(planned_at.max(self.last)).as_secs_f64();
        self.last = now;
        let kept = (-worked / MEMORY_S).exp();
        self.tokens = self.tokens * kept + tokens as f64;
        self.seconds = self.seconds * kept + worked;
    }

    /// Tokens a second, if enough work was seen.
    pub(super) fn per_second(&self) -> Option<f64> {
        (self.seconds >= LEAST_S && self.tokens > 0.0).then(|| self.tokens / self.seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_time_with_work_counts_and_new_work_counts_more() {
        let mut throughput = Throughput::default();
        assert_eq!(throughput.per_second(), None);
        let mut now = Duration::ZERO;
        let mut work = |tokens, idle_s| {
            let planned_at = now + Duration::from_secs(idle_s);
            now = planned_at + Duration::from_millis(100);
            throughput.record(tokens, planned_at, now);
            throughput.per_second().unwrap()
        };
        for _ in 0..50 {
            assert!((work(10, 3) - 100.0).abs() < 1e-6, "10 tokens in 0.1 s, whatever lies between");
        }
        let later = (0..300).fold(0.0, |_, _| work(100, 0));
        assert!((900.0..1000.0).contains(&later), "a tenth of a minute ago says little: {later}");
    }
}
