//! The thread that owns a worker's weights: it loads them, and runs one epoch after the other over them.
//!
//! Everything here blocks. The asynchronous side ([`crate::join`]) talks to it through bounded channels and ends a blocked
//! epoch through the collective's abort handle.

use std::{io, sync::Arc, thread, time::Duration};

use phalanx_proto::{
    checkpoint::Checkpoint,
    fault::{Fault, FaultKind},
    ids::{Epoch, Rank},
    layout::{Layout, RankLayout},
    plan::{Plan, message_digest},
    v1,
};
use tokio::sync::{mpsc, watch};
use tracing::{debug, info};

use super::{Executor, Formation, faults};
use crate::{
    backend::{Backend, BackendError},
    checkpoint::{LoadedBytes, shard_bytes},
    collective::{Collective, host::Preparation},
    memory,
    model::Model,
};

/// Commands and events that may wait. A coordinator sends the next command after the answer to the one before, so that
/// few are ever under way.
const QUEUE: usize = 16;

/// What the thread is told to do.
pub enum Command {
    /// Load this shard in place of what is resident.
    Load(v1::Assign),
    /// Form a group and execute its plans until their channel closes.
    Run(Box<Run>),
}

/// One epoch to run.
pub struct Run {
    /// This rank's open door; its abort handle ends the epoch at any time.
    pub preparation: Preparation,
    /// Every rank's rendezvous, by rank.
    pub rendezvous: Vec<Vec<u8>>,
    /// How long to wait for the other ranks.
    pub patience: Duration,
    /// What the group is formed with.
    pub formation: Formation,
    /// Plans, as they came.
    pub plans: mpsc::Receiver<v1::Plan>,
    /// Where results go.
    pub results: mpsc::Sender<v1::StepMessage>,
}

/// What the thread tells.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The shard is resident.
    Loaded {
        /// What was asked for.
        assign: v1::Assign,
        /// Bytes of weights, and bytes left for the KV cache.
        loaded: v1::Loaded,
    },
    /// The shard could not be loaded; nothing is resident.
    NotLoaded(Fault),
    /// The group is formed and waits for its first plan.
    Formed(Epoch),
    /// The epoch is over on this rank.
    Ended(Epoch, Result<(), Fault>),
}

/// The way to the thread.
pub struct Device {
    /// Name of the backend.
    pub backend: &'static str,
    /// The device for people.
    pub description: String,
    /// Takes commands, in order.
    pub commands: mpsc::Sender<Command>,
    /// Answers and news. Closes when the thread ends.
    pub events: mpsc::Receiver<Event>,
    /// How far loading has come.
    pub progress: watch::Receiver<LoadedBytes>,
}

/// What the thread holds.
struct Owner<B: Backend, F> {
    checkpoint: Arc<Checkpoint>,
    memory_bytes: u64,
    make_backend: F,
    /// Made when the worker started, for the first shard.
    backend: Option<B>,
    model: Option<Model<B>>,
    events: mpsc::Sender<Event>,
    progress: watch::Sender<LoadedBytes>,
}

impl Device {
    /// Makes a backend with `make_backend` (again for each further shard) and starts the thread. Weights and KV cache
    /// may take `memory_bytes` together.
    ///
    /// # Errors
    /// When the backend cannot run here, or no thread can be started.
    pub fn start<B: Backend + 'static>(
        checkpoint: Arc<Checkpoint>,
        memory_bytes: u64,
        make_backend: impl Fn() -> Result<B, BackendError> + Send + 'static,
    ) -> Result<Self, Fault> {
        let backend = make_backend().map_err(|error| faults::of_backend(&error))?;
        let (name, description) = (backend.name(), backend.device());
        let (command_sender, mut commands) = mpsc::channel(QUEUE);
        let (events, event_receiver) = mpsc::channel(QUEUE);
        let (progress, progress_receiver) = watch::channel(LoadedBytes { loaded: 0, total: 0 });
        let backend = Some(backend);
        let mut owner = Owner { checkpoint, memory_bytes, make_backend, backend, model: None, events, progress };
        let serve = move || {
            while let Some(command) = commands.blocking_recv()
                && owner.obey(command)
            {}
        };
        let no_thread =
            |error: io::Error| Fault::new(FaultKind::Internal, format!("starting the device thread: {error}"));
        thread::Builder::new().name("device".into()).spawn(serve).map_err(no_thread)?;
        Ok(Self {
            backend: name,
            description,
            commands: command_sender,
            events: event_receiver,
            progress: progress_receiver,
        })
    }
}

impl<B: Backend, F: Fn() -> Result<B, BackendError>> Owner<B, F> {
    /// False once nobody listens any more.
    fn obey(&mut self, command: Command) -> bool {
        let event = match command {
            Command::Load(assign) => match self.load(&assign) {
                Ok(loaded) => Event::Loaded { assign, loaded },
                Err(fault) => Event::NotLoaded(fault),
            },
            Command::Run(run) => Event::Ended(run.formation.epoch, self.run(*run)),
        };
        self.events.blocking_send(event).is_ok()
    }

    fn load(&mut self, assign: &v1::Assign) -> Result<v1::Loaded, Fault> {
        let layout = rank_layout(&self.checkpoint, assign)?;
        let weight_bytes = shard_bytes(&self.checkpoint, &layout);
        let working_bytes = memory::working_bytes(&self.checkpoint.geometry, &layout);
        let Some(free_bytes) = self.memory_bytes.checked_sub(weight_bytes + working_bytes) else {
            let message = format!(
                "rank {} of {} needs {weight_bytes} bytes for weights and {working_bytes} for activations, {} are \
                 allowed; use more ranks or allow more memory",
                assign.rank, assign.world_size, self.memory_bytes
            );
            return Err(Fault::new(FaultKind::OutOfMemory, message));
        };
        self.model = None;
        let backend = match self.backend.take() {
            Some(backend) => backend,
            None => (self.make_backend)().map_err(|error| faults::of_backend(&error))?,
        };
        let progress = |bytes| {
            self.progress.send_replace(bytes);
        };
        let model = Model::load(&self.checkpoint, layout, backend, &progress);
        self.model = Some(model.map_err(|error| faults::of_load(&error))?);
        info!(rank = assign.rank, world_size = assign.world_size, weight_bytes, free_bytes, "shard loaded");
        Ok(v1::Loaded { weight_bytes, free_bytes })
    }

    fn run(&mut self, run: Run) -> Result<(), Fault> {
        let Some(model) = self.model.as_mut() else {
            return Err(Fault::new(FaultKind::Internal, "form before any shard was loaded"));
        };
        let epoch = run.formation.epoch;
        let rank = model.layout().rank.index();
        memory::check_cache(model, &run.formation, self.memory_bytes)?;
        let collective = run.preparation.form(rank, &run.rendezvous, run.patience);
        let collective = collective.map_err(|error| faults::of_collective(&error))?;
        let world_size = model.layout().world_size;
        if collective.world_size() != world_size {
            let message = format!("form names {} ranks, the shard is one of {world_size}", collective.world_size());
            return Err(Fault::new(FaultKind::Internal, message));
        }
        info!(rank, %epoch, link = ?collective.link(), "group formed");
        let vocab_size = model.geometry().vocab_size;
        let mut executor = Executor::new(model, Box::new(collective), &run.formation)?;
        executor.warm_up()?;
        if self.events.blocking_send(Event::Formed(epoch)).is_err() {
            return Ok(());
        }
        let mut plans = run.plans;
        while let Some(message) = plans.blocking_recv() {
            let plan = Plan::from_message(&message, vocab_size)?;
            let result = executor.execute(&plan, message_digest(&message))?;
            let message = v1::StepMessage { message: Some(v1::step_message::Message::Result(result)) };
            if run.results.blocking_send(message).is_err() {
                debug!(%epoch, "nobody takes results any more");
                break;
            }
        }
        Ok(())
    }
}

/// What an `Assign` says that this worker holds.
fn rank_layout(checkpoint: &Checkpoint, assign: &v1::Assign) -> Result<RankLayout, Fault> {
    let parallelism = assign.parallelism.parse().map_err(|error| faults::of_layout(&error))?;
    let layout = Layout::new(&checkpoint.geometry, assign.world_size as usize, parallelism);
    let layout = layout.map_err(|error| faults::of_layout(&error))?;
    if assign.rank >= assign.world_size {
        let message = format!("assigned rank {} of a group of {}", assign.rank, assign.world_size);
        return Err(Fault::new(FaultKind::Internal, message));
    }
    Ok(layout.rank(&checkpoint.geometry, Rank(assign.rank)))
}
