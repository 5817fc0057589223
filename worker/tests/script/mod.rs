//! The bundled model's golden conversations, and a log of plans that serves several of them at once.
//!
//! Plans name positions only, so the whole log can be written before a single token is known: this is what lets a
//! coordinator plan ahead.

use std::path::{Path, PathBuf};

use phalanx_proto::v1;
use serde::Deserialize;

/// Tokens a block.
pub(crate) const BLOCK_SIZE: usize = 16;
/// Blocks of each pool: no conversation here is longer than 512 tokens.
pub(crate) const BLOCKS: usize = CONVERSATIONS * 32;
/// Conversations that the log serves.
pub(crate) const CONVERSATIONS: usize = 6;
/// Prompt tokens that one step computes of one sequence.
const CHUNK: usize = 37;

/// One golden conversation.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Conversation {
    pub(crate) prompt_ids: Vec<u32>,
    pub(crate) completion_ids: Vec<u32>,
}

/// The bundled model.
pub(crate) fn model_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/models/nano")
}

/// The first golden conversations, in the order of the file.
pub(crate) fn conversations() -> Vec<Conversation> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/golden/nano.jsonl");
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().take(CONVERSATIONS).map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The settings that give the golden completions.
pub(crate) fn greedy() -> v1::Sampling {
    v1::Sampling { temperature: Some(0.0), ..Default::default() }
}

/// Plans of `epoch` that compute every conversation: one starts every third step, prompts go in chunks, a step later
/// than its last token each is retired.
pub(crate) fn log(epoch: u64, conversations: &[Conversation], sampling: &v1::Sampling) -> Vec<v1::Plan> {
    let mut plans = Vec::new();
    let mut next: Vec<usize> = vec![0; conversations.len()];
    while plans.is_empty() || !done(plans.last().unwrap()) {
        let step = plans.len() as u64 + 1;
        let mut plan = v1::Plan { epoch, step, ..Default::default() };
        for (index, conversation) in conversations.iter().enumerate().filter(|(index, _)| step > 3 * *index as u64) {
            let prompt = conversation.prompt_ids.len();
            // The last token of a completion is sampled and never computed.
            let end = prompt + conversation.completion_ids.len() - 1;
            let sequence = 100 + index as u64;
            if next[index] == 0 {
                plan.admit.push(v1::Admit {
                    sequence,
                    tokens: conversation.prompt_ids.clone(),
                    prompt_tokens: prompt as u32,
                    sampling: Some(sampling.clone()),
                    ..Default::default()
                });
            }
            if next[index] == end {
                plan.retire.push(sequence);
                next[index] += 1;
            }
            if next[index] < end {
                let count = if next[index] < prompt { CHUNK.min(prompt - next[index]) } else { 1 };
                plan.slices.push(slice(index, next[index], count, next[index] + count >= prompt));
                next[index] += count;
            }
        }
        plans.push(plan);
    }
    plans
}

/// The last plan only retires.
fn done(plan: &v1::Plan) -> bool {
    plan.slices.is_empty() && !plan.retire.is_empty()
}

/// Each conversation has its own range of blocks; the sliding pool is used backwards, so that the pools differ.
fn slice(index: usize, first: usize, count: usize, sample: bool) -> v1::Slice {
    let new = first.div_ceil(BLOCK_SIZE)..(first + count).div_ceil(BLOCK_SIZE);
    let block = |i: usize| (index * 32 + i) as u32;
    v1::Slice {
        sequence: 100 + index as u64,
        first_position: first as u32,
        num_tokens: count as u32,
        full_blocks: new.clone().map(block).collect(),
        sliding_blocks: new.map(|i| BLOCKS as u32 - 1 - block(i)).collect(),
        sample,
    }
}

/// The tokens of each conversation that rank 0's results carry.
pub(crate) fn completions(results: &[v1::StepResult]) -> Vec<Vec<u32>> {
    let mut completions = vec![Vec::new(); CONVERSATIONS];
    for sampled in results.iter().flat_map(|result| &result.sampled) {
        completions[sampled.sequence as usize - 100].push(sampled.token.as_ref().unwrap().id);
    }
    completions
}
