//! The two gRPC doors: `Inference` for clients, `Cluster` for workers. They turn messages into what a group's task
//! understands and decide nothing themselves.

pub(crate) mod cluster;
pub(crate) mod inference;
mod request;
mod watch;

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    sync::Arc,
};

use phalanx_proto::fault::{Fault, FaultKind};

use crate::group::GroupHandle;

/// Every deployment of this coordinator.
pub(crate) type Groups = Arc<Vec<GroupHandle>>;

/// The deployment of a name; without a name, the only one.
fn find_group<'a>(groups: &'a [GroupHandle], model: &str) -> Result<&'a GroupHandle, Fault> {
    if let ([only], "") = (groups, model) {
        return Ok(only);
    }
    groups.iter().find(|group| group.deployment.config.served_model_name == model).ok_or_else(|| {
        let served: Vec<_> = groups.iter().map(|group| group.deployment.config.served_model_name.as_str()).collect();
        let text = format!("model {model:?} is not served here; served are {served:?}");
        Fault { field: "model".into(), ..Fault::new(FaultKind::ModelNotFound, text) }
    })
}

/// A number that nobody can foresee: the keys of a new hasher are drawn from the system's entropy.
fn draw() -> u64 {
    RandomState::new().build_hasher().finish()
}
