//! From the coordinator's events to steps of the answer, over all choices of a request.

use std::pin::Pin;

use futures::{Stream, StreamExt};
use phalanx_proto::{
    fault::{Fault, FaultKind},
    v1::{self, generate_event::Event},
};
use tokio::sync::OwnedSemaphorePermit;
use tokio_stream::StreamMap;

use super::faults::api_error;
use crate::{
    meter::Meter,
    openai::{
        error::ApiError,
        reply::{FinishReason, Usage},
    },
    stream::Assembler,
    upstream::Generation,
};

type Events = Pin<Box<dyn Stream<Item = Result<Event, Fault>> + Send>>;

/// What happened to one choice.
pub(crate) struct Step<P> {
    pub(crate) index: usize,
    pub(crate) pieces: Vec<P>,
    /// Ids of the tokens of this step.
    pub(crate) token_ids: Vec<u32>,
    pub(crate) finish: Option<FinishReason>,
}

/// One choice: its tokens, and what makes pieces of them.
pub(crate) struct Choice<A> {
    pub(crate) generation: Generation,
    pub(crate) assembler: A,
    /// The first choice of a prompt counts the prompt.
    pub(crate) counts_prompt: bool,
    /// Whether generated tokens are the client's.
    pub(crate) counts_tokens: bool,
}

struct Slot<A> {
    assembler: A,
    counts_prompt: bool,
    counts_tokens: bool,
    reasoning_tokens: u64,
    done: bool,
}

/// All choices of a request. Dropping it cancels what still runs.
pub(crate) struct Replies<A: Assembler> {
    events: StreamMap<usize, Events>,
    slots: Vec<Slot<A>>,
    usage: Usage,
    meter: Meter,
    request_id: String,
    /// What the endpoint calls its prompt.
    prompt: &'static str,
    _place: OwnedSemaphorePermit,
}

impl<A: Assembler> Replies<A> {
    pub(crate) fn new(
        choices: Vec<Choice<A>>,
        prompt_tokens: u64,
        mut meter: Meter,
        request_id: String,
        prompt: &'static str,
        place: OwnedSemaphorePermit,
    ) -> Self {
        let mut events = StreamMap::with_capacity(choices.len());
        let mut slots = Vec::with_capacity(choices.len());
        for (index, choice) in choices.into_iter().enumerate() {
            let stream: Events = Box::pin(choice.generation.into_events());
            events.insert(index, stream);
            slots.push(Slot {
                assembler: choice.assembler,
                counts_prompt: choice.counts_prompt,
                counts_tokens: choice.counts_tokens,
                reasoning_tokens: 0,
                done: false,
            });
        }
        meter.prompt(prompt_tokens);
        let usage = Usage { prompt_tokens, ..Usage::default() };
        Self { events, slots, usage, meter, request_id, prompt, _place: place }
    }

    /// The next step of any choice; `None` when all are finished. Safe to drop between polls.
    pub(crate) async fn next(&mut self) -> Option<Result<Step<A::Piece>, ApiError>> {
        let error = match self.events.next().await {
            // A client that reads on would take an aborted answer for a whole one.
            Some((_, Ok(Event::Finished(end)))) if end.reason() == v1::FinishReason::Aborted => {
                return Some(Err(ApiError::aborted()));
            }
            Some((index, Ok(event))) => return Some(Ok(self.take(index, event))),
            Some((_, Err(fault))) => fault,
            None if self.slots.iter().all(|slot| slot.done) => return None,
            None => Fault::new(FaultKind::Internal, "a stream ended without its last event"),
        };
        Some(Err(api_error(&error, &self.request_id, self.prompt)))
    }

    fn take(&mut self, index: usize, event: Event) -> Step<A::Piece> {
        let mut step = Step { index, pieces: Vec::new(), token_ids: Vec::new(), finish: None };
        match event {
            Event::Admitted(admitted) => {
                self.meter.admitted(&admitted);
                if self.slots[index].counts_prompt {
                    self.usage.cached_tokens += u64::from(admitted.cached_tokens);
                }
            }
            Event::Tokens(chunk) => self.take_tokens(&chunk, &mut step),
            Event::Finished(finished) => {
                let length = finished.reason() == v1::FinishReason::Length;
                self.finish(length, &mut step);
            }
        }
        step
    }

    fn take_tokens(&mut self, chunk: &v1::TokenChunk, step: &mut Step<A::Piece>) {
        let slot = &mut self.slots[step.index];
        if !chunk.prompt.is_empty() {
            slot.assembler.push_prompt(&chunk.prompt, &mut step.pieces);
        }
        for token in &chunk.tokens {
            if slot.assembler.has_stopped() {
                break;
            }
            slot.assembler.push(token, &mut step.pieces);
            step.token_ids.push(token.id);
        }
        if slot.counts_tokens {
            let (count, reasoning) = (step.token_ids.len(), slot.assembler.reasoning_tokens());
            self.usage.completion_tokens += count as u64;
            self.usage.reasoning_tokens += reasoning - slot.reasoning_tokens;
            slot.reasoning_tokens = reasoning;
            if count > 0 {
                self.meter.tokens(step.index, count);
            }
        } else {
            step.token_ids.clear();
        }
        if self.slots[step.index].assembler.has_stopped() {
            self.finish(false, step);
        }
    }

    /// Ends a choice. Its stream is dropped, which cancels it if it still runs.
    fn finish(&mut self, length: bool, step: &mut Step<A::Piece>) {
        self.events.remove(&step.index);
        let slot = &mut self.slots[step.index];
        slot.done = true;
        slot.assembler.finish(&mut step.pieces);
        // What is held back at the end may still hold a stop string, which then is why the answer ends.
        let reason = slot.assembler.finish_reason(length || !slot.counts_tokens);
        self.meter.ended(reason);
        step.finish = Some(reason);
    }

    /// The tokens taken so far.
    pub(crate) fn usage(&self) -> Usage {
        self.usage
    }

    /// The request's span.
    pub(crate) fn span(&self) -> tracing::Span {
        self.meter.span().clone()
    }

    /// Every choice was answered.
    pub(crate) fn complete(&mut self) -> Usage {
        self.meter.finish(&self.usage);
        self.usage
    }

    /// The request failed.
    pub(crate) fn fail(&mut self, error: &ApiError) {
        self.meter.fail(error);
    }
}
