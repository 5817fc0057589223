//! Who may ask, and how much: keys, their limits, and the door that every request but `/livez` goes through.
//!
//! - `file` and `digest`: keys as an operator writes them and as the gateway keeps them;
//! - `quota` over `bucket`: what one key may use, as a function of the time passed in;
//! - `guard`: the door itself;
//! - here: the keys that count at the moment, and their exchange while requests run.

mod bucket;
mod digest;
mod file;
mod guard;
mod quota;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Instant,
};

use http::{HeaderMap, header::AUTHORIZATION};
use subtle::ConditionallySelectable;
use tracing::{info, warn};

use self::file::Entry;
use crate::{app::is_same_model, openai::error::ApiError};

pub(crate) use self::{
    digest::salt_of,
    guard::guard,
    quota::{Limit, Quota},
};
pub use self::{
    digest::{Digest, NotAKey, new_key},
    file::KeyError,
};

/// Where keys come from. With none of either, everybody may ask.
#[derive(Clone, Debug, Default)]
pub struct KeySource {
    /// A key file, read again when [`Config::reload`](crate::Config::reload) says so.
    pub file: Option<PathBuf>,
    /// Keys without limits, from the environment.
    pub unlimited: Vec<Digest>,
}

impl KeySource {
    /// Whether there are any keys.
    pub fn is_empty(&self) -> bool {
        self.file.is_none() && self.unlimited.is_empty()
    }

    /// Checks the text of a key file. `path` is what its errors call it.
    ///
    /// # Errors
    /// Names everything that is wrong.
    pub fn check(path: &Path, text: &str) -> Result<(), KeyError> {
        file::parse(path.to_owned(), text, |name| std::env::var(name).ok()).map(drop)
    }

    async fn entries(&self) -> Result<Vec<Entry>, KeyError> {
        let numbered = self.unlimited.iter().zip(1..);
        let mut entries: Vec<_> =
            numbered.map(|(digest, number)| Entry::unlimited(format!("env-{number}"), *digest)).collect();
        if let Some(path) = self.file.clone() {
            let text = match tokio::fs::read_to_string(&path).await {
                Ok(text) => text,
                Err(source) => return Err(KeyError::Read { path, source }),
            };
            entries.extend(file::parse(path, &text, |name| std::env::var(name).ok())?);
        }
        Ok(entries)
    }
}

/// Whose requests are counted, limited and kept apart together: one key.
pub(crate) struct Tenant {
    /// From the key file, never from a client.
    pub(crate) name: String,
    pub(crate) weight: u32,
    /// `None`: all.
    models: Option<Vec<String>>,
    pub(crate) quota: Arc<Quota>,
}

impl Tenant {
    /// Whether the model of that name may be used.
    pub(crate) fn may_use(&self, model: &str) -> bool {
        self.models.as_ref().is_none_or(|models| models.iter().any(|allowed| is_same_model(allowed, model)))
    }
}

/// The keys of one moment.
#[derive(Default)]
struct KeyRing(Vec<(Digest, Arc<Tenant>)>);

impl KeyRing {
    /// `before` are the keys until now: what one of them has used stays used.
    fn new(entries: Vec<Entry>, before: &Self, now: Instant) -> Self {
        let ring = entries.into_iter().map(|entry| {
            let known = before.0.iter().find(|(_, tenant)| tenant.name == entry.name);
            let quota = match known {
                Some((_, tenant)) => Arc::clone(&tenant.quota),
                None => Arc::new(Quota::new(entry.limits, now)),
            };
            quota.set(entry.limits, now);
            let Entry { name, digest, weight, models, .. } = entry;
            (digest, Arc::new(Tenant { name, weight, models, quota }))
        });
        Self(ring.collect())
    }

    /// The owner of a key. Every key is compared to the end, so that the time tells nothing.
    fn find(&self, key: &[u8]) -> Option<Arc<Tenant>> {
        const NOBODY: u32 = u32::MAX;
        let presented = Digest::of(key);
        let mut found = NOBODY;
        for ((digest, _), at) in self.0.iter().zip(0..) {
            found.conditional_assign(&at, digest.matches(&presented));
        }
        self.0.get(found as usize).map(|(_, tenant)| Arc::clone(tenant))
    }
}

/// The keys, exchanged as a whole.
pub(crate) struct Access {
    source: KeySource,
    ring: RwLock<Arc<KeyRing>>,
}

impl Access {
    /// Reads the keys.
    ///
    /// # Errors
    /// When they cannot be used.
    pub(crate) async fn load(source: KeySource) -> Result<Self, KeyError> {
        let ring = KeyRing::new(source.entries().await?, &KeyRing::default(), Instant::now());
        Ok(Self { source, ring: RwLock::new(Arc::new(ring)) })
    }

    /// Reads the keys again; those of now stay when the new ones cannot be used.
    pub(crate) async fn reload(&self) {
        match self.source.entries().await {
            Ok(entries) => {
                let mut ring = self.ring.write().unwrap_or_else(PoisonError::into_inner);
                *ring = Arc::new(KeyRing::new(entries, &ring, Instant::now()));
                info!(keys = ring.0.len(), "keys read again");
            }
            Err(error) => warn!(%error, "the new keys cannot be used, the old ones stay"),
        }
    }

    fn ring(&self) -> Arc<KeyRing> {
        Arc::clone(&self.ring.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Everybody who has a key.
    pub(crate) fn tenants(&self) -> Vec<Arc<Tenant>> {
        self.ring().0.iter().map(|(_, tenant)| Arc::clone(tenant)).collect()
    }

    /// Whose key the request carries; nobody's when no keys are set.
    ///
    /// # Errors
    /// 401 for a key that is missing, malformed or unknown.
    fn authenticate(&self, headers: &HeaderMap) -> Result<Option<Arc<Tenant>>, ApiError> {
        if self.source.is_empty() {
            return Ok(None);
        }
        let Some(value) = headers.get(AUTHORIZATION) else {
            return Err(ApiError::unauthorized("No API key was sent; send 'Authorization: Bearer YOUR_KEY'."));
        };
        let (scheme, key) = match value.as_bytes().iter().position(|&byte| byte == b' ') {
            Some(at) => value.as_bytes().split_at(at),
            None => (value.as_bytes(), &[][..]),
        };
        let key = key.trim_ascii();
        if !scheme.eq_ignore_ascii_case(b"bearer") || key.is_empty() {
            let text = "The Authorization header is malformed; send 'Authorization: Bearer YOUR_KEY'.";
            return Err(ApiError::unauthorized(text));
        }
        let unknown = || ApiError::unauthorized("The API key is not one of this server's.");
        self.ring().find(key).map(Some).ok_or_else(unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str) -> Entry {
        Entry::unlimited(name.to_owned(), Digest::of(name.as_bytes()))
    }

    #[test]
    fn a_key_is_found_among_many_and_an_unknown_one_is_not() {
        let entries = (0..100).map(|at| entry(&format!("key-{at}"))).collect();
        let ring = KeyRing::new(entries, &KeyRing::default(), Instant::now());
        for at in [0, 1, 57, 99] {
            assert_eq!(ring.find(format!("key-{at}").as_bytes()).unwrap().name, format!("key-{at}"));
        }
        assert!(ring.find(b"key-100").is_none() && ring.find(b"").is_none());
        assert!(KeyRing::default().find(b"key-0").is_none());
    }

    #[test]
    fn a_key_that_stays_keeps_its_use_and_one_that_goes_is_gone() {
        let now = Instant::now();
        let before = KeyRing::new(vec![entry("stays"), entry("goes")], &KeyRing::default(), now);
        let _place = before.find(b"stays").unwrap().quota.enter(now);
        let after = KeyRing::new(vec![entry("stays"), entry("new")], &before, now);
        assert_eq!(after.find(b"stays").unwrap().quota.running(), 1);
        assert!(after.find(b"goes").is_none() && after.find(b"new").is_some());
    }
}
