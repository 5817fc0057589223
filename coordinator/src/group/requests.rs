//! Requests of clients: taken in, aborted, hung up on, too slow to read, given up.

use std::time::Duration;

use futures::FutureExt;
use phalanx_proto::{
    fault::{Fault, FaultKind},
    ids::SequenceId,
};
use tracing::{debug, warn};

use super::{
    Submission,
    actor::{Group, Phase},
    clients::Client,
};

impl Group {
    /// Takes a request in, or says why not. Its stream is watched from now on: a hang-up cancels it.
    pub(super) fn submit(&mut self, submission: Submission) {
        let Submission { request, events, span, reply } = submission;
        let request_id = request.request_id.clone();
        let accepted = self.check_open(&request_id).inspect_err(|_| self.instruments.refused += 1);
        let now = self.now();
        let sequence = match accepted.and_then(|()| self.engine.submit(request, now)) {
            Ok(sequence) => sequence,
            Err(fault) => {
                // Whoever asked may be gone; then nothing was promised to anybody.
                let _ = reply.send(Err(fault));
                return;
            }
        };
        self.touched = true;
        let stream = events.clone();
        self.hang_ups.push(async move { stream.closed().await }.map(move |()| sequence).boxed());
        self.clients.insert(sequence, Client::new(request_id, events, span));
        // If the caller left meanwhile, its stream is closed as well, which is noticed like any hang-up.
        let _ = reply.send(Ok(()));
        self.deliver_due();
    }

    fn check_open(&self, request_id: &str) -> Result<(), Fault> {
        if self.draining_since.is_some() {
            return Err(Fault::new(FaultKind::Draining, "the coordinator is shutting down"));
        }
        if let Phase::Failed { reason } = &self.phase {
            return Err(Fault::new(FaultKind::NotReady, format!("the group failed: {reason}")));
        }
        if !self.was_ready {
            let text = format!("the group is not ready: {}", super::report::detail(self));
            return Err(Fault::new(FaultKind::NotReady, text));
        }
        if self.clients.find(request_id).is_some() {
            let fault = Fault::new(FaultKind::DuplicateRequest, format!("request {request_id:?} is running already"));
            return Err(Fault { field: "request_id".into(), ..fault });
        }
        Ok(())
    }

    /// Ends a request by its id. Whether there was one.
    pub(super) fn abort(&mut self, request_id: &str) -> bool {
        let Some(sequence) = self.clients.find(request_id) else { return false };
        let aborted = self.engine.cancel(sequence);
        self.deliver_due();
        aborted
    }

    /// Ends a request whose client dropped its stream.
    pub(super) fn hung_up(&mut self, sequence: SequenceId) {
        if self.clients.hung_up(sequence) {
            debug!(sequence = sequence.0, "client hung up");
            self.engine.cancel(sequence);
            self.deliver_due();
        }
    }

    /// Refuses requests that have waited for too long without being served.
    pub(super) fn expire_queued(&mut self, now: Duration) {
        self.engine.expire(now);
        self.deliver_due();
    }

    /// Ends requests whose clients have stopped reading.
    pub(super) fn cancel_slow_readers(&mut self, now: Duration) {
        for sequence in self.clients.flush(self.limits.client_stall, now) {
            warn!(sequence = sequence.0, "client does not read, cancelling its request");
            self.clients.hung_up(sequence);
            self.engine.cancel(sequence);
        }
        self.deliver_due();
    }

    /// Ends requests that have been in too many failed epochs.
    pub(super) fn give_up_exhausted(&mut self, reason: &str) {
        for sequence in self.clients.count_replays(self.limits.max_replays) {
            let text = format!("given up after {} failed epochs, the last one: {reason}", self.limits.max_replays + 1);
            self.give_up(sequence, Fault::new(FaultKind::WorkerLost, text));
        }
        self.deliver_due();
    }

    /// Ends every request with an error.
    pub(super) fn fail_live(&mut self, fault: &Fault) {
        for sequence in self.clients.live() {
            self.give_up(sequence, fault.clone());
        }
        self.deliver_due();
    }

    pub(super) fn give_up(&mut self, sequence: SequenceId, fault: Fault) {
        self.clients.failed(sequence, fault, self.now());
        self.engine.cancel(sequence);
    }
}
