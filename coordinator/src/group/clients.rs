//! The streams of live requests: which request is which sequence, and what its client has not taken yet.
//!
//! Every stream ends in exactly one terminal item: `Finished`, or an error. A client that does not read costs one
//! merged chunk of memory and, after a while, its sequence.

use std::{collections::VecDeque, time::Duration};

use phalanx_proto::{
    fault::Fault,
    ids::SequenceId,
    v1::{self, generate_event::Event},
};
use rustc_hash::FxHashMap;
use tokio::sync::mpsc::{self, error::TrySendError};
use tonic::Status;
use tracing::Span;

/// What a client's stream carries.
pub(crate) type ClientItem = Result<v1::GenerateEvent, Status>;

/// Everything that belongs to one request outside the engine.
#[derive(Debug)]
pub(super) struct Client {
    pub request_id: String,
    events: mpsc::Sender<ClientItem>,
    /// Not taken yet; chunks of tokens are merged, so that this stays short.
    pending: VecDeque<ClientItem>,
    stalled_since: Option<Duration>,
    span: Span,
    admitted: bool,
    /// Failed epochs that it lived through.
    replays: u32,
    ended: bool,
}

impl Client {
    pub(super) fn new(request_id: String, events: mpsc::Sender<ClientItem>, span: Span) -> Self {
        let pending = VecDeque::new();
        let (stalled_since, admitted, replays, ended) = (None, false, 0, false);
        Self { request_id, events, pending, stalled_since, span, admitted, replays, ended }
    }

    fn push(&mut self, item: ClientItem, now: Duration) {
        if let Some(Ok(v1::GenerateEvent { event: Some(Event::Tokens(waiting)) })) = self.pending.back_mut()
            && let Ok(v1::GenerateEvent { event: Some(Event::Tokens(chunk)) }) = item
        {
            waiting.tokens.extend(chunk.tokens);
            waiting.prompt.extend(chunk.prompt);
        } else {
            self.pending.push_back(item);
        }
        self.flush(now);
    }

    fn flush(&mut self, now: Duration) {
        while let Some(item) = self.pending.pop_front() {
            match self.events.try_send(item) {
                Ok(()) => self.stalled_since = None,
                Err(TrySendError::Full(item)) => {
                    self.pending.push_front(item);
                    self.stalled_since.get_or_insert(now);
                    return;
                }
                // The hang-up is noticed elsewhere; nobody will read what is left.
                Err(TrySendError::Closed(_)) => self.pending.clear(),
            }
        }
    }

    fn is_done(&self) -> bool {
        self.ended && self.pending.is_empty()
    }
}

/// All live requests.
#[derive(Debug, Default)]
pub(super) struct Clients {
    by_sequence: FxHashMap<SequenceId, Client>,
    by_request: FxHashMap<String, SequenceId>,
}

impl Clients {
    pub(super) fn find(&self, request_id: &str) -> Option<SequenceId> {
        self.by_request.get(request_id).copied()
    }

    pub(super) fn insert(&mut self, sequence: SequenceId, client: Client) {
        self.by_request.insert(client.request_id.clone(), sequence);
        self.by_sequence.insert(sequence, client);
    }

    /// Whether every stream has ended and been taken.
    pub(super) fn is_empty(&self) -> bool {
        self.by_sequence.is_empty()
    }

    pub(super) fn admitted(&mut self, sequence: SequenceId, mut message: v1::Admitted, now: Duration) {
        let Some(client) = self.by_sequence.get_mut(&sequence) else { return };
        // A sequence is admitted again after preemption and in a new epoch; clients need not know.
        if std::mem::replace(&mut client.admitted, true) {
            return;
        }
        message.request_id.clone_from(&client.request_id);
        client.push(event(Event::Admitted(message)), now);
    }

    pub(super) fn tokens(&mut self, sequence: SequenceId, chunk: v1::TokenChunk, now: Duration) {
        if let Some(client) = self.by_sequence.get_mut(&sequence) {
            client.push(event(Event::Tokens(chunk)), now);
        }
    }

    /// Ends a stream in order.
    pub(super) fn finished(&mut self, sequence: SequenceId, message: v1::Finished, now: Duration) {
        if let Some(client) = self.by_sequence.get(&sequence) {
            client.span.record("completion_tokens", message.completion_tokens);
            client.span.record("finish_reason", message.reason().as_str_name());
        }
        self.end(sequence, event(Event::Finished(message)), now);
    }

    /// Ends a stream with an error.
    pub(super) fn failed(&mut self, sequence: SequenceId, fault: Fault, now: Duration) {
        if let Some(client) = self.by_sequence.get(&sequence) {
            client.span.record("finish_reason", fault.kind.name());
        }
        self.end(sequence, Err(fault.into()), now);
    }

    fn end(&mut self, sequence: SequenceId, item: ClientItem, now: Duration) {
        let Some(client) = self.by_sequence.get_mut(&sequence).filter(|client| !client.ended) else { return };
        client.ended = true;
        client.push(item, now);
        // The id may be used again, even while the end is still being read.
        self.by_request.remove(&client.request_id);
        if client.is_done() {
            self.by_sequence.remove(&sequence);
        }
    }

    /// Forgets a stream that nobody reads any more. Whether its sequence was still live.
    pub(super) fn hung_up(&mut self, sequence: SequenceId) -> bool {
        let Some(client) = self.by_sequence.remove(&sequence) else { return false };
        if client.ended {
            return false;
        }
        client.span.record("finish_reason", "hung_up");
        self.by_request.remove(&client.request_id);
        true
    }

    /// Offers what waits to clients that did not read. Gives the sequences whose clients have not read for `patience`.
    pub(super) fn flush(&mut self, patience: Duration, now: Duration) -> Vec<SequenceId> {
        for client in self.by_sequence.values_mut().filter(|client| !client.pending.is_empty()) {
            client.flush(now);
        }
        self.by_sequence.retain(|_, client| !client.is_done());
        let stalled = |client: &Client| client.stalled_since.is_some_and(|since| now.saturating_sub(since) > patience);
        self.by_sequence.iter().filter(|(_, client)| stalled(client)).map(|(&sequence, _)| sequence).collect()
    }

    /// Gives readers more time: the coordinator itself could not write.
    pub(super) fn forgive(&mut self, lateness: Duration) {
        for since in self.by_sequence.values_mut().filter_map(|client| client.stalled_since.as_mut()) {
            *since += lateness;
        }
    }

    /// Counts a failed epoch for every request that has run. Gives those that have seen more than `most`.
    pub(super) fn count_replays(&mut self, most: u32) -> Vec<SequenceId> {
        let mut exhausted = Vec::new();
        for (&sequence, client) in self.by_sequence.iter_mut().filter(|(_, client)| client.admitted && !client.ended) {
            client.replays += 1;
            if client.replays > most {
                exhausted.push(sequence);
            }
        }
        exhausted
    }

    /// Requests that have not ended.
    pub(super) fn live(&self) -> Vec<SequenceId> {
        self.by_sequence.iter().filter(|(_, client)| !client.ended).map(|(&sequence, _)| sequence).collect()
    }
}

fn event(event: Event) -> ClientItem {
    Ok(v1::GenerateEvent { event: Some(event) })
}

#[cfg(test)]
mod tests {
    use phalanx_proto::fault::FaultKind;

    use super::*;

    const S: SequenceId = SequenceId(1);
    const SECOND: Duration = Duration::from_secs(1);

    fn one(capacity: usize) -> (Clients, mpsc::Receiver<ClientItem>) {
        let (events, receiver) = mpsc::channel(capacity);
        let mut clients = Clients::default();
        clients.insert(S, Client::new("r".into(), events, Span::none()));
        (clients, receiver)
    }

    fn chunk(id: u32) -> v1::TokenChunk {
        v1::TokenChunk { tokens: vec![v1::Token { id, ..Default::default() }], prompt: Vec::new() }
    }

    fn ids(item: ClientItem) -> Vec<u32> {
        match item.unwrap().event.unwrap() {
            Event::Tokens(chunk) => chunk.tokens.iter().map(|token| token.id).collect(),
            other => panic!("expected tokens, found {other:?}"),
        }
    }

    #[test]
    fn a_client_that_reads_late_gets_everything_once_and_in_order() {
        let (mut clients, mut receiver) = one(1);
        for id in 0..5 {
            clients.tokens(S, chunk(id), SECOND);
        }
        clients.finished(S, v1::Finished::default(), SECOND);
        assert_eq!(ids(receiver.try_recv().unwrap()), [0]);
        assert!(clients.flush(SECOND, 2 * SECOND).is_empty());
        assert_eq!(ids(receiver.try_recv().unwrap()), [1, 2, 3, 4]);
        assert!(!clients.is_empty(), "its end was not taken yet");
        clients.flush(SECOND, 2 * SECOND);
        assert!(matches!(receiver.try_recv().unwrap().unwrap().event, Some(Event::Finished(_))));
        assert!(clients.is_empty());
    }

    #[test]
    fn a_client_that_does_not_read_is_named_when_patience_is_over() {
        let (mut clients, _receiver) = one(1);
        clients.tokens(S, chunk(0), SECOND);
        clients.tokens(S, chunk(1), SECOND);
        assert!(clients.flush(30 * SECOND, 31 * SECOND).is_empty());
        assert_eq!(clients.flush(30 * SECOND, 32 * SECOND), [S]);
    }

    #[test]
    fn a_stream_ends_once() {
        let (mut clients, mut receiver) = one(4);
        clients.failed(S, Fault::new(FaultKind::WorkerLost, "gone"), SECOND);
        clients.finished(S, v1::Finished::default(), SECOND);
        assert!(receiver.try_recv().unwrap().is_err());
        assert!(receiver.try_recv().is_err());
        assert!(clients.find("r").is_none());
    }

    #[test]
    fn a_request_is_given_up_after_too_many_failed_epochs() {
        let (mut clients, _receiver) = one(4);
        assert!(clients.count_replays(0).is_empty(), "a request that never ran did not fail");
        clients.admitted(S, v1::Admitted::default(), SECOND);
        assert!(clients.count_replays(1).is_empty());
        assert_eq!(clients.count_replays(1), [S]);
    }
}
