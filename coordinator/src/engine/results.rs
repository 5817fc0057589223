//! What a step's result means.

use std::time::Duration;

use phalanx_proto::{
    fault::{Fault, FaultKind},
    ids::{SequenceId, Step, TokenId},
    plan::Plan,
    v1::{self, PromptLogprobs, SampledToken},
};
use rustc_hash::FxHashMap;

use super::{Engine, Event, sequence::Sequence};

/// A plan whose result is awaited.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) step: Step,
    pub(super) slices: Vec<FlightSlice>,
    /// Tokens of these slices that were computed for the first time.
    served: usize,
    planned_at: Duration,
}

/// The part of a slice that matters once it has been sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct FlightSlice {
    pub(super) sequence: SequenceId,
    pub(super) sample: bool,
    first_position: usize,
    num_tokens: usize,
}

impl Flight {
    /// Remembers a plan that was sent.
    pub(super) fn new(plan: &Plan, served: usize, now: Duration) -> Self {
        let slices = plan.slices.iter().map(|slice| FlightSlice {
            sequence: slice.sequence,
            sample: slice.sample,
            first_position: slice.first_position,
            num_tokens: slice.num_tokens,
        });
        Self { step: plan.step, slices: slices.collect(), served, planned_at: now }
    }
}

/// Log-probabilities of prompt tokens by sequence.
type PromptTokens<'a> = FxHashMap<SequenceId, &'a [v1::Token]>;

impl Engine {
    /// Takes the result of the oldest plan in flight, as rank 0 reported it and after all ranks have acknowledged the
    /// step. Returns everything that happened since the last call.
    ///
    /// # Errors
    /// `Internal` when the result does not answer that plan; nothing has changed then, and the epoch must end.
    pub fn apply(
        &mut self,
        step: Step,
        sampled: &[SampledToken],
        prompt_logprobs: &[PromptLogprobs],
        now: Duration,
    ) -> Result<Vec<Event>, Fault> {
        let tokens = self.check_sampled(step, sampled)?;
        let prompts = self.check_prompts(step, prompt_logprobs)?;
        let Some(flight) = self.in_flight.pop_front() else { return Ok(self.take_events()) };
        self.kv.acknowledge(step);
        self.totals.steps += 1;
        self.throughput.record(flight.served, flight.planned_at, now);
        self.totals.step_time += now.saturating_sub(flight.planned_at);
        let mut tokens = tokens.into_iter();
        for slice in &flight.slices {
            let token = if slice.sample { tokens.next() } else { None };
            let prompt = prompts.get(&slice.sequence).copied().unwrap_or_default();
            self.settle(slice, token, prompt);
        }
        Ok(self.take_events())
    }

    /// One slice's outcome. A sequence that has ended meanwhile gets nothing: what was computed past its end is lost.
    fn settle(&mut self, slice: &FlightSlice, token: Option<&v1::Token>, prompt: &[v1::Token]) {
        let id = slice.sequence;
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.slices_in_flight -= 1;
        sequence.samples_in_flight -= usize::from(slice.sample);
        let prompt = unreported(sequence, slice.first_position, prompt);
        let mut finished = None;
        if let Some(token) = token {
            finished = sequence.push(TokenId(token.id));
            self.totals.generation_tokens += 1;
            if self.config.enable_prefix_caching {
                sequence.remember_blocks(&mut self.kv);
            }
        } else if slice.first_position + slice.num_tokens >= sequence.limit {
            // Only the prompt was wanted.
            finished = Some(v1::FinishReason::Length);
        }
        if token.is_some() || !prompt.is_empty() {
            let tokens = token.cloned().into_iter().collect();
            self.events.push(Event::Tokens { sequence: id, tokens, prompt });
        }
        if let Some(reason) = finished {
            self.finish(id, reason);
        }
    }

    fn check_sampled<'a>(&self, step: Step, sampled: &'a [SampledToken]) -> Result<Vec<&'a v1::Token>, Fault> {
        let broken = |text: String| Err(Fault::new(FaultKind::Internal, text));
        let Some(flight) = self.in_flight.front() else {
            return broken(format!("result of step {step}, but no plan is in flight"));
        };
        if flight.step != step {
            return broken(format!("result of step {step}, but step {} is the oldest in flight", flight.step));
        }
        let expected: Vec<SequenceId> =
            flight.slices.iter().filter(|slice| slice.sample).map(|slice| slice.sequence).collect();
        if !sampled.iter().map(|sampled| sampled.sequence).eq(expected.iter().map(|id| id.0)) {
            let found: Vec<u64> = sampled.iter().map(|sampled| sampled.sequence).collect();
            return broken(format!("step {step} sampled for sequences {found:?}, planned for {expected:?}"));
        }
        let tokens: Vec<&v1::Token> = sampled.iter().filter_map(|sampled| sampled.token.as_ref()).collect();
        if tokens.len() < sampled.len() {
            return broken(format!(
                "step {step}: {} of {} sampled tokens are absent",
                sampled.len() - tokens.len(),
                sampled.len()
            ));
        }
        Ok(tokens)
    }

    /// Checks that every slice of a prompt whose logits are wanted comes with as many as it must.
    fn check_prompts<'a>(&self, step: Step, reported: &'a [PromptLogprobs]) -> Result<PromptTokens<'a>, Fault> {
        let prompts: PromptTokens<'a> =
            reported.iter().map(|prompt| (SequenceId(prompt.sequence), prompt.tokens.as_slice())).collect();
        for slice in self.in_flight.front().iter().flat_map(|flight| &flight.slices) {
            let Some(sequence) = self.sequences.get(&slice.sequence) else { continue };
            let found = prompts.get(&slice.sequence).map_or(0, |tokens| tokens.len());
            // The logits at a position tell about the token after it.
            let last = (slice.first_position + slice.num_tokens).min(sequence.request.prompt.len() - 1);
            let wanted = if sequence.must_compute_prompt() { last.saturating_sub(slice.first_position) } else { 0 };
            if found != wanted {
                let id = slice.sequence;
                let text =
                    format!("step {step}: {found} prompt log-probabilities for sequence {id}, expected {wanted}");
                return Err(Fault::new(FaultKind::Internal, text));
            }
        }
        Ok(prompts)
    }
}

/// The tokens after `first_position` that were not delivered before: a preempted prompt is computed twice.
fn unreported(sequence: &mut Sequence, first_position: usize, prompt: &[v1::Token]) -> Vec<v1::Token> {
    let known = sequence.prompt_reported.saturating_sub(first_position + 1);
    let fresh = prompt.get(known..).unwrap_or_default().to_vec();
    sequence.prompt_reported += fresh.len();
    fresh
}
