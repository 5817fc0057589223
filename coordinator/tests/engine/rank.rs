//! A rank without tensors: it keeps, for each slot of each KV block, which prefix the keys there belong to, and checks
//! that every key a query may see is in the block that the table names.

use std::collections::HashMap;

use phalanx_coordinator::engine::EngineConfig;
use phalanx_proto::{
    ids::{BlockId, SequenceId, TokenId},
    plan::{Admission, Plan, Slice},
    sampling::SamplingSettings,
    v1,
};

pub(crate) const VOCAB: u32 = 29;

/// The toy model: the hash of a prefix decides its next token, so any wrong key changes everything after it.
pub(crate) fn extend_hash(hash: u64, token: TokenId) -> u64 {
    let mixed = (hash ^ u64::from(token.0).wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^ (mixed >> 29)
}

/// The token after a prefix; stop tokens are masked until there are `min_tokens`.
pub(crate) fn next_token(hash: u64, sampling: &SamplingSettings, stop: &[TokenId], outputs: usize) -> TokenId {
    let mut token = ((hash >> 13).wrapping_add(sampling.seed) % u64::from(VOCAB)) as u32;
    while outputs < sampling.min_tokens as usize && stop.contains(&TokenId(token)) {
        token = (token + 1) % VOCAB;
    }
    TokenId(token)
}

struct RankSequence {
    admission: Admission,
    tokens: Vec<TokenId>,
    /// Hash of the prefix up to and including each position; what a key is made of.
    hashes: Vec<u64>,
    full: Vec<BlockId>,
    sliding: Vec<BlockId>,
    /// End of the last slice.
    computed: Option<usize>,
}

impl RankSequence {
    fn push(&mut self, token: TokenId) {
        let before = self.hashes.last().copied().unwrap_or(7);
        self.hashes.push(extend_hash(before, token));
        self.tokens.push(token);
    }
}

/// Keys by block and slot; `None` was never written.
type Memory = Vec<Vec<Option<u64>>>;

/// Executes plans in order and complains about anything a real rank could not survive.
pub(crate) struct FakeRank {
    config: EngineConfig,
    sequences: HashMap<SequenceId, RankSequence>,
    full: Memory,
    sliding: Memory,
    /// Step that retired the last sequence which named a block of the full or sliding pool.
    retired_full: HashMap<BlockId, u64>,
    retired_sliding: HashMap<BlockId, u64>,
    next_step: u64,
}

/// What rank 0 reports.
pub(crate) struct Outcome {
    pub(crate) step: phalanx_proto::ids::Step,
    pub(crate) sampled: Vec<v1::SampledToken>,
    pub(crate) prompts: Vec<v1::PromptLogprobs>,
}

impl FakeRank {
    pub(crate) fn new(config: &EngineConfig, full_blocks: usize, sliding_blocks: usize) -> Self {
        Self {
            config: config.clone(),
            sequences: HashMap::new(),
            full: vec![vec![None; config.block_size]; full_blocks],
            sliding: vec![vec![None; config.block_size]; sliding_blocks],
            retired_full: HashMap::new(),
            retired_sliding: HashMap::new(),
            next_step: 1,
        }
    }

    /// Sequences it knows.
    pub(crate) fn live(&self) -> usize {
        self.sequences.len()
    }

    /// Carries a plan out. `acknowledged` is the last step whose result the engine has seen.
    pub(crate) fn execute(&mut self, plan: &Plan, acknowledged: u64) -> Outcome {
        assert_eq!(plan.step.0, self.next_step, "steps come without gaps");
        self.next_step += 1;
        assert!(plan.num_tokens() <= self.config.max_num_batched_tokens, "too many tokens in a plan");
        assert!(plan.slices.len() <= self.config.max_num_seqs, "too many slices in a plan");
        for id in &plan.retire {
            let gone = self.sequences.remove(id).expect("only known sequences are retired");
            self.retired_full.extend(gone.full.iter().map(|&block| (block, plan.step.0)));
            // Positions that left the window were let go earlier, by steps of their own.
            let first = self.first_visible(gone.computed.unwrap_or(0)) / self.config.block_size;
            self.retired_sliding.extend(gone.sliding.iter().skip(first).map(|&block| (block, plan.step.0)));
        }
        for admission in &plan.admit {
            self.admit(admission);
        }
        assert!(self.sequences.len() <= self.config.max_num_seqs, "too many sequences on the rank");
        for slice in &plan.slices {
            self.append_blocks(slice);
        }
        // Nothing of an earlier step may depend on what this step writes, so the old keys must be right before.
        plan.slices.iter().for_each(|slice| self.check_keys(slice, slice.first_position));
        plan.slices.iter().for_each(|slice| self.write_keys(slice, acknowledged));
        plan.slices.iter().for_each(|slice| self.check_keys(slice, slice.first_position + slice.num_tokens));
        let prompts = plan.slices.iter().filter_map(|slice| self.prompt_logprobs(slice)).collect();
        let sampled = plan.slices.iter().filter(|slice| slice.sample).map(|slice| self.sample(slice)).collect();
        Outcome { step: plan.step, sampled, prompts }
    }

    fn first_visible(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.config.sliding_window)
    }

    fn admit(&mut self, admission: &Admission) {
        let mut sequence = RankSequence {
            admission: admission.clone(),
            tokens: Vec::new(),
            hashes: Vec::new(),
            full: Vec::new(),
            sliding: Vec::new(),
            computed: None,
        };
        assert!(admission.prompt_tokens > 0 && admission.prompt_tokens <= admission.tokens.len());
        admission.tokens.iter().for_each(|&token| sequence.push(token));
        let before = self.sequences.insert(admission.sequence, sequence);
        assert!(before.is_none(), "sequence {} is admitted twice", admission.sequence);
    }

    fn append_blocks(&mut self, slice: &Slice) {
        let sequence = self.sequences.get_mut(&slice.sequence).expect("slices name known sequences");
        sequence.full.extend(&slice.full_blocks);
        sequence.sliding.extend(&slice.sliding_blocks);
        let end = slice.first_position + slice.num_tokens;
        assert!(slice.num_tokens > 0);
        assert!(sequence.computed.is_none_or(|end| end == slice.first_position), "positions have a gap");
        assert!(end <= sequence.tokens.len(), "position {end} has no token yet");
        assert!(!slice.sample || end == sequence.tokens.len(), "a token would be sampled over a known one");
        assert!(end < self.config.max_model_len || !slice.sample, "the context is used up");
        let blocks = end.div_ceil(self.config.block_size);
        assert_eq!(sequence.full.len(), if self.config.has_full_layers { blocks } else { 0 });
        assert_eq!(sequence.sliding.len(), if self.config.has_sliding_layers { blocks } else { 0 });
        assert!(sequence.full.iter().all(|block| block.index() < self.full.len()));
        assert!(sequence.sliding.iter().all(|block| block.index() < self.sliding.len()));
        sequence.computed = Some(end);
    }

    /// Checks the keys before `end` that the slice's queries see.
    fn check_keys(&self, slice: &Slice, end: usize) {
        let (sequence, size) = (&self.sequences[&slice.sequence], self.config.block_size);
        let visible = self.first_visible(slice.first_position);
        for position in 0..end {
            let (block, slot) = (position / size, position % size);
            let expected = Some(sequence.hashes[position]);
            if self.config.has_full_layers {
                let found = self.full[sequence.full[block].index()][slot];
                assert_eq!(found, expected, "full key {position} of sequence {}", slice.sequence);
            }
            if self.config.has_sliding_layers && position >= visible {
                let found = self.sliding[sequence.sliding[block].index()][slot];
                assert_eq!(found, expected, "sliding key {position} of sequence {}", slice.sequence);
            }
        }
    }

    fn write_keys(&mut self, slice: &Slice, acknowledged: u64) {
        let (sequence, size) = (&self.sequences[&slice.sequence], self.config.block_size);
        for position in slice.first_position..slice.first_position + slice.num_tokens {
            let (block, slot, hash) = (position / size, position % size, sequence.hashes[position]);
            if self.config.has_full_layers {
                let block = sequence.full[block];
                let retired = self.retired_full.get(&block).copied().unwrap_or(0);
                assert!(
                    retired <= acknowledged,
                    "full block {block} is written before step {retired} was acknowledged"
                );
                self.full[block.index()][slot] = Some(hash);
            }
            if self.config.has_sliding_layers {
                let block = sequence.sliding[block];
                let retired = self.retired_sliding.get(&block).copied().unwrap_or(0);
                assert!(
                    retired <= acknowledged,
                    "sliding block {block} is written before step {retired} was acknowledged"
                );
                self.sliding[block.index()][slot] = Some(hash);
            }
        }
    }

    fn sample(&mut self, slice: &Slice) -> v1::SampledToken {
        let sequence = self.sequences.get_mut(&slice.sequence).expect("checked before");
        let end = slice.first_position + slice.num_tokens;
        let admission = &sequence.admission;
        let outputs = end - admission.prompt_tokens;
        let token = next_token(sequence.hashes[end - 1], &admission.sampling, &admission.stop_tokens, outputs);
        sequence.push(token);
        let token = v1::Token { id: token.0, logprob: None, top: Vec::new() };
        v1::SampledToken { sequence: slice.sequence.0, token: Some(token) }
    }

    /// The position stands in for the log-probability, so that a lost or doubled one is seen.
    fn prompt_logprobs(&self, slice: &Slice) -> Option<v1::PromptLogprobs> {
        let sequence = &self.sequences[&slice.sequence];
        sequence.admission.sampling.prompt_logprobs?;
        let end = (slice.first_position + slice.num_tokens).min(sequence.admission.prompt_tokens - 1);
        let tokens = (slice.first_position + 1..=end)
            .map(|position| v1::Token {
                id: sequence.tokens[position].0,
                logprob: Some(position as f32),
                top: Vec::new(),
            })
            .collect();
        Some(v1::PromptLogprobs { sequence: slice.sequence.0, tokens })
    }
}
