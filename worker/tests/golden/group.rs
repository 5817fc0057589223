//! The ranks of a group as threads of one process, each with its shard.

use std::path::Path;

use phalanx_proto::{
    checkpoint::Checkpoint,
    ids::Rank,
    layout::{Layout, Parallelism},
};
use phalanx_worker::{
    backend::Arithmetic,
    collective::{AbortHandle, Collective},
    model::Model,
};

use crate::{
    Candidate,
    in_process::{InProcess, on_every_rank},
};

/// How a model is divided.
pub(crate) type Division = (usize, Parallelism);

/// The whole model on one rank.
pub(crate) const ALONE: Division = (1, Parallelism::Tensor);

/// Runs `script` on every rank of a group that holds the checkpoint at `path`. All ranks must come to the same result,
/// which is the answer.
pub(crate) fn run<B: Candidate, T: PartialEq + Send>(
    path: &Path,
    (world_size, parallelism): Division,
    script: impl Fn(Model<B>, InProcess) -> T + Sync,
) -> T {
    let checkpoint = Checkpoint::open(path).unwrap();
    let layout = Layout::new(&checkpoint.geometry, world_size, parallelism).unwrap();
    let results = on_every_rank(world_size, |end| {
        let _abort = AbortOnPanic(end.abort_handle());
        let rank = layout.rank(&checkpoint.geometry, Rank(end.rank() as u32));
        let backend = B::make(Arithmetic::new(checkpoint.geometry.clone()));
        script(Model::load(&checkpoint, rank, backend, &|_| {}).unwrap(), end)
    });
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "ranks disagree");
    results.into_iter().next().unwrap()
}

/// Lets no rank wait for one that has failed.
struct AbortOnPanic(AbortHandle);

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.abort();
        }
    }
}
