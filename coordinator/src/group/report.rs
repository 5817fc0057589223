//! What `Watch` shows of a group.

use phalanx_proto::v1::{self, GroupState};

use super::{
    actor::{Group, Phase},
    roster::{Load, Member},
};

/// The group's state as others see it.
pub(super) fn state(group: &Group) -> GroupState {
    if group.draining_since.is_some() {
        return GroupState::Draining;
    }
    match group.phase {
        Phase::Running { .. } => GroupState::Ready,
        Phase::Failed { .. } => GroupState::Failed,
        _ if group.was_ready => GroupState::Fenced,
        Phase::Preparing { .. } | Phase::Forming { .. } => GroupState::Warming,
        Phase::Gathering { .. } if group.roster.missing().is_empty() => GroupState::Loading,
        Phase::Gathering { .. } => GroupState::Joining,
    }
}

/// Why the state is what it is.
pub(super) fn detail(group: &Group) -> String {
    let now = match &group.phase {
        Phase::Gathering { .. } => gathering(group),
        Phase::Preparing { epoch, .. } | Phase::Forming { epoch, .. } => format!("forming epoch {epoch}"),
        Phase::Running { .. } => return degraded(group),
        Phase::Failed { reason } => return reason.clone(),
    };
    if group.last_failure.is_empty() { now } else { format!("{now}; {}", group.last_failure) }
}

/// Empty for a group that runs without trouble.
fn degraded(group: &Group) -> String {
    let Some(failures) = group.crashes.too_many(group.now()) else { return String::new() };
    format!("degraded: {failures} epochs failed within the last minute, the last one: {}", group.last_failure)
}

fn gathering(group: &Group) -> String {
    let missing: Vec<String> = group.roster.missing().iter().map(ToString::to_string).collect();
    if !missing.is_empty() {
        let ranks = if missing.len() == 1 { "rank" } else { "ranks" };
        return format!("waiting for {ranks} {} of {} to join", missing.join(", "), group.deployment.world_size());
    }
    let loading = |(_, rank, member): (_, phalanx_proto::ids::Rank, &Member)| match member.load {
        Load::Loading { loaded, total } => Some(format!("rank {rank} {} %", loaded * 100 / total.max(1))),
        Load::Loaded { .. } => None,
    };
    let loading: Vec<String> = group.roster.ranked().filter_map(loading).collect();
    if loading.is_empty() { "about to form".to_owned() } else { format!("loading: {}", loading.join(", ")) }
}

/// State, load and totals.
pub(super) fn load(group: &Group) -> v1::DeploymentLoad {
    let stats = group.engine.stats();
    // In use / in all of the pool that is fuller, compared without dividing.
    let full = (stats.full_blocks_used as u64, stats.full_blocks as u64);
    let sliding = (stats.sliding_blocks_used as u64, stats.sliding_blocks as u64);
    let fuller = if full.1 == 0 || sliding.0 * full.1 > full.0 * sliding.1 { sliding } else { full };
    v1::DeploymentLoad {
        deployment: Some(v1::Deployment { max_model_len: group.context as u32, ..group.deployment.describe() }),
        state: state(group).into(),
        detail: detail(group),
        epoch: group.phase.epoch().map_or(0, |epoch| epoch.0),
        running: stats.running as u32,
        waiting: stats.waiting as u32,
        max_waiting: group.deployment.config.max_num_queued_reqs as u32,
        kv_blocks_used: fuller.0,
        kv_blocks: fuller.1,
        totals: Some(totals(group, &stats.totals)),
        ranks: ranks(group),
        waiting_tokens: stats.waiting_tokens as u64,
        max_waiting_tokens: group.deployment.config.max_queued_tokens as u64,
        tokens_per_second: stats.tokens_per_second,
        retry_after_ms: stats.retry_after.as_millis() as u64,
        max_queue_age_ms: group.limits.max_queue_age.as_millis() as u64,
    }
}

fn totals(group: &Group, engine: &crate::engine::Totals) -> v1::Totals {
    let mut totals = v1::Totals {
        steps: engine.steps,
        prompt_tokens: engine.prompt_tokens,
        generation_tokens: engine.generation_tokens,
        prefix_cache_queries: engine.prefix_cache_queries,
        prefix_cache_hits: engine.prefix_cache_hits,
        preemptions: engine.preemptions,
        finished_stop: engine.finished_stop,
        finished_length: engine.finished_length,
        finished_aborted: engine.finished_aborted,
        refused: engine.refused,
        expired: engine.expired,
        ..Default::default()
    };
    group.instruments.add_to(&mut totals);
    totals
}

fn ranks(group: &Group) -> Vec<v1::RankState> {
    let kv_bytes = match &group.phase {
        Phase::Forming { pools, .. } | Phase::Running { pools, .. } => pools.bytes(&group.deployment.block_bytes()),
        _ => 0,
    };
    let state = |(_, rank, member): (_, phalanx_proto::ids::Rank, &Member)| {
        let (weight_bytes, loaded_bytes) = match member.load {
            Load::Loading { loaded, total } => (total, loaded),
            Load::Loaded { weight_bytes, .. } => (weight_bytes, weight_bytes),
        };
        v1::RankState {
            rank: rank.0,
            host: member.hello.host.clone(),
            device: member.hello.device.clone(),
            weight_bytes,
            loaded_bytes,
            kv_bytes,
        }
    };
    let mut ranks: Vec<v1::RankState> = group.roster.ranked().map(state).collect();
    ranks.sort_unstable_by_key(|rank| rank.rank);
    ranks
}
