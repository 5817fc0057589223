//! Who gets the next place: tenants share by weight, and each puts its own requests in order.
//!
//! This is start-time fair queueing with tokens as the service. Each tenant has a virtual time, which is what it was
//! served divided by its weight, and whoever is behind goes next. Tokens are charged as they are computed, since nobody
//! knows beforehand how long an output will be. A tenant that comes back with nothing waiting is moved up to where the
//! others are, so that idleness earns nothing. Priorities and age decide only between requests of one tenant.

use std::{collections::BTreeMap, num::NonZeroU32};

use phalanx_proto::ids::SequenceId;
use rustc_hash::FxHashMap;

use super::queue::{Standing, WaitQueue};

/// Largest weight that a tenant may have.
pub const MAX_WEIGHT: u32 = 1000;

/// Virtual time of one token at weight 1: fine enough that dividing it by a weight loses nothing that matters.
const TOKEN: u64 = 1 << 20;
/// Tenants without live sequences whose virtual time is remembered.
const MAX_REMEMBERED: usize = 1024;
/// Plans in a row in which a tenant's oldest candidate may be passed by its others.
const MAX_OVERTAKES: u32 = 8;

/// On whose behalf a request is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant {
    /// Empty for those without a name.
    pub id: String,
    /// Its share relative to others'.
    pub weight: NonZeroU32,
}

impl Default for Tenant {
    fn default() -> Self {
        Self { id: String::new(), weight: NonZeroU32::MIN }
    }
}

/// Stands for a tenant while it is remembered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct TenantKey(u64);

/// One tenant's books.
#[derive(Debug)]
struct Account {
    id: String,
    weight: NonZeroU32,
    /// Virtual time.
    served: u64,
    /// Sequences that wait or run.
    live: usize,
    waiting: WaitQueue,
    /// Plans in a row in which others of this tenant prefilled while its oldest candidate could not.
    overtakes: u32,
}

/// A sequence that could prefill: one that waits, or that runs with part of its prompt to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) tenant: TenantKey,
    pub(super) standing: Standing,
}

/// All tenants that have live sequences or were served lately.
#[derive(Debug, Default)]
pub(super) struct Tenants {
    accounts: BTreeMap<TenantKey, Account>,
    by_id: FxHashMap<String, TenantKey>,
    next_key: u64,
    waiting: usize,
    waiting_tokens: usize,
}

impl Tenants {
    /// Counts a new sequence of a tenant.
    pub(super) fn join(&mut self, tenant: &Tenant) -> TenantKey {
        let floor = self.floor();
        let key = self.by_id.get(&tenant.id).copied().unwrap_or_else(|| self.open(tenant));
        if let Some(account) = self.accounts.get_mut(&key) {
            account.weight = tenant.weight;
            account.live += 1;
            if account.waiting.len() == 0 {
                account.served = account.served.max(floor);
            }
        }
        key
    }

    fn open(&mut self, tenant: &Tenant) -> TenantKey {
        let key = TenantKey(self.next_key);
        self.next_key += 1;
        let (id, weight, waiting) = (tenant.id.clone(), tenant.weight, WaitQueue::default());
        self.accounts.insert(key, Account { id, weight, served: 0, live: 0, waiting, overtakes: 0 });
        self.by_id.insert(tenant.id.clone(), key);
        key
    }

    /// Where a tenant begins that has nothing waiting: beside the hindmost of those that compete for places. If nobody
    /// does, beside the foremost of those that run, because what these were served meanwhile was nobody else's.
    fn floor(&self) -> u64 {
        let competing =
            self.accounts.values().filter(|account| account.waiting.len() > 0).map(|account| account.served);
        let running = || self.accounts.values().filter(|account| account.live > 0).map(|account| account.served).max();
        competing.min().or_else(running).unwrap_or(0)
    }

    /// Counts the end of a sequence, which neither waits nor runs any more.
    pub(super) fn leave(&mut self, key: TenantKey) {
        let Some(account) = self.accounts.get_mut(&key) else { return };
        account.live -= 1;
        if account.live > 0 {
            return;
        }
        if self.accounts.values().all(|account| account.live == 0) {
            // Nobody competes with anybody: everyone begins anew.
            self.accounts.clear();
            self.by_id.clear();
        } else {
            self.forget();
        }
    }

    /// Forgets tenants that would be moved up anyway, and those that are least ahead when there are too many.
    fn forget(&mut self) {
        let idle = self.accounts.values().filter(|account| account.live == 0).count();
        if idle <= MAX_REMEMBERED {
            return;
        }
        let floor = self.floor();
        let mut ahead: Vec<(u64, TenantKey)> =
            self.accounts.iter().filter(|(_, a)| a.live == 0).map(|(&key, account)| (account.served, key)).collect();
        ahead.sort_unstable();
        let passed = ahead.partition_point(|(served, _)| *served <= floor);
        // Half of them at once, so that this is not done for every request.
        for (_, key) in ahead.into_iter().take(passed.max(MAX_REMEMBERED / 2)) {
            if let Some(account) = self.accounts.remove(&key) {
                self.by_id.remove(&account.id);
            }
        }
    }

    /// Has a sequence wait whose prompt and output are at most `tokens`.
    pub(super) fn enqueue(&mut self, key: TenantKey, standing: Standing, tokens: usize) {
        if let Some(account) = self.accounts.get_mut(&key) {
            account.waiting.insert(standing);
            self.waiting += 1;
            self.waiting_tokens += tokens;
        }
    }

    /// Takes out a sequence that waits.
    pub(super) fn dequeue(&mut self, key: TenantKey, standing: Standing, tokens: usize) {
        if let Some(account) = self.accounts.get_mut(&key) {
            account.waiting.remove(standing);
            self.waiting -= 1;
            self.waiting_tokens -= tokens;
        }
    }

    /// Whether the sequence waits.
    pub(super) fn is_waiting(&self, key: TenantKey, standing: Standing) -> bool {
        self.accounts.get(&key).is_some_and(|account| account.waiting.contains(standing))
    }

    /// Number of sequences that wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Tokens of the sequences that wait, prompts and outputs at most.
    pub(super) fn waiting_tokens(&self) -> usize {
        self.waiting_tokens
    }

    /// Charges a tenant for tokens that are computed for it.
    pub(super) fn charge(&mut self, key: TenantKey, tokens: usize) {
        if let Some(account) = self.accounts.get_mut(&key) {
            let weight = u64::from(account.weight.get());
            account.served = account.served.saturating_add((tokens as u64).saturating_mul(TOKEN) / weight);
        }
    }

    /// What a tenant was served, by weight.
    pub(super) fn served(&self, key: TenantKey) -> u64 {
        self.accounts.get(&key).map_or(0, |account| account.served)
    }

    /// Who goes next: the tenant that is furthest behind, and of its candidates the foremost, or the oldest when that was
    /// passed often. Shielded sequences go before all others. `prefilling` are the candidates that run already; those
    /// that wait count only if `admitting`.
    pub(super) fn foremost(&self, prefilling: &[Candidate], admitting: bool) -> Option<Candidate> {
        let waits = |(&tenant, account): (&TenantKey, &Account)| {
            let standing = account.waiting.foremost().filter(|_| admitting)?;
            Some(Candidate { tenant, standing })
        };
        let candidates = self.accounts.iter().filter_map(waits).chain(prefilling.iter().copied());
        let order = |candidate: &Candidate| {
            (candidate.standing.is_unshielded(), self.served(candidate.tenant), candidate.standing)
        };
        let next = candidates.min_by_key(order)?;
        let passed = self.accounts.get(&next.tenant).is_some_and(|account| account.overtakes >= MAX_OVERTAKES);
        if !passed || !next.standing.is_unshielded() {
            return Some(next);
        }
        self.oldest(next.tenant, prefilling, admitting)
    }

    fn oldest(&self, tenant: TenantKey, prefilling: &[Candidate], admitting: bool) -> Option<Candidate> {
        let waiting = self.accounts.get(&tenant).and_then(|account| account.waiting.oldest()).filter(|_| admitting);
        let running = prefilling.iter().filter(|candidate| candidate.tenant == tenant);
        let oldest =
            running.map(|candidate| candidate.standing).chain(waiting).min_by_key(|standing| standing.sequence);
        oldest.map(|standing| Candidate { tenant, standing })
    }

    /// Takes note of who prefilled in a plan; `passed` are the running candidates that did not.
    pub(super) fn note_prefills(&mut self, prefilled: &[(TenantKey, SequenceId)], passed: &[Candidate]) {
        if prefilled.is_empty() {
            return;
        }
        for (&tenant, account) in &mut self.accounts {
            let mine = prefilled.iter().filter(|(key, _)| *key == tenant).map(|(_, sequence)| *sequence);
            let Some(oldest_served) = mine.min() else { continue };
            let passed = passed.iter().filter(|candidate| candidate.tenant == tenant).map(|c| c.standing.sequence);
            let waiting = account.waiting.oldest().map(|standing| standing.sequence);
            let overtaken = passed.chain(waiting).any(|sequence| sequence < oldest_served);
            account.overtakes = if overtaken { account.overtakes + 1 } else { 0 };
        }
    }

    /// Recounts what is kept beside the accounts. `live` gives the tenant, and the tokens if it waits, of each sequence.
    ///
    /// # Errors
    /// Says what does not add up.
    pub(super) fn check(&self, live: impl Iterator<Item = (TenantKey, Option<usize>)>) -> Result<(), String> {
        let mut found: BTreeMap<TenantKey, (usize, usize)> = BTreeMap::new();
        let mut tokens = 0;
        for (key, waits) in live {
            let counts = found.entry(key).or_default();
            counts.0 += 1;
            counts.1 += usize::from(waits.is_some());
            tokens += waits.unwrap_or(0);
        }
        for (key, account) in &self.accounts {
            let expected = found.remove(key).unwrap_or_default();
            if (account.live, account.waiting.len()) != expected {
                let counted = (account.live, account.waiting.len());
                return Err(format!("tenant {key:?}: {expected:?} live and waiting, counted {counted:?}"));
            }
        }
        let waiting: usize = self.accounts.values().map(|account| account.waiting.len()).sum();
        if !found.is_empty() || (waiting, tokens) != (self.waiting, self.waiting_tokens) {
            let counted = (self.waiting, self.waiting_tokens);
            return Err(format!("{waiting} wait with {tokens} tokens, counted {counted:?}; unknown are {found:?}"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(id: &str, weight: u32) -> Tenant {
        Tenant { id: id.into(), weight: NonZeroU32::new(weight).unwrap() }
    }

    /// Serves whoever is next in bites of `bite` tokens, and gives what each of two tenants got.
    fn serve(tenants: &mut Tenants, keys: [TenantKey; 2], bites: usize, bite: usize) -> [usize; 2] {
        let mut got = [0; 2];
        for _ in 0..bites {
            let next = tenants.foremost(&[], true).unwrap().tenant;
            tenants.charge(next, bite);
            got[usize::from(next == keys[1])] += bite;
        }
        got
    }

    fn waiting(tenants: &mut Tenants, tenant: &Tenant, sequence: u64) -> TenantKey {
        let key = tenants.join(tenant);
        tenants.enqueue(key, Standing::new(false, 0, SequenceId(sequence)), 1);
        key
    }

    #[test]
    fn tokens_are_shared_by_weight() {
        let mut tenants = Tenants::default();
        let keys = [waiting(&mut tenants, &named("a", 1), 1), waiting(&mut tenants, &named("b", 3), 2)];
        assert_eq!(serve(&mut tenants, keys, 400, 9), [900, 2700]);
    }

    #[test]
    fn idleness_earns_no_credit() {
        let mut tenants = Tenants::default();
        let (a, b) = (named("a", 1), named("b", 1));
        let first = waiting(&mut tenants, &a, 1);
        tenants.charge(first, 1_000_000);
        let second = waiting(&mut tenants, &b, 2);
        assert_eq!(serve(&mut tenants, [first, second], 100, 10), [500, 500]);
    }

    #[test]
    fn a_tenant_without_live_sequences_keeps_its_debt_while_others_compete() {
        let mut tenants = Tenants::default();
        let (a, b) = (named("a", 1), named("b", 1));
        let keys = [waiting(&mut tenants, &a, 1), waiting(&mut tenants, &b, 2)];
        tenants.charge(keys[1], 500);
        tenants.dequeue(keys[1], Standing::new(false, 0, SequenceId(2)), 1);
        tenants.leave(keys[1]);
        assert_eq!(waiting(&mut tenants, &b, 3), keys[1]);
        assert_eq!(serve(&mut tenants, keys, 100, 10), [750, 250]);
    }

    #[test]
    fn tenants_that_come_and_go_are_not_remembered_for_ever() {
        let mut tenants = Tenants::default();
        waiting(&mut tenants, &named("stays", 1), 1);
        for sequence in 2..10_000 {
            let key = tenants.join(&named(&sequence.to_string(), 1));
            tenants.charge(key, sequence as usize);
            tenants.leave(key);
            assert!(tenants.accounts.len() <= MAX_REMEMBERED + 2 && tenants.by_id.len() == tenants.accounts.len());
        }
    }
}
