//! One step's work as every rank receives it, valid by construction.

use prost::Message;
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    fault::{Fault, FaultKind},
    ids::{BlockId, Epoch, SequenceId, Step, TokenId},
    sampling::SamplingSettings,
    v1,
};

/// What every rank must do in one step, in this order: retire, admit, compute the slices, sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The formation this plan is for.
    pub epoch: Epoch,
    /// Counts from 1 within the epoch, without gaps.
    pub step: Step,
    /// Sequences to forget. Their blocks may be named again by this same plan.
    pub retire: Vec<SequenceId>,
    /// Sequences that start.
    pub admit: Vec<Admission>,
    /// What to compute.
    pub slices: Vec<Slice>,
}

/// A sequence that starts on every rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Admission {
    /// Its id.
    pub sequence: SequenceId,
    /// Prompt, followed by output tokens sampled before (after preemption or a fault).
    pub tokens: Vec<TokenId>,
    /// How many of `tokens` are the prompt.
    pub prompt_tokens: usize,
    /// How its tokens are chosen.
    pub sampling: SamplingSettings,
    /// Tokens that end it, for `min_tokens`.
    pub stop_tokens: Vec<TokenId>,
    /// W3C trace context, empty if the request has none.
    pub traceparent: String,
}

/// Consecutive positions of one sequence, to be computed in one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The sequence.
    pub sequence: SequenceId,
    /// Position of the first token; everything before it is in the KV cache.
    pub first_position: usize,
    /// At least 1. A position past the admitted tokens takes the token sampled in an earlier step.
    pub num_tokens: usize,
    /// Blocks appended to the sequence's table of the full-attention pool.
    pub full_blocks: Vec<BlockId>,
    /// Blocks appended to the sequence's table of the sliding-window pool.
    pub sliding_blocks: Vec<BlockId>,
    /// Sample a token after the last position.
    pub sample: bool,
}

impl Plan {
    /// Tokens computed in this step.
    pub fn num_tokens(&self) -> usize {
        self.slices.iter().map(|slice| slice.num_tokens).sum()
    }

    /// Reads a message, checked against a vocabulary of `vocab_size` tokens.
    ///
    /// # Errors
    /// A fault of kind `Internal`: a coordinator never sends such a plan.
    pub fn from_message(message: &v1::Plan, vocab_size: usize) -> Result<Self, Fault> {
        let admit = message.admit.iter().map(|admit| Admission::from_message(admit, vocab_size));
        Ok(Self {
            epoch: Epoch(message.epoch),
            step: Step(message.step),
            retire: message.retire.iter().copied().map(SequenceId).collect(),
            admit: admit.collect::<Result<_, _>>()?,
            slices: message.slices.iter().map(Slice::from_message).collect::<Result<_, _>>()?,
        })
    }

    /// Digest of the plan; equal on the coordinator and on every rank.
    pub fn digest(&self) -> u64 {
        message_digest(&v1::Plan::from(self))
    }
}

/// Digest of a plan's message.
pub fn message_digest(message: &v1::Plan) -> u64 {
    xxh3_64(&message.encode_to_vec())
}

/// Digest of the tokens sampled in one step, in the order of the plan's sampling slices; equal on every rank.
pub fn token_digest(tokens: impl Iterator<Item = (SequenceId, TokenId)>) -> u64 {
    let bytes: Vec<u8> = tokens.flat_map(|(s, t)| [s.0.to_le_bytes(), u64::from(t.0).to_le_bytes()].concat()).collect();
    xxh3_64(&bytes)
}

fn broken(message: String) -> Fault {
    Fault::new(FaultKind::Internal, message)
}

impl Admission {
    fn from_message(message: &v1::Admit, vocab_size: usize) -> Result<Self, Fault> {
        let (sequence, prompt_tokens) = (message.sequence, message.prompt_tokens as usize);
        if prompt_tokens == 0 || prompt_tokens > message.tokens.len() {
            let found = message.tokens.len();
            return Err(broken(format!("sequence {sequence}: {prompt_tokens} prompt tokens among {found}")));
        }
        if let Some(token) = message.tokens.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(broken(format!(
                "sequence {sequence}: token {token} is outside the vocabulary of {vocab_size}"
            )));
        }
        let sampling = message.sampling.clone().unwrap_or_default();
        Ok(Self {
            sequence: SequenceId(sequence),
            tokens: message.tokens.iter().copied().map(TokenId).collect(),
            prompt_tokens,
            sampling: SamplingSettings::check(&sampling, vocab_size, 0)?,
            stop_tokens: message.stop_token_ids.iter().copied().map(TokenId).collect(),
            traceparent: message.traceparent.clone(),
        })
    }
}

impl Slice {
    fn from_message(message: &v1::Slice) -> Result<Self, Fault> {
        if message.num_tokens == 0 {
            return Err(broken(format!("sequence {}: a slice of no tokens", message.sequence)));
        }
        Ok(Self {
            sequence: SequenceId(message.sequence),
            first_position: message.first_position as usize,
            num_tokens: message.num_tokens as usize,
            full_blocks: message.full_blocks.iter().copied().map(BlockId).collect(),
            sliding_blocks: message.sliding_blocks.iter().copied().map(BlockId).collect(),
            sample: message.sample,
        })
    }
}

impl From<&Plan> for v1::Plan {
    fn from(plan: &Plan) -> Self {
        Self {
            epoch: plan.epoch.0,
            step: plan.step.0,
            retire: plan.retire.iter().map(|id| id.0).collect(),
            admit: plan.admit.iter().map(v1::Admit::from).collect(),
            slices: plan.slices.iter().map(v1::Slice::from).collect(),
        }
    }
}

impl From<&Admission> for v1::Admit {
    fn from(admission: &Admission) -> Self {
        Self {
            sequence: admission.sequence.0,
            tokens: admission.tokens.iter().map(|token| token.0).collect(),
            prompt_tokens: admission.prompt_tokens as u32,
            sampling: Some((&admission.sampling).into()),
            stop_token_ids: admission.stop_tokens.iter().map(|token| token.0).collect(),
            traceparent: admission.traceparent.clone(),
        }
    }
}

impl From<&Slice> for v1::Slice {
    fn from(slice: &Slice) -> Self {
        Self {
            sequence: slice.sequence.0,
            first_position: slice.first_position as u32,
            num_tokens: slice.num_tokens as u32,
            full_blocks: slice.full_blocks.iter().map(|block| block.0).collect(),
            sliding_blocks: slice.sliding_blocks.iter().map(|block| block.0).collect(),
            sample: slice.sample,
        }
    }
}
