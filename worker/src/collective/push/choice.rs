//! Whether a message goes by push or through NCCL.

use std::str::FromStr;

use thiserror::Error;

use super::MAX_WORLD;

/// Bytes that a rank may send to all its peers together without having been measured to be quicker than NCCL: pushing
/// sends every message to every peer, where a ring sends it about twice in all, and 1 MB is where the two meet on cards
/// behind one PCIe switch.
const UNMEASURED_BYTES: usize = 1 << 20;

/// What the operator asks for (`--all-reduce`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wish {
    /// Whichever is quicker for each size.
    #[default]
    Auto,
    /// Push, for every size that it can serve.
    Push,
    /// NCCL for every size.
    Nccl,
}

impl FromStr for Wish {
    type Err = ChoiceError;

    fn from_str(text: &str) -> Result<Self, ChoiceError> {
        match text {
            "auto" => Ok(Self::Auto),
            "push" => Ok(Self::Push),
            "nccl" => Ok(Self::Nccl),
            _ => Err(ChoiceError::Unknown(text.to_owned())),
        }
    }
}

/// How a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// One-shot push.
    Push,
    /// NCCL.
    Nccl,
}

/// What the choice depends on. It must be the same on every rank, or they wait for each other in different calls: access
/// is the whole group's, and times are the slowest rank's.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// Bytes that a rank sends to one peer.
    pub message_bytes: usize,
    /// Bytes that a channel can take from a rank in one call.
    pub capacity_bytes: usize,
    /// Whether rank `i`'s device can write into rank `j`'s memory, as `[i][j]`; what it says of `[i][i]` does not matter.
    pub peer_access: &'a [Vec<bool>],
    /// Whether every rank has found NCCL.
    pub nccl: bool,
    /// Microseconds that a message of this size took by push, if measured.
    pub push_us: Option<f64>,
    /// The same through NCCL.
    pub nccl_us: Option<f64>,
}

/// Why no way is left.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ChoiceError {
    /// Not a setting.
    #[error("--all-reduce {0:?} is not one of auto, push, nccl")]
    Unknown(String),
    /// Push cannot serve this message.
    #[error("push cannot serve it: {0}")]
    NoPush(String),
    /// There is no NCCL.
    #[error("NCCL was not found on every rank; install nvidia-nccl-cu12")]
    NoNccl,
    /// There is neither.
    #[error("NCCL was not found on every rank (install nvidia-nccl-cu12), and push cannot serve it: {0}")]
    Neither(String),
}

/// Chooses the way of one size of message.
///
/// # Errors
/// When what is asked for is not possible: `push` for a message that is too large falls back to NCCL, but not for
/// devices that cannot reach each other, where the operator is mistaken.
pub fn choose(wish: Wish, facts: &Facts<'_>) -> Result<Way, ChoiceError> {
    let unreachable = unreachable(facts.peer_access);
    let too_large = (facts.message_bytes > facts.capacity_bytes)
        .then(|| format!("{} bytes are more than its slots' {}", facts.message_bytes, facts.capacity_bytes));
    match (wish, unreachable, too_large, facts.nccl) {
        (Wish::Nccl, _, _, true) => Ok(Way::Nccl),
        (Wish::Nccl, _, _, false) => Err(ChoiceError::NoNccl),
        (Wish::Push, Some(cause), _, _) => Err(ChoiceError::NoPush(cause)),
        (_, Some(cause), _, false) | (_, None, Some(cause), false) => Err(ChoiceError::Neither(cause)),
        (_, Some(_), _, true) | (_, None, Some(_), true) => Ok(Way::Nccl),
        (Wish::Push, None, None, _) | (Wish::Auto, None, None, false) => Ok(Way::Push),
        (Wish::Auto, None, None, true) => Ok(quicker(facts)),
    }
}

/// Why push cannot connect these devices.
fn unreachable(access: &[Vec<bool>]) -> Option<String> {
    let world = access.len();
    if !(1..=MAX_WORLD).contains(&world) {
        return Some(format!("it serves 1 to {MAX_WORLD} ranks, not {world}"));
    }
    let pairs = (0..world).flat_map(|from| (0..world).map(move |to| (from, to)));
    let blocked = |&(from, to): &(usize, usize)| from != to && access[from].get(to) != Some(&true);
    let (from, to) = pairs.into_iter().find(blocked)?;
    Some(format!("rank {from}'s device cannot write to rank {to}'s memory"))
}

fn quicker(facts: &Facts<'_>) -> Way {
    let peers = facts.peer_access.len() - 1;
    let push = match (facts.push_us, facts.nccl_us) {
        (Some(push), Some(nccl)) => push <= nccl,
        _ => facts.message_bytes * peers <= UNMEASURED_BYTES,
    };
    if push { Way::Push } else { Way::Nccl }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(world: usize) -> Vec<Vec<bool>> {
        vec![vec![true; world]; world]
    }

    fn facts(peer_access: &[Vec<bool>]) -> Facts<'_> {
        let (message_bytes, capacity_bytes) = (11_520, 64 * 11_520);
        Facts { message_bytes, capacity_bytes, peer_access, nccl: true, push_us: None, nccl_us: None }
    }

    #[test]
    fn wishes_are_spelled_as_in_the_help() {
        assert_eq!("auto".parse(), Ok(Wish::Auto));
        assert_eq!("push".parse(), Ok(Wish::Push));
        assert_eq!("nccl".parse(), Ok(Wish::Nccl));
        assert_eq!("NCCL".parse::<Wish>(), Err(ChoiceError::Unknown("NCCL".to_owned())));
    }

    #[test]
    fn small_messages_are_pushed_and_large_ones_go_through_nccl() {
        let access = full(4);
        let of = |message_bytes| Facts { message_bytes, ..facts(&access) };
        assert_eq!(choose(Wish::Auto, &of(11_520)), Ok(Way::Push));
        assert_eq!(choose(Wish::Auto, &of((1 << 20) / 3)), Ok(Way::Push));
        assert_eq!(choose(Wish::Auto, &of((1 << 20) / 3 + 1)), Ok(Way::Nccl));
        assert_eq!(choose(Wish::Push, &of(64 * 11_520)), Ok(Way::Push));
        assert_eq!(choose(Wish::Push, &of(64 * 11_520 + 1)), Ok(Way::Nccl));
        assert_eq!(choose(Wish::Nccl, &of(16)), Ok(Way::Nccl));
    }

    #[test]
    fn measurements_overrule_the_rule() {
        let access = full(2);
        let of = |push_us, nccl_us| Facts { push_us: Some(push_us), nccl_us, ..facts(&access) };
        assert_eq!(choose(Wish::Auto, &of(6.0, Some(21.0))), Ok(Way::Push));
        assert_eq!(choose(Wish::Auto, &of(31.0, Some(21.0))), Ok(Way::Nccl));
        assert_eq!(choose(Wish::Auto, &of(31.0, None)), Ok(Way::Push), "one time alone says nothing");
    }

    #[test]
    fn one_pair_without_access_rules_push_out() {
        let mut access = full(4);
        access[2][1] = false;
        access[3][3] = false;
        let cause = "rank 2's device cannot write to rank 1's memory".to_owned();
        assert_eq!(choose(Wish::Auto, &facts(&access)), Ok(Way::Nccl));
        assert_eq!(choose(Wish::Push, &facts(&access)), Err(ChoiceError::NoPush(cause.clone())));
        let alone = Facts { nccl: false, ..facts(&access) };
        assert_eq!(choose(Wish::Auto, &alone), Err(ChoiceError::Neither(cause)));
        assert_eq!(choose(Wish::Auto, &facts(&full(9))), Ok(Way::Nccl), "too many ranks");
        access[2].truncate(1);
        assert_eq!(choose(Wish::Auto, &facts(&access)), Ok(Way::Nccl), "what is not said is not so");
    }

    #[test]
    fn without_nccl_push_serves_what_fits() {
        let access = full(4);
        let small = Facts { nccl: false, ..facts(&access) };
        let large = Facts { message_bytes: 1 << 30, ..small };
        assert_eq!(choose(Wish::Auto, &small), Ok(Way::Push));
        assert!(matches!(choose(Wish::Auto, &large), Err(ChoiceError::Neither(_))));
        assert!(matches!(choose(Wish::Push, &large), Err(ChoiceError::Neither(_))));
        assert_eq!(choose(Wish::Nccl, &small), Err(ChoiceError::NoNccl));
    }
}
