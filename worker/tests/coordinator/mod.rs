//! A coordinator in the test's hands: real gRPC on loopback, every message sent and received by the test itself.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use phalanx_proto::{
    fault::Fault,
    v1::{
        self,
        cluster_server::{Cluster, ClusterServer},
        worker_command::Command,
        worker_event::Event,
    },
};
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle, time::timeout};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

/// Nothing here takes longer than this, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why the next workers are turned away, first to last.
type Refusals = Arc<Mutex<VecDeque<Fault>>>;

struct Doors {
    refusals: Refusals,
    attached: mpsc::Sender<Attachment>,
    logs: mpsc::Sender<StepLog>,
}

/// One worker's `Attach` stream.
pub(crate) struct Attachment {
    events: Streaming<v1::WorkerEvent>,
    commands: mpsc::Sender<Result<v1::WorkerCommand, Status>>,
}

/// One worker's `Steps` stream.
pub(crate) struct StepLog {
    messages: Streaming<v1::StepMessage>,
    plans: mpsc::Sender<Result<v1::Plan, Status>>,
}

#[tonic::async_trait]
impl Cluster for Doors {
    type AttachStream = ReceiverStream<Result<v1::WorkerCommand, Status>>;
    type StepsStream = ReceiverStream<Result<v1::Plan, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<v1::WorkerEvent>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let refusal = self.refusals.lock().unwrap().pop_front();
        if let Some(fault) = refusal {
            return Err(fault.into());
        }
        let (commands, outgoing) = mpsc::channel(64);
        let attachment = Attachment { events: request.into_inner(), commands };
        self.attached.send(attachment).await.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }

    async fn steps(&self, request: Request<Streaming<v1::StepMessage>>) -> Result<Response<Self::StepsStream>, Status> {
        let (plans, outgoing) = mpsc::channel(64);
        let log = StepLog { messages: request.into_inner(), plans };
        self.logs.send(log).await.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

/// A listening coordinator.
pub(crate) struct Coordinator {
    pub(crate) address: SocketAddr,
    refusals: Refusals,
    attached: mpsc::Receiver<Attachment>,
    logs: mpsc::Receiver<StepLog>,
    server: JoinHandle<()>,
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what} did not come"))
}

impl Coordinator {
    pub(crate) async fn listen() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (attached_sender, attached) = mpsc::channel(8);
        let (log_sender, logs) = mpsc::channel(8);
        let refusals = Refusals::default();
        let doors =
            ClusterServer::new(Doors { refusals: Arc::clone(&refusals), attached: attached_sender, logs: log_sender });
        let serve = tonic::transport::Server::builder()
            .add_service(doors)
            .serve_with_incoming(TcpListenerStream::new(listener));
        Self { address, refusals, attached, logs, server: tokio::spawn(async move { serve.await.unwrap() }) }
    }

    /// Turns away one more of the next workers.
    pub(crate) fn refuse(&self, fault: Fault) {
        self.refusals.lock().unwrap().push_back(fault);
    }

    /// The next worker that attaches, and its greeting.
    pub(crate) async fn attached(&mut self) -> (Attachment, v1::Hello) {
        let mut attachment = soon("a worker", self.attached.recv()).await.unwrap();
        match attachment.next().await {
            Some(Event::Hello(hello)) => (attachment, hello),
            other => panic!("expected hello, got {other:?}"),
        }
    }

    /// The next step log that is opened, and who opened it.
    pub(crate) async fn joined(&mut self) -> (StepLog, v1::StepJoin) {
        let mut log = soon("a step log", self.logs.recv()).await.unwrap();
        match soon("a step join", log.messages.message()).await.unwrap().unwrap().message {
            Some(v1::step_message::Message::Join(join)) => (log, join),
            other => panic!("expected join, got {other:?}"),
        }
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Attachment {
    /// The next event; `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        soon("an event", self.events.message()).await.ok().flatten().and_then(|event| event.event)
    }

    /// The next event that is no sign of life or loading, and how many of the latter came before.
    pub(crate) async fn news(&mut self) -> (Option<Event>, usize) {
        let mut signs = 0;
        loop {
            match self.next().await {
                Some(Event::Progress(_)) => signs += 1,
                Some(Event::Pulse(_)) => {}
                event => return (event, signs),
            }
        }
    }

    pub(crate) async fn tell(&self, command: Command) {
        self.commands.send(Ok(v1::WorkerCommand { command: Some(command) })).await.unwrap();
    }

    pub(crate) async fn assign(&mut self, rank: u32, world_size: u32) -> v1::Loaded {
        self.tell(Command::Assign(v1::Assign { rank, world_size, parallelism: "tp".into() })).await;
        match self.news().await.0 {
            Some(Event::Loaded(loaded)) => loaded,
            other => panic!("expected loaded, got {other:?}"),
        }
    }

    pub(crate) async fn prepare(&mut self, epoch: u64, incarnation: u64) -> Vec<u8> {
        self.tell(Command::Prepare(v1::Prepare { epoch, incarnation })).await;
        loop {
            match self.news().await.0 {
                Some(Event::Prepared(prepared)) if prepared.epoch == epoch => return prepared.rendezvous,
                // A peer that was fenced first aborts the collective of both.
                Some(Event::Fault(fault)) if fault.epoch < epoch && fault.kind == "collective_aborted" => {}
                other => panic!("expected prepared, got {other:?}"),
            }
        }
    }

    pub(crate) async fn formed(&mut self, epoch: u64) {
        let news = self.news().await.0;
        assert!(matches!(&news, Some(Event::Formed(formed)) if formed.epoch == epoch), "{news:?}");
    }

    /// The fault that comes next.
    pub(crate) async fn fault(&mut self) -> v1::WorkerFault {
        match self.news().await.0 {
            Some(Event::Fault(fault)) => fault,
            other => panic!("expected a fault, got {other:?}"),
        }
    }
}

impl StepLog {
    pub(crate) async fn plan(&self, plan: v1::Plan) {
        self.plans.send(Ok(plan)).await.unwrap();
    }

    /// The next result; `None` when the worker has left the epoch.
    pub(crate) async fn result(&mut self) -> Option<v1::StepResult> {
        match soon("a result", self.messages.message()).await.ok()??.message {
            Some(v1::step_message::Message::Result(result)) => Some(result),
            other => panic!("expected a result, got {other:?}"),
        }
    }
}
