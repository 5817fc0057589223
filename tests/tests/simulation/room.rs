//! Where the ranks of one epoch compute: the real executor over the real model, one thread a rank.
//!
//! A step begins when every rank has brought its plan, and whoever asks for it waits until all have answered. So the
//! simulation stands still meanwhile, and the threads decide nothing about its course.

use std::sync::{
    Mutex, OnceLock,
    mpsc::{self, Receiver, Sender},
};

use phalanx_proto::{
    checkpoint::Checkpoint,
    fault::{Fault, FaultKind},
    ids::Rank,
    layout::{Layout, Parallelism},
    plan::{Plan, message_digest},
    v1,
};
use phalanx_worker::{
    backend::{Arithmetic, cpu::CpuBackend},
    collective::Collective,
    executor::{Executor, Formation},
    model::Model,
};

use crate::in_process::{self, InProcess};

/// Number of ranks in every simulation.
pub(crate) const WORLD_SIZE: usize = 2;

/// The checkpoint, and loaded shards that no epoch uses now, by rank. Weights never change, so that one simulation after
/// the other can use them.
struct Shelf {
    checkpoint: Checkpoint,
    models: [Mutex<Vec<Model<CpuBackend>>>; WORLD_SIZE],
}

fn shelf() -> &'static Shelf {
    static SHELF: OnceLock<Shelf> = OnceLock::new();
    SHELF.get_or_init(|| Shelf {
        checkpoint: Checkpoint::open(&super::model_dir()).unwrap(),
        models: std::array::from_fn(|_| Mutex::default()),
    })
}

fn take_model(rank: usize) -> Model<CpuBackend> {
    let Shelf { checkpoint, models } = shelf();
    let ready = models[rank].lock().unwrap().pop();
    ready.unwrap_or_else(|| {
        let layout = Layout::new(&checkpoint.geometry, WORLD_SIZE, Parallelism::Tensor).unwrap();
        let layout = layout.rank(&checkpoint.geometry, Rank(rank as u32));
        let backend = CpuBackend::new(Arithmetic::new(checkpoint.geometry.clone()), 1).unwrap();
        Model::load(checkpoint, layout, backend, &|_| {}).unwrap()
    })
}

type Answer = Result<v1::StepResult, Fault>;

/// One rank's thread.
struct Desk {
    plans: Sender<v1::Plan>,
    answers: Receiver<Answer>,
}

/// All ranks of one epoch. Their threads end when it is dropped.
pub(crate) struct Room {
    desks: Vec<Desk>,
}

impl Room {
    /// Forms the group.
    pub(crate) fn open(formation: &Formation) -> Result<Self, Fault> {
        let desks: Vec<Desk> =
            in_process::group(WORLD_SIZE).into_iter().map(|end| Desk::start(end, formation.clone())).collect();
        for desk in &desks {
            desk.answers.recv().unwrap_or_else(|_| Err(gone()))?;
        }
        Ok(Self { desks })
    }

    /// Has every rank carry out its plan, and waits for all of them.
    pub(crate) fn step(&self, plans: Vec<v1::Plan>) -> Vec<Answer> {
        for (desk, plan) in self.desks.iter().zip(plans) {
            // A thread that has ended says so below.
            let _ = desk.plans.send(plan);
        }
        self.desks.iter().map(|desk| desk.answers.recv().unwrap_or_else(|_| Err(gone()))).collect()
    }
}

fn gone() -> Fault {
    Fault::new(FaultKind::Internal, "the rank's thread has ended")
}

impl Desk {
    fn start(end: InProcess, formation: Formation) -> Self {
        let (plans, work) = mpsc::channel();
        let (tell, answers) = mpsc::channel();
        std::thread::spawn(move || {
            let (rank, abort) = (end.rank(), end.abort_handle());
            let mut model = take_model(rank);
            let outcome = serve(&mut model, end, &formation, &work, &tell);
            // Ranks that wait for this one must not wait for ever.
            abort.abort();
            shelf().models[rank].lock().unwrap().push(model);
            if let Err(fault) = outcome {
                let _ = tell.send(Err(fault));
            }
        });
        Self { plans, answers }
    }
}

fn serve(
    model: &mut Model<CpuBackend>,
    end: InProcess,
    formation: &Formation,
    work: &Receiver<v1::Plan>,
    tell: &Sender<Answer>,
) -> Result<(), Fault> {
    let vocab_size = model.geometry().vocab_size;
    let mut executor = Executor::new(model, Box::new(end), formation)?;
    executor.warm_up()?;
    let _ = tell.send(Ok(v1::StepResult::default()));
    while let Ok(message) = work.recv() {
        let plan = Plan::from_message(&message, vocab_size)?;
        let _ = tell.send(Ok(executor.execute(&plan, message_digest(&message))?));
    }
    Ok(())
}
