//! The life of one deployment's group: workers come, load, form an epoch, step together, are lost and replaced.
//!
//! One task owns the engine and everything about the group; others speak to it through one bounded channel, and it
//! answers through channels that it never waits for.
//!
//! | module | holds |
//! | --- | --- |
//! | `actor` | the task: messages, time, shutdown |
//! | `formation` | attach → load → prepare → form → ready, and fencing |
//! | `deadlines` | what takes too long |
//! | `crashes`, `poison` | failures that come again: waits between them, and the request that may cause them |
//! | `stepping` | plans out, acknowledgements in, events to clients |
//! | `requests` | submit, abort, hang-up, slow readers |
//! | `roster` | who is attached, with which rank, how far |
//! | `flight` | plans that await acknowledgement; digests and deadlines |
//! | `clients` | the streams of live requests |
//! | `report` | what `Watch` shows |

mod actor;
mod clients;
mod crashes;
mod deadlines;
mod flight;
mod formation;
mod poison;
mod report;
mod requests;
mod roster;
mod stepping;

use std::sync::Arc;

use phalanx_proto::{
    fault::{Fault, FaultKind},
    ids::Epoch,
    v1,
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use tracing::Span;

pub(crate) use self::{
    clients::ClientItem,
    roster::{CommandSender, MemberId, PlanSender},
};
use crate::{
    config::{Deployment, Limits},
    engine,
    membership::{EpochError, Membership},
};

/// Messages that may wait for a group's task; whoever sends more waits.
const INBOX: usize = 1024;

/// A request on its way to the engine.
#[derive(Debug)]
pub(crate) struct Submission {
    pub request: engine::Request,
    pub events: mpsc::Sender<ClientItem>,
    pub span: Span,
    pub reply: oneshot::Sender<Result<(), Fault>>,
}

/// What a group's task is told.
#[derive(Debug)]
pub(crate) enum Message {
    Generate(Box<Submission>),
    Abort { request_id: String, reply: oneshot::Sender<bool> },
    Attach { hello: Box<v1::Hello>, commands: CommandSender, reply: oneshot::Sender<Result<MemberId, Fault>> },
    Event { member: MemberId, event: v1::worker_event::Event },
    Detached { member: MemberId, reason: String },
    JoinSteps { join: v1::StepJoin, plans: PlanSender, reply: oneshot::Sender<Result<MemberId, Fault>> },
    Result { member: MemberId, result: Box<v1::StepResult> },
    StepsClosed { member: MemberId, epoch: Epoch, reason: String },
}

/// How others speak to one group.
#[derive(Clone, Debug)]
pub(crate) struct GroupHandle {
    /// What it serves.
    pub deployment: Arc<Deployment>,
    /// Its state and load, as of lately.
    pub load: watch::Receiver<v1::DeploymentLoad>,
    inbox: mpsc::Sender<Message>,
}

impl GroupHandle {
    /// Hands a message to the group's task, waiting while its inbox is full.
    ///
    /// # Errors
    /// When the task has ended.
    pub(crate) async fn send(&self, message: Message) -> Result<(), Fault> {
        self.inbox.send(message).await.map_err(|_| gone())
    }

    /// Sends a message that is answered.
    ///
    /// # Errors
    /// When the task has ended.
    pub(crate) async fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Result<T, Fault> {
        let (reply, answer) = oneshot::channel();
        self.send(message(reply)).await?;
        answer.await.map_err(|_| gone())
    }
}

fn gone() -> Fault {
    Fault::new(FaultKind::Draining, "the coordinator is shutting down")
}

/// Issues epochs to all groups of one coordinator.
#[derive(Clone, Debug)]
pub(crate) struct Epochs(Arc<dyn Membership>);

impl Epochs {
    pub(crate) fn new(membership: Arc<dyn Membership>) -> Self {
        Self(membership)
    }

    /// The next epoch, greater than `seen`; recorded when this returns.
    async fn next(&self, seen: Epoch) -> Result<Epoch, EpochError> {
        self.0.next_epoch(seen).await
    }
}

/// Starts a group's task. It ends when `shutdown` is cancelled and its running requests have ended or run out of time.
///
/// # Errors
/// When the engine refuses the configuration.
pub(crate) fn spawn(
    deployment: Deployment,
    limits: Limits,
    epochs: Epochs,
    shutdown: CancellationToken,
) -> Result<(GroupHandle, JoinHandle<()>), Fault> {
    let deployment = Arc::new(deployment);
    let (inbox, messages) = mpsc::channel(INBOX);
    let (group, load) = actor::Group::new(Arc::clone(&deployment), limits, epochs)?;
    let task = tokio::spawn(group.run(messages, shutdown));
    Ok((GroupHandle { deployment, load, inbox }, task))
}
