//! Plans that were sent and not yet acknowledged by every rank.
//!
//! An acknowledgement names (epoch, step, plan digest, token digest). Whatever differs is a failed epoch, never a
//! wrong answer. Knows no engine, no channel and no clock: time comes in.

use std::{collections::VecDeque, time::Duration};

use phalanx_proto::{
    fault::{Fault, FaultKind},
    ids::{Epoch, Rank, SequenceId, Step, TokenId},
    plan::token_digest,
    v1,
};

/// Weight of the newest step in the moving averages.
const NEWEST: f64 = 0.1;
/// A step may take this many times the average before it counts as hung.
const PATIENCE: u32 = 20;
/// Steps with fewer tokens say little about the time that a prefill token takes.
const PREFILL_TOKENS: usize = 32;

/// One epoch's plans in flight.
#[derive(Debug)]
pub(super) struct Flight {
    epoch: Epoch,
    world_size: usize,
    plans: VecDeque<InFlight>,
    pace: Pace,
    began: Duration,
    /// When the newest result was complete; a plan's time runs from then or from when it was sent.
    last_completed: Duration,
}

#[derive(Debug)]
struct InFlight {
    step: Step,
    digest: u64,
    tokens: usize,
    sent: Duration,
    acknowledged: Vec<bool>,
    token_digest: Option<u64>,
    /// Rank 0's.
    result: Option<v1::StepResult>,
}

/// A step that all ranks have acknowledged with equal digests.
#[derive(Debug)]
pub(super) struct Completed {
    /// Rank 0's result.
    pub result: v1::StepResult,
    /// From when the ranks could begin to when the last one answered.
    pub took: Duration,
}

/// How long steps take, to tell slow from dead.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    least: Duration,
    per_token: Duration,
    average: Option<Duration>,
    average_per_token: Option<Duration>,
}

impl Pace {
    pub(super) fn new(least: Duration, per_token: Duration) -> Self {
        Self { least, per_token, average: None, average_per_token: None }
    }

    fn record(&mut self, took: Duration, tokens: usize) {
        let blend = |old: Option<Duration>, new: Duration| {
            Some(old.map_or(new, |old| old.mul_f64(1.0 - NEWEST) + new.mul_f64(NEWEST)))
        };
        self.average = blend(self.average, took);
        if tokens >= PREFILL_TOKENS {
            self.average_per_token = blend(self.average_per_token, took / tokens as u32);
        }
    }

    /// `max(least, 20 × moving average, budget of the prefill)`.
    fn deadline(&self, tokens: usize) -> Duration {
        let measured = self.average_per_token.map_or(self.per_token, |average| average * PATIENCE);
        let prefill = self.per_token.min(measured).saturating_mul(tokens as u32);
        self.least.max(self.average.unwrap_or_default() * PATIENCE).max(prefill)
    }
}

impl Flight {
    pub(super) fn new(epoch: Epoch, world_size: usize, pace: Pace, now: Duration) -> Self {
        Self { epoch, world_size, plans: VecDeque::new(), pace, began: now, last_completed: now }
    }

    pub(super) fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// When steps could begin.
    pub(super) fn began(&self) -> Duration {
        self.began
    }

    /// What was learnt about the speed of this group, for the next epoch.
    pub(super) fn pace(&self) -> Pace {
        self.pace
    }

    pub(super) fn sent(&mut self, step: Step, digest: u64, tokens: usize, now: Duration) {
        let acknowledged = vec![false; self.world_size];
        let plan = InFlight { step, digest, tokens, sent: now, acknowledged, token_digest: None, result: None };
        self.plans.push_back(plan);
    }

    /// Takes one rank's answer. Gives the oldest step once every rank has acknowledged it.
    ///
    /// # Errors
    /// When the answer is not to the rank's next plan, or a digest differs.
    pub(super) fn acknowledge(
        &mut self,
        rank: Rank,
        result: v1::StepResult,
        now: Duration,
    ) -> Result<Option<Completed>, Fault> {
        let step = result.step;
        let Some(plan) = self.plans.iter_mut().find(|plan| !plan.acknowledged[rank.index()]) else {
            return Err(diverged(format!("rank {rank} answers step {step}, but no plan awaits its answer")));
        };
        if plan.step.0 != step {
            return Err(diverged(format!("rank {rank} answers step {step}, expected {}", plan.step)));
        }
        if plan.digest != result.plan_digest {
            let (found, expected) = (result.plan_digest, plan.digest);
            return Err(diverged(format!(
                "rank {rank} executed plan {found:016x} in step {step}, expected {expected:016x}"
            )));
        }
        let agreed = *plan.token_digest.get_or_insert(result.token_digest);
        if agreed != result.token_digest {
            let found = result.token_digest;
            return Err(diverged(format!(
                "rank {rank} sampled {found:016x} in step {step}, others sampled {agreed:016x}"
            )));
        }
        plan.acknowledged[rank.index()] = true;
        if rank.index() == 0 {
            check_tokens(&result)?;
            plan.result = Some(result);
        }
        Ok(self.take_completed(now))
    }

    /// The oldest step, if every rank has acknowledged it.
    pub(super) fn take_completed(&mut self, now: Duration) -> Option<Completed> {
        let complete = |plan: &mut InFlight| plan.acknowledged.iter().all(|&acknowledged| acknowledged);
        let plan = self.plans.pop_front_if(complete)?;
        let took = now.saturating_sub(plan.sent.max(self.last_completed));
        self.last_completed = now;
        self.pace.record(took, plan.tokens);
        // Rank 0 is among those that acknowledged, so its result is there.
        plan.result.map(|result| Completed { result, took })
    }

    /// Ranks that have not answered the oldest plan although its time is up at `now`.
    pub(super) fn overdue(&self, now: Duration) -> Option<(Step, Duration, Vec<Rank>)> {
        let plan = self.plans.front()?;
        let waited = now.saturating_sub(plan.sent.max(self.last_completed));
        if waited <= self.pace.deadline(plan.tokens) {
            return None;
        }
        let silent = (0..self.world_size).filter(|&rank| !plan.acknowledged[rank]);
        Some((plan.step, waited, silent.map(|rank| Rank(rank as u32)).collect()))
    }

    /// Gives every plan in flight more time: the coordinator itself was late by `lateness`.
    pub(super) fn forgive(&mut self, lateness: Duration) {
        for plan in &mut self.plans {
            plan.sent += lateness;
        }
    }
}

/// Rank 0 reports tokens beside their digest; the two must agree, or what clients get is not what the ranks go on with.
fn check_tokens(result: &v1::StepResult) -> Result<(), Fault> {
    let mut tokens = Vec::with_capacity(result.sampled.len());
    for sampled in &result.sampled {
        let Some(token) = &sampled.token else {
            return Err(diverged(format!("rank 0 reports no token for a sequence of step {}", result.step)));
        };
        tokens.push((SequenceId(sampled.sequence), TokenId(token.id)));
    }
    let expected = token_digest(tokens.into_iter());
    if expected == result.token_digest {
        return Ok(());
    }
    let found = result.token_digest;
    Err(diverged(format!(
        "rank 0 reports tokens {expected:016x} in step {}, their digest is {found:016x}",
        result.step
    )))
}

fn diverged(message: String) -> Fault {
    Fault::new(FaultKind::Diverged, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn flight(world_size: usize) -> Flight {
        let pace = Pace::new(5 * SECOND, Duration::from_millis(100));
        let mut flight = Flight::new(Epoch(3), world_size, pace, Duration::ZERO);
        flight.sent(Step(1), 11, 4, Duration::ZERO);
        flight.sent(Step(2), 12, 1, Duration::ZERO);
        flight
    }

    fn answer(step: u64, plan_digest: u64, token: u32) -> v1::StepResult {
        let token_digest = token_digest([(SequenceId(7), TokenId(token))].into_iter());
        let token = Some(v1::Token { id: token, ..Default::default() });
        let sampled = vec![v1::SampledToken { sequence: 7, token }];
        v1::StepResult { epoch: 3, step, plan_digest, token_digest, sampled, ..Default::default() }
    }

    #[test]
    fn a_step_is_complete_when_every_rank_has_answered_and_not_before() {
        let mut flight = flight(2);
        assert!(flight.acknowledge(Rank(1), answer(1, 11, 5), SECOND).unwrap().is_none());
        assert!(flight.acknowledge(Rank(1), answer(2, 12, 6), SECOND).unwrap().is_none());
        let first = flight.acknowledge(Rank(0), answer(1, 11, 5), 2 * SECOND).unwrap().unwrap();
        assert_eq!((first.result.step, first.took), (1, 2 * SECOND));
        let second = flight.acknowledge(Rank(0), answer(2, 12, 6), 3 * SECOND).unwrap().unwrap();
        assert_eq!((second.result.step, second.took), (2, SECOND));
    }

    #[test]
    fn ranks_that_differ_are_a_fault() {
        for (rank, wrong) in
            [(1, answer(1, 99, 5)), (1, answer(1, 11, 6)), (1, answer(2, 12, 5)), (0, answer(9, 11, 5))]
        {
            let mut flight = flight(2);
            flight.acknowledge(Rank(1 - rank), answer(1, 11, 5), SECOND).unwrap();
            let fault = flight.acknowledge(Rank(rank), wrong, SECOND).unwrap_err();
            assert_eq!(fault.kind, FaultKind::Diverged);
        }
    }

    #[test]
    fn tokens_that_do_not_match_their_digest_are_a_fault() {
        let mut wrong = answer(1, 11, 5);
        wrong.sampled[0].token = Some(v1::Token { id: 6, ..Default::default() });
        assert!(flight(1).acknowledge(Rank(0), wrong, SECOND).is_err());
    }

    #[test]
    fn an_answer_that_nobody_awaits_is_a_fault() {
        let mut flight = flight(1);
        flight.acknowledge(Rank(0), answer(1, 11, 5), SECOND).unwrap();
        flight.acknowledge(Rank(0), answer(2, 12, 5), SECOND).unwrap();
        assert!(flight.acknowledge(Rank(0), answer(3, 13, 5), SECOND).is_err());
    }

    #[test]
    fn silent_ranks_are_named_when_the_deadline_is_over() {
        let mut flight = flight(2);
        flight.acknowledge(Rank(0), answer(1, 11, 5), SECOND).unwrap();
        assert!(flight.overdue(5 * SECOND).is_none());
        let (step, _, silent) = flight.overdue(6 * SECOND).unwrap();
        assert_eq!((step, silent), (Step(1), vec![Rank(1)]));
        flight.forgive(2 * SECOND);
        assert!(flight.overdue(6 * SECOND).is_none());
    }

    #[test]
    fn long_prefills_and_slow_groups_get_more_time() {
        let mut pace = Pace::new(5 * SECOND, Duration::from_millis(100));
        assert_eq!(pace.deadline(1), 5 * SECOND);
        assert_eq!(pace.deadline(1000), 100 * SECOND);
        pace.record(SECOND, 1000);
        // A second was the average: twenty are allowed. A millisecond a prefill token was measured: twenty are allowed.
        assert_eq!(pace.deadline(1), 20 * SECOND);
        assert_eq!(pace.deadline(10_000), 200 * SECOND);
    }
}
