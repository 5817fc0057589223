//! The hot loop: plans out to all ranks, acknowledgements in, events on to clients.

use phalanx_proto::{
    fault::Fault,
    ids::Step,
    plan::{Plan, message_digest},
    v1,
};

use super::{
    actor::{Group, Phase},
    flight::Completed,
    roster::MemberId,
};
use crate::engine::Event;

impl Group {
    /// Makes and sends plans until enough are in flight or there is nothing to do.
    pub(super) fn fill_window(&mut self) {
        while matches!(self.phase, Phase::Running { .. }) {
            let Some(plan) = self.engine.next_plan(self.now()) else { break };
            self.send(&plan);
        }
        self.deliver_due();
    }

    fn send(&mut self, plan: &Plan) {
        let now = self.now();
        let Phase::Running { flight, .. } = &mut self.phase else { return };
        let message = v1::Plan::from(plan);
        flight.sent(plan.step, message_digest(&message), plan.num_tokens(), now);
        if let Err(rank) = self.roster.broadcast(&message) {
            self.fence(&format!("rank {rank} does not take plans"));
        }
    }

    /// Takes one rank's acknowledgement; results of older epochs are ignored.
    pub(super) fn step_result(&mut self, id: MemberId, result: v1::StepResult) {
        let now = self.now();
        let Some(member) = self.roster.get_mut(id) else { return };
        member.heard = now;
        let Some(rank) = member.rank else { return };
        let Phase::Running { flight, .. } = &mut self.phase else { return };
        if flight.epoch().0 != result.epoch {
            return;
        }
        match flight.acknowledge(rank, result, now) {
            Ok(None) => {}
            Ok(Some(completed)) => self.complete(completed),
            Err(fault) => self.fence(&fault.message),
        }
        // Answers may have come out of step between ranks: one of them can complete several plans.
        while let Phase::Running { flight, .. } = &mut self.phase
            && let Some(completed) = flight.take_completed(now)
        {
            self.complete(completed);
        }
    }

    fn complete(&mut self, completed: Completed) {
        let Completed { result, took } = completed;
        self.instruments.step(took, result.timing.as_ref());
        self.touched = true;
        match self.engine.apply(Step(result.step), &result.sampled, &result.prompt_logprobs, self.now()) {
            Ok(events) => self.deliver(events),
            Err(Fault { message, .. }) => self.fence(&message),
        }
    }

    /// Delivers what calls other than `apply` have caused.
    pub(super) fn deliver_due(&mut self) {
        let events = self.engine.take_events();
        self.deliver(events);
    }

    /// Passes the engine's events on to the clients' streams.
    pub(super) fn deliver(&mut self, events: Vec<Event>) {
        let now = self.now();
        for event in events {
            match event {
                Event::Admitted { sequence, prompt_tokens, cached_tokens, queued } => {
                    let message = v1::Admitted {
                        request_id: String::new(),
                        prompt_tokens: prompt_tokens as u32,
                        cached_tokens: cached_tokens as u32,
                        queued_us: queued.as_micros() as u64,
                    };
                    self.clients.admitted(sequence, message, now);
                }
                Event::Tokens { sequence, tokens, prompt } => {
                    self.suspect_advanced(sequence, tokens.len());
                    self.clients.tokens(sequence, v1::TokenChunk { tokens, prompt }, now);
                }
                Event::Finished { sequence, reason, prompt_tokens, completion_tokens, cached_tokens } => {
                    self.suspect_ended(sequence);
                    let message = v1::Finished {
                        reason: reason.into(),
                        prompt_tokens: prompt_tokens as u32,
                        completion_tokens: completion_tokens as u32,
                        cached_tokens: cached_tokens as u32,
                    };
                    self.clients.finished(sequence, message, now);
                }
                Event::Failed { sequence, fault } => {
                    self.suspect_ended(sequence);
                    self.clients.failed(sequence, fault, now);
                }
            }
        }
        self.set_suspects_apart();
    }
}
