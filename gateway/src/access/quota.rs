//! What one key may use: requests and tokens a minute, and requests at a time.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::bucket::Bucket;

/// The limits of a key; what is absent is unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct KeyLimits {
    pub(crate) requests_per_minute: Option<u32>,
    pub(crate) tokens_per_minute: Option<u32>,
    pub(crate) max_concurrency: Option<u32>,
}

/// Which limit was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limit {
    Requests,
    Tokens,
    Concurrency,
}

impl Limit {
    /// A word for labels.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Tokens => "tokens",
            Self::Concurrency => "concurrency",
        }
    }
}

/// Why a request has to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) limit: Limit,
    /// The limit's value.
    pub(crate) most: u32,
    /// When another attempt may succeed.
    pub(crate) wait: Duration,
}

/// One of the two rates as clients are told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) limit: u32,
    pub(crate) remaining: u32,
    /// Until nothing counts as used any more.
    pub(crate) reset: Duration,
}

/// How long a client is told to wait for the end of one of its own requests, which nobody knows.
const CONCURRENCY_WAIT: Duration = Duration::from_secs(1);

/// A key's use of its limits, shared by all of its requests.
///
/// Tokens are charged as they are computed, prompts when their request is accepted. A request begins while some are
/// left, so a key may overdraw by what it has running, and waits longer afterwards: over time its rate holds. To set
/// aside `max_tokens` beforehand would lock out everybody who leaves it unset.
pub(crate) struct Quota(Mutex<State>);

struct State {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    max_concurrency: Option<u32>,
    running: u32,
}

/// A request being served. Dropping it gives its place back.
pub(crate) struct Place(Arc<Quota>);

impl Quota {
    pub(crate) fn new(limits: KeyLimits, now: Instant) -> Self {
        let full = |limit: Option<u32>| limit.map(|limit| Bucket::full(limit, now));
        Self(Mutex::new(State {
            requests: full(limits.requests_per_minute),
            tokens: full(limits.tokens_per_minute),
            max_concurrency: limits.max_concurrency,
            running: 0,
        }))
    }

    /// Changes the limits; what was used stays used, what runs stays running.
    pub(crate) fn set(&self, limits: KeyLimits, now: Instant) {
        let mut state = self.lock();
        set_bucket(&mut state.requests, limits.requests_per_minute, now);
        set_bucket(&mut state.tokens, limits.tokens_per_minute, now);
        state.max_concurrency = limits.max_concurrency;
    }

    /// Begins a request.
    ///
    /// # Errors
    /// The limit that has been reached; then nothing is used.
    pub(crate) fn enter(self: &Arc<Self>, now: Instant) -> Result<Place, Refusal> {
        self.lock().enter(now)?;
        Ok(Place(Arc::clone(self)))
    }

    /// Counts tokens that were computed.
    pub(crate) fn charge(&self, tokens: u64, now: Instant) {
        if let Some(bucket) = &mut self.lock().tokens {
            bucket.take(tokens as f64, now);
        }
    }

    /// Requests that run.
    pub(crate) fn running(&self) -> u32 {
        self.lock().running
    }

    /// Requests and tokens, as far as they are limited.
    pub(crate) fn standing(&self, now: Instant) -> [Option<Standing>; 2] {
        let of = |bucket: &Bucket| Standing {
            limit: bucket.limit(),
            remaining: bucket.left(now),
            reset: bucket.until_full(now),
        };
        let state = self.lock();
        [state.requests.as_ref().map(of), state.tokens.as_ref().map(of)]
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn enter(&mut self, now: Instant) -> Result<(), Refusal> {
        if let Some(most) = self.max_concurrency.filter(|most| self.running >= *most) {
            return Err(Refusal { limit: Limit::Concurrency, most, wait: CONCURRENCY_WAIT });
        }
        for (bucket, limit) in [(&self.tokens, Limit::Tokens), (&self.requests, Limit::Requests)] {
            if let Some(bucket) = bucket.as_ref().filter(|bucket| !bucket.wait(now).is_zero()) {
                return Err(Refusal { limit, most: bucket.limit(), wait: bucket.wait(now) });
            }
        }
        if let Some(bucket) = &mut self.requests {
            bucket.take(1.0, now);
        }
        self.running += 1;
        Ok(())
    }
}

fn set_bucket(bucket: &mut Option<Bucket>, limit: Option<u32>, now: Instant) {
    match (bucket.as_mut(), limit) {
        (Some(bucket), Some(limit)) => bucket.set_limit(limit, now),
        (_, limit) => *bucket = limit.map(|limit| Bucket::full(limit, now)),
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.lock().running -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quota(limits: KeyLimits) -> (Arc<Quota>, Instant) {
        let now = Instant::now();
        (Arc::new(Quota::new(limits, now)), now)
    }

    #[test]
    fn each_limit_refuses_by_its_name_and_uses_nothing() {
        let limits = KeyLimits { requests_per_minute: Some(3), tokens_per_minute: Some(600), max_concurrency: Some(1) };
        let (quota, now) = quota(limits);
        let place = quota.enter(now).ok().unwrap();
        let refusal = |now| quota.enter(now).err().unwrap();
        assert_eq!(refusal(now), Refusal { limit: Limit::Concurrency, most: 1, wait: CONCURRENCY_WAIT });
        drop(place);
        quota.charge(601, now);
        assert_eq!(refusal(now), Refusal { limit: Limit::Tokens, most: 600, wait: Duration::from_millis(200) });
        let later = now + Duration::from_millis(200);
        for _ in 0..2 {
            quota.enter(later).ok().unwrap();
        }
        assert_eq!(refusal(later).limit, Limit::Requests);
        // A third of a minute a request, less the 200 ms in which a part of one came back.
        assert!((19_000..20_000).contains(&refusal(later).wait.as_millis()), "{:?}", refusal(later));
        assert_eq!(quota.running(), 0);
    }

    #[test]
    fn a_reload_changes_limits_without_forgetting_use() {
        let (quota, now) = quota(KeyLimits { requests_per_minute: Some(2), ..KeyLimits::default() });
        let _places = [quota.enter(now).ok().unwrap(), quota.enter(now).ok().unwrap()];
        quota.set(KeyLimits { requests_per_minute: Some(4), max_concurrency: Some(3), ..KeyLimits::default() }, now);
        assert_eq!(quota.standing(now)[0].map(|standing| (standing.limit, standing.remaining)), Some((4, 2)));
        let _third = quota.enter(now).ok().unwrap();
        assert_eq!(quota.enter(now).err().unwrap().limit, Limit::Concurrency);
        quota.set(KeyLimits::default(), now);
        assert_eq!(quota.standing(now), [None, None]);
        assert_eq!(quota.running(), 3);
    }
}
