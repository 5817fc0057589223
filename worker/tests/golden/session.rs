//! Runs prompts through a model as an executor would: chunked prefill, batched decode, paged KV cache.

use phalanx_proto::ids::{BlockId, TokenId};
use phalanx_worker::{
    backend::{Batch, BatchSequence},
    collective::Collective,
    model::Model,
};

use crate::Candidate;

/// A model with its collective and the sequences that run on it.
pub(crate) struct Session<B: Candidate, C: Collective> {
    model: Model<B>,
    collective: C,
    sequences: Vec<Sequence>,
}

struct Sequence {
    /// Tokens in the cache.
    len: usize,
    full_table: Vec<BlockId>,
    sliding_table: Vec<BlockId>,
}

/// Consecutive tokens of a sequence that go into one step.
pub(crate) struct Slice<'a> {
    pub(crate) sequence: usize,
    pub(crate) tokens: &'a [TokenId],
    /// Tokens of the slice whose logits are wanted, in order.
    pub(crate) wanted: Vec<usize>,
}

impl<B: Candidate, C: Collective> Session<B, C> {
    /// Sequences of at most the given lengths, computed at most `chunk` tokens of each at a time. Blocks lie scattered
    /// over the pools, and a sliding layer's blocks are used anew as soon as the window has passed them.
    pub(crate) fn new(mut model: Model<B>, collective: C, max_lengths: &[usize], chunk: usize) -> Self {
        let ring = (model.geometry().sliding_window + chunk).div_ceil(B::BLOCK_SIZE) + 1;
        let blocks: Vec<usize> = max_lengths.iter().map(|len| len.div_ceil(B::BLOCK_SIZE)).collect();
        let mut unused: Vec<BlockId> = (0..blocks.iter().sum::<usize>() as u32).map(BlockId).collect();
        let scatter = |i: usize| BlockId((i * max_lengths.len()) as u32);
        let sequence = |(index, &count): (usize, &usize)| Sequence {
            len: 0,
            full_table: unused.split_off(unused.len() - count).into_iter().rev().collect(),
            sliding_table: (0..count).map(|i| BlockId(scatter(i % ring).0 + index as u32)).collect(),
        };
        let sequences = blocks.iter().enumerate().map(sequence).collect();
        let spec = model.kv_cache_spec(B::BLOCK_SIZE, blocks.iter().sum(), ring * max_lengths.len());
        model.allocate_kv_cache(&spec).unwrap();
        Self { model, collective, sequences }
    }

    pub(crate) fn backend(&self) -> &B {
        self.model.backend()
    }

    /// Computes one step and answers the wanted logits of the whole vocabulary, `[wanted, vocab]`.
    pub(crate) fn step(&mut self, slices: &[Slice<'_>]) -> Vec<f32> {
        let mut batch = Batch::default();
        let mut wanted = Vec::new();
        for slice in slices {
            let sequence = &mut self.sequences[slice.sequence];
            let (start, first_position) = (batch.tokens.len(), sequence.len);
            wanted.extend(slice.wanted.iter().map(|token| start + token));
            batch.tokens.extend(slice.tokens);
            sequence.len += slice.tokens.len();
            batch.positions.extend((first_position..sequence.len).map(|position| position as u32));
            batch.sequences.push(BatchSequence {
                rows: start..batch.tokens.len(),
                first_position,
                full_table: sequence.full_table.clone(),
                sliding_table: sequence.sliding_table.clone(),
            });
        }
        let mine = self.model.forward(&batch, &wanted, &mut self.collective).unwrap();
        assert_eq!(mine.len(), wanted.len() * self.model.layout().vocab_rows.len());
        self.gather(&mine, wanted.len())
    }

    /// Puts the ranks' columns side by side.
    fn gather(&mut self, mine: &[f32], rows: usize) -> Vec<f32> {
        let bytes: Vec<u8> = mine.iter().flat_map(|value| value.to_le_bytes()).collect();
        let parts = self.collective.all_gather(&bytes).unwrap();
        let floats = |part: &Vec<u8>| part.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let parts: Vec<Vec<f32>> = parts.iter().map(floats).collect();
        let row = |row: usize| parts.iter().flat_map(move |part| &part[row * part.len() / rows..][..part.len() / rows]);
        (0..rows).flat_map(row).copied().collect()
    }

    /// Computes a prompt in chunks and answers the logits at `positions` (ascending), `[positions, vocab]`.
    pub(crate) fn prefill(
        &mut self,
        sequence: usize,
        prompt: &[TokenId],
        chunk: usize,
        positions: &[usize],
    ) -> Vec<f32> {
        let mut logits = Vec::new();
        for (tokens, start) in prompt.chunks(chunk).zip((0..).step_by(chunk)) {
            let in_chunk = positions.iter().filter(|&&p| p >= start && p < start + tokens.len());
            let wanted = in_chunk.map(|p| p - start).collect();
            logits.extend(self.step(&[Slice { sequence, tokens, wanted }]));
        }
        logits
    }

    /// Continues every prompt greedily by as many tokens as asked for, all sequences in one batch.
    pub(crate) fn greedy(&mut self, prompts: &[(Vec<TokenId>, usize)], chunk: usize) -> Vec<Vec<TokenId>> {
        let vocab = self.model.geometry().vocab_size;
        let mut outputs: Vec<Vec<TokenId>> = Vec::new();
        for (sequence, (prompt, _)) in prompts.iter().enumerate() {
            let logits = self.prefill(sequence, prompt, chunk, &[prompt.len() - 1]);
            outputs.push(vec![argmax(&logits)]);
        }
        loop {
            let goes_on = |&sequence: &usize| outputs[sequence].len() < prompts[sequence].1;
            let running: Vec<usize> = (0..prompts.len()).filter(goes_on).collect();
            if running.is_empty() {
                return outputs;
            }
            let slice = |&sequence: &usize| {
                let tokens = &outputs[sequence][outputs[sequence].len() - 1..];
                Slice { sequence, tokens, wanted: vec![0] }
            };
            let logits = self.step(&running.iter().map(slice).collect::<Vec<_>>());
            for (&sequence, logits) in running.iter().zip(logits.chunks_exact(vocab)) {
                outputs[sequence].push(argmax(logits));
            }
        }
    }
}

/// The first of the largest.
pub(crate) fn argmax(logits: &[f32]) -> TokenId {
    let largest = logits.iter().enumerate().fold(0, |best, (i, value)| if *value > logits[best] { i } else { best });
    TokenId(largest as u32)
}

/// The largest absolute difference. A NaN is the largest of all.
pub(crate) fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |most, d| if d > most || d.is_nan() { d } else { most })
}
