//! One stream of tokens that goes on where it was when its coordinator or its workers are lost.
//!
//! The journal is the prompt and the tokens received; it lives in memory as long as the request does.

use std::sync::Arc;

use futures::stream::{self, Stream};
use phalanx_proto::{
    fault::{Fault, FaultKind},
    v1::{FinishReason, Finished, GenerateEvent, GenerateRequest, generate_event::Event},
};
use tokio::time::Instant;
use tonic::Streaming;
use tracing::{Span, warn};

use super::{Pause, Upstream};

/// One choice being generated. Dropping it cancels it on every rank.
pub(crate) struct Generation {
    upstream: Arc<Upstream>,
    /// As it was first sent.
    request: GenerateRequest,
    received: Vec<u32>,
    admitted: bool,
    /// Whether the prompt's log-probabilities have arrived.
    prompt_seen: bool,
    stream: Streaming<GenerateEvent>,
    resumes: u32,
    ended: bool,
    span: Span,
}

/// Faults after which another attempt may succeed though nothing was asked differently: here, or at another coordinator.
fn is_passing(kind: FaultKind) -> bool {
    use FaultKind::{CollectiveAborted, Draining, NotReady, StaleEpoch};
    // Not `WorkerLost`: the coordinator says that of what it has replayed as often, or held as long, as it may.
    matches!(kind, NotReady | Draining | CollectiveAborted | StaleEpoch)
}

impl Generation {
    /// Submits a request. The seed must be set, so that a continuation draws what the first attempt would have.
    ///
    /// # Errors
    /// What the coordinator answers, or that none is ready in time.
    pub(crate) async fn start(upstream: Arc<Upstream>, request: GenerateRequest, span: Span) -> Result<Self, Fault> {
        let deadline = Instant::now() + upstream.timeouts.ready;
        let mut pause = Pause::default();
        upstream.budget.deposit();
        loop {
            upstream.ready(deadline.saturating_duration_since(Instant::now())).await?;
            match upstream.generate(request.clone(), &span).await {
                Ok(stream) => {
                    return Ok(Self {
                        upstream,
                        request,
                        received: Vec::new(),
                        admitted: false,
                        prompt_seen: false,
                        stream,
                        resumes: 0,
                        ended: false,
                        span,
                    });
                }
                Err(fault) if is_passing(fault.kind) && Instant::now() < deadline && upstream.budget.withdraw() => {
                    pause.wait().await;
                }
                Err(fault) => return Err(fault),
            }
        }
    }

    /// The events in order; after an error or `Finished` there is nothing more.
    pub(crate) fn into_events(self) -> impl Stream<Item = Result<Event, Fault>> + Send {
        stream::unfold(self, |mut generation| async move {
            let event = generation.next().await?;
            Some((event, generation))
        })
    }

    async fn next(&mut self) -> Option<Result<Event, Fault>> {
        while !self.ended {
            let fault = match self.stream.message().await {
                Ok(Some(message)) => match message.event.and_then(|event| self.note(event)) {
                    Some(event) => return Some(Ok(event)),
                    None => continue,
                },
                Ok(None) => Fault::new(FaultKind::NotReady, "the coordinator broke off the stream"),
                Err(status) => Fault::from(&status),
            };
            if let Some(finished) = self.already_finished() {
                self.ended = true;
                return Some(Ok(Event::Finished(finished)));
            }
            if let Err(fault) = self.resume(fault).await {
                self.ended = true;
                return Some(Err(fault));
            }
        }
        None
    }

    /// Writes an event into the journal; nothing if the client has seen it before.
    fn note(&mut self, event: Event) -> Option<Event> {
        match &event {
            Event::Admitted(_) if std::mem::replace(&mut self.admitted, true) => return None,
            Event::Admitted(_) => {}
            Event::Tokens(chunk) => {
                self.prompt_seen |= !chunk.prompt.is_empty();
                self.received.extend(chunk.tokens.iter().map(|token| token.id));
            }
            Event::Finished(_) => self.ended = true,
        }
        Some(event)
    }

    /// What the lost `Finished` must have said, if the last token was the last.
    fn already_finished(&self) -> Option<Finished> {
        let completion_tokens = u32::try_from(self.received.len()).unwrap_or(u32::MAX);
        let sampling = self.request.sampling.clone().unwrap_or_default();
        let stopped = self.received.last().is_some_and(|last| self.request.stop_token_ids.contains(last));
        let reason = if stopped && !sampling.ignore_eos {
            FinishReason::Stop
        } else if self.request.max_tokens.is_some_and(|most| completion_tokens >= most) {
            FinishReason::Length
        } else {
            return None;
        };
        let prompt_tokens = u32::try_from(self.request.prompt.len()).unwrap_or(u32::MAX);
        Some(Finished { reason: reason as i32, prompt_tokens, completion_tokens, cached_tokens: 0 })
    }

    /// Takes the stream up again after the tokens received, or gives back why that cannot be.
    async fn resume(&mut self, fault: Fault) -> Result<(), Fault> {
        if !is_passing(fault.kind) || self.resumes >= self.upstream.resumes {
            return Err(fault);
        }
        self.resumes += 1;
        warn!(parent: &self.span, resumes = self.resumes, tokens = self.received.len(), error = %fault, "resuming");
        let mut request = self.request.clone();
        // The id of the lost attempt may still be in use.
        request.request_id = format!("{}-r{}", self.request.request_id, self.resumes);
        request.resume.clone_from(&self.received);
        if let Some(sampling) = &mut request.sampling
            && self.prompt_seen
        {
            sampling.prompt_logprobs = None;
        }
        self.stream = self.reopen(request, &fault).await?;
        Ok(())
    }

    /// Opens a stream as soon as there is somebody to open it with; `fault` is why.
    async fn reopen(&self, request: GenerateRequest, fault: &Fault) -> Result<Streaming<GenerateEvent>, Fault> {
        let deadline = Instant::now() + self.upstream.timeouts.stall;
        let mut pause = Pause::default();
        loop {
            pause.wait().await;
            let again = match self.upstream.ready(deadline.saturating_duration_since(Instant::now())).await {
                Ok(()) => self.upstream.generate(request.clone(), &self.span).await,
                Err(fault) => Err(fault),
            };
            match again {
                Ok(stream) => return Ok(stream),
                Err(again) if !again.kind.is_transient() => return Err(again),
                Err(_) if Instant::now() < deadline && !self.upstream.fleet.borrow().has_failed() => {}
                Err(again) => return Err(Fault::new(FaultKind::WorkerLost, format!("{fault}; then {again}"))),
            }
        }
    }
}
