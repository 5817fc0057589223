//! The private door: workers attach, and take and answer plans.

use phalanx_proto::{
    fault::{Fault, FaultKind},
    ids::Epoch,
    v1::{self, cluster_server::Cluster, step_message, worker_event},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{Groups, find_group};
use crate::group::{GroupHandle, MemberId, Message};

/// Commands that wait for a worker. It gets a handful in an epoch's life.
const COMMANDS: usize = 32;
/// Plans that wait for a worker: more than ever are in flight.
const PLANS: usize = 16;

/// `phalanx.v1.Cluster`.
#[derive(Debug)]
pub(crate) struct ClusterService {
    pub groups: Groups,
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    type AttachStream = ReceiverStream<Result<v1::WorkerCommand, Status>>;
    type StepsStream = ReceiverStream<Result<v1::Plan, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<v1::WorkerEvent>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut events = request.into_inner();
        let Some(v1::WorkerEvent { event: Some(worker_event::Event::Hello(hello)) }) = events.message().await? else {
            return Err(first_message("hello"));
        };
        let group = find_group(&self.groups, &hello.deployment)?.clone();
        let (commands, receiver) = mpsc::channel(COMMANDS);
        let attach = |reply| Message::Attach { hello: Box::new(hello), commands, reply };
        let member = group.ask(attach).await??;
        tokio::spawn(read_events(group, member, events));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn steps(&self, request: Request<Streaming<v1::StepMessage>>) -> Result<Response<Self::StepsStream>, Status> {
        let mut messages = request.into_inner();
        let Some(v1::StepMessage { message: Some(step_message::Message::Join(join)) }) = messages.message().await?
        else {
            return Err(first_message("join"));
        };
        let (plans, receiver) = mpsc::channel(PLANS);
        let mut refusal: Status = Fault::new(FaultKind::StaleEpoch, "no group is being formed").into();
        // A join names epoch and incarnation, not the deployment: the group that waits for it takes it.
        for group in self.groups.iter() {
            let plans = plans.clone();
            match group.ask(|reply| Message::JoinSteps { join, plans, reply }).await? {
                Ok(member) => {
                    tokio::spawn(read_results(group.clone(), member, Epoch(join.epoch), messages));
                    return Ok(Response::new(ReceiverStream::new(receiver)));
                }
                Err(fault) => refusal = fault.into(),
            }
        }
        Err(refusal)
    }
}

fn first_message(expected: &str) -> Status {
    Fault::invalid("", format!("the first message of this stream must be `{expected}`")).into()
}

/// Why a stream from a worker ended.
fn end_reason(end: Option<Status>) -> String {
    end.map_or_else(|| "it ended the stream".to_owned(), |status| format!("its stream broke: {}", status.message()))
}

/// Hands on what a worker says about itself, until its stream ends.
async fn read_events(group: GroupHandle, member: MemberId, mut events: Streaming<v1::WorkerEvent>) {
    let reason = loop {
        match events.message().await {
            Ok(Some(v1::WorkerEvent { event: Some(event) })) => {
                if group.send(Message::Event { member, event }).await.is_err() {
                    return;
                }
            }
            // An event of a newer kind.
            Ok(Some(v1::WorkerEvent { event: None })) => {}
            Ok(None) => break end_reason(None),
            Err(status) => break end_reason(Some(status)),
        }
    };
    // Fails only when the group has ended, and then nobody is left to tell.
    let _ = group.send(Message::Detached { member, reason }).await;
}

/// Hands on a rank's acknowledgements, until its stream ends.
async fn read_results(group: GroupHandle, member: MemberId, epoch: Epoch, mut messages: Streaming<v1::StepMessage>) {
    let reason = loop {
        match messages.message().await {
            Ok(Some(v1::StepMessage { message: Some(step_message::Message::Result(result)) })) => {
                if group.send(Message::Result { member, result: Box::new(result) }).await.is_err() {
                    return;
                }
            }
            Ok(Some(_)) => break "it sent something else than a result".to_owned(),
            Ok(None) => break end_reason(None),
            Err(status) => break end_reason(Some(status)),
        }
    };
    let _ = group.send(Message::StepsClosed { member, epoch, reason }).await;
}
