//! Figures of the last minute, for `/stats`.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use hdrhistogram::{CreationError, Histogram};
use serde_json::{Value, json};

/// The window is this many slots of this length; it moves slot by slot.
const SLOTS: usize = 12;
const SLOT: Duration = Duration::from_secs(5);
/// Longest latency that is told apart, in microseconds: one hour.
const MAX_LATENCY_US: u64 = 3_600_000_000;

/// Counts since the start, and a sliding window.
pub(crate) struct Stats {
    state: Mutex<State>,
}

struct State {
    began: Instant,
    requests: u64,
    errors: u64,
    cancelled: u64,
    by_profile: BTreeMap<String, u64>,
    slots: VecDeque<Slot>,
    /// Two significant digits are what a percentile of a minute is worth.
    empty: Histogram<u64>,
}

/// What happened in one slot of the window.
struct Slot {
    began: Instant,
    requests: u64,
    errors: u64,
    prompt_tokens: u64,
    generation_tokens: u64,
    /// Microseconds.
    first_token: Histogram<u64>,
    /// Microseconds.
    end_to_end: Histogram<u64>,
}

impl Stats {
    /// # Errors
    /// Never with the precision used here.
    pub(crate) fn new(now: Instant) -> Result<Self, CreationError> {
        let empty = Histogram::new_with_max(MAX_LATENCY_US, 2)?;
        let state = State {
            began: now,
            requests: 0,
            errors: 0,
            cancelled: 0,
            by_profile: BTreeMap::new(),
            slots: VecDeque::new(),
            empty,
        };
        Ok(Self { state: Mutex::new(state) })
    }

    /// Counts a request that asked for tokens.
    pub(crate) fn began(&self, now: Instant, profile: &str) {
        let mut state = self.lock();
        state.requests += 1;
        *state.by_profile.entry(profile.to_owned()).or_default() += 1;
        state.slot(now).requests += 1;
    }

    /// Counts a request's first token.
    pub(crate) fn first_token(&self, now: Instant, after: Duration) {
        self.lock().slot(now).first_token.saturating_record(micros(after));
    }

    /// Counts tokens.
    pub(crate) fn tokens(&self, now: Instant, prompt: u64, generated: u64) {
        let mut state = self.lock();
        let slot = state.slot(now);
        slot.prompt_tokens += prompt;
        slot.generation_tokens += generated;
    }

    /// Counts a request that was answered.
    pub(crate) fn finished(&self, now: Instant, after: Duration) {
        self.lock().slot(now).end_to_end.saturating_record(micros(after));
    }

    /// Counts a request that failed.
    pub(crate) fn failed(&self, now: Instant) {
        let mut state = self.lock();
        state.errors += 1;
        state.slot(now).errors += 1;
    }

    /// Counts a request whose client left.
    pub(crate) fn cancelled(&self) {
        self.lock().cancelled += 1;
    }

    /// Everything as JSON.
    pub(crate) fn body(&self, now: Instant) -> Value {
        let mut state = self.lock();
        state.drop_old(now);
        let up = now.saturating_duration_since(state.began);
        // A gateway younger than the window has less of one.
        let window = up.min(SLOT * SLOTS as u32).as_secs_f64().max(1e-3);
        let sum = |count: fn(&Slot) -> u64| state.slots.iter().map(count).sum::<u64>();
        let rate = |count: fn(&Slot) -> u64| round(sum(count) as f64 / window);
        json!({
            "uptime_s": round(up.as_secs_f64()),
            "requests": state.requests,
            "errors": state.errors,
            "cancelled": state.cancelled,
            "requests_by_profile": state.by_profile,
            "window": {
                "seconds": round(window),
                "requests": sum(|slot| slot.requests),
                "errors": sum(|slot| slot.errors),
            },
            "qps": rate(|slot| slot.requests),
            "ttft_ms": state.percentiles(|slot| &slot.first_token),
            "e2e_ms": state.percentiles(|slot| &slot.end_to_end),
            "tokens_per_second": {
                "prompt": rate(|slot| slot.prompt_tokens),
                "generation": rate(|slot| slot.generation_tokens),
            },
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The slot of `now`.
    fn slot(&mut self, now: Instant) -> &mut Slot {
        self.drop_old(now);
        let is_current = |slot: &Slot| now.saturating_duration_since(slot.began) < SLOT;
        if !self.slots.back().is_some_and(is_current) {
            self.slots.push_back(Slot {
                began: now,
                requests: 0,
                errors: 0,
                prompt_tokens: 0,
                generation_tokens: 0,
                first_token: self.empty.clone(),
                end_to_end: self.empty.clone(),
            });
        }
        let last = self.slots.len() - 1;
        &mut self.slots[last]
    }

    fn drop_old(&mut self, now: Instant) {
        let is_old = |slot: &Slot| now.saturating_duration_since(slot.began) >= SLOT * SLOTS as u32;
        while self.slots.front().is_some_and(is_old) {
            self.slots.pop_front();
        }
    }

    fn percentiles(&self, of: fn(&Slot) -> &Histogram<u64>) -> Value {
        let mut all = self.empty.clone();
        for slot in &self.slots {
            // All have the same bounds and precision: adding cannot fail.
            let _ = all.add(of(slot));
        }
        let at = |quantile| (!all.is_empty()).then(|| round(all.value_at_quantile(quantile) as f64 / 1000.0));
        json!({ "p50": at(0.5), "p95": at(0.95), "p99": at(0.99), "count": all.len() })
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(MAX_LATENCY_US).min(MAX_LATENCY_US)
}

/// Three decimals.
fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_leave_with_the_window_and_totals_stay() {
        let start = Instant::now();
        let stats = Stats::new(start).unwrap();
        for ms in 1..=100 {
            stats.began(start, "balanced");
            stats.first_token(start, Duration::from_millis(ms));
        }
        stats.tokens(start, 50, 300);
        let body = stats.body(start + Duration::from_secs(10));
        assert_eq!(body["qps"], 10.0);
        assert_eq!(body["tokens_per_second"]["generation"], 30.0);
        assert_eq!(body["ttft_ms"]["count"], 100);
        let p95 = body["ttft_ms"]["p95"].as_f64().unwrap();
        assert!((94.0..97.0).contains(&p95), "{p95}");
        let later = stats.body(start + Duration::from_secs(61));
        assert_eq!((&later["requests"], &later["qps"]), (&json!(100), &json!(0.0)));
        assert_eq!(later["ttft_ms"]["p50"], Value::Null);
        assert_eq!(later["requests_by_profile"], json!({"balanced": 100}));
    }
}
