//! `Watch`: the state and load of every deployment, when it changed.

use std::{pin::Pin, time::Duration};

use futures::{FutureExt, Stream, future::select_all, stream};
use phalanx_proto::v1;
use tokio::sync::watch;
use tonic::Status;

use super::Groups;

/// When the client names no interval.
const DEFAULT_INTERVAL: Duration = Duration::from_millis(100);

pub(super) type CapacityStream = Pin<Box<dyn Stream<Item = Result<v1::Capacity, Status>> + Send>>;

struct Watch {
    loads: Vec<watch::Receiver<v1::DeploymentLoad>>,
    interval: Duration,
    first: bool,
}

/// Once at once, then whenever something changed, at most every interval. Ends when every group has ended.
pub(super) fn capacity(groups: &Groups, request: &v1::WatchRequest) -> CapacityStream {
    let asked = Duration::from_millis(u64::from(request.interval_ms));
    let watch = Watch {
        loads: groups.iter().map(|group| group.load.clone()).collect(),
        interval: if asked.is_zero() { DEFAULT_INTERVAL } else { asked },
        first: true,
    };
    Box::pin(stream::unfold(watch, next))
}

async fn next(mut watch: Watch) -> Option<(Result<v1::Capacity, Status>, Watch)> {
    if !std::mem::take(&mut watch.first) {
        tokio::time::sleep(watch.interval).await;
        changed(&mut watch.loads).await?;
    }
    let deployments = watch.loads.iter_mut().map(|load| load.borrow_and_update().clone()).collect();
    Some((Ok(v1::Capacity { deployments }), watch))
}

/// Waits for any group to change; nothing when all have ended.
async fn changed(loads: &mut [watch::Receiver<v1::DeploymentLoad>]) -> Option<()> {
    let mut waits: Vec<_> = loads.iter_mut().map(|load| load.changed().boxed()).collect();
    while !waits.is_empty() {
        let (result, _, rest) = select_all(waits).await;
        if result.is_ok() {
            return Some(());
        }
        waits = rest;
    }
    None
}
