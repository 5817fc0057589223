//! What a coordinator sends: every message is refused, or leads to a batch and to tokens; never a panic.
//!
//! An input is a `Form` and then plans, each with its length before it. The tokens are chosen from made-up logits, so
//! that sampling settings are tried as well.

#![no_main]

use libfuzzer_sys::fuzz_target;
use phalanx_proto::{
    ids::Rank,
    plan::{Plan, message_digest},
    v1,
};
use phalanx_worker::{
    collective::Alone,
    executor::Formation,
    sampler::Sampler,
    sequences::{Bounds, Purpose, Sequences, Work},
};
use prost::Message;

const VOCAB: usize = 64;
/// The last rows are no tokens.
const SAMPLED_VOCAB: usize = 60;
const MAX_INPUT: usize = 8 << 10;
/// More rows of logits in one step are not sampled from, which would only take long.
const MAX_ROWS: usize = 256;

fuzz_target!(|data: &[u8]| {
    if data.len() > MAX_INPUT {
        return;
    }
    let mut rest = data;
    let Ok(form) = v1::Form::decode_length_delimited(&mut rest) else { return };
    let Ok(formation) = Formation::from_message(&form, SAMPLED_VOCAB) else { return };
    let mut sequences = Sequences::new(Bounds {
        epoch: formation.epoch,
        rank: Rank(0),
        max_batch_tokens: formation.max_batch_tokens,
        max_batch_sequences: formation.max_batch_sequences,
    });
    let sampler = Sampler::new(0..VOCAB, SAMPLED_VOCAB);
    while let Ok(message) = v1::Plan::decode_length_delimited(&mut rest) {
        let Ok(plan) = Plan::from_message(&message, VOCAB) else { return };
        let again = v1::Plan::from(&plan);
        assert_eq!(Plan::from_message(&again, VOCAB).as_ref(), Ok(&plan), "a plan does not survive its message");
        assert_eq!(plan.digest(), message_digest(&again));
        let Ok(work) = sequences.apply(&plan) else { return };
        check_work(&work, &plan, &formation);
        if work.logit_rows.len() <= MAX_ROWS && !choose(&mut sequences, &sampler, &work, plan.step.0) {
            return;
        }
    }
});

/// A batch's parts describe the same rows, and none is over what the group was formed for.
fn check_work(work: &Work, plan: &Plan, formation: &Formation) {
    let rows = work.batch.tokens.len();
    assert_eq!(rows, work.batch.positions.len());
    assert_eq!(rows, plan.num_tokens());
    assert!(rows <= formation.max_batch_tokens && work.batch.sequences.len() <= formation.max_batch_sequences);
    let covered = work.batch.sequences.iter().fold(0, |next, sequence| {
        assert_eq!(sequence.rows.start, next);
        sequence.rows.end
    });
    assert_eq!(covered, rows);
    assert!(work.logit_rows.iter().all(|row| row.row < rows));
}

/// Chooses a token for each row that asks for one; `false` when a step would have failed.
fn choose(sequences: &mut Sequences, sampler: &Sampler, work: &Work, step: u64) -> bool {
    let Ok(queries) = sequences.queries(&work.logit_rows) else { return false };
    let logit = |at: u64| ((at ^ step).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as f32 / 1e6 - 8.0;
    let logits: Vec<f32> = (0..(queries.len() * VOCAB) as u64).map(logit).collect();
    let Ok(answers) = sampler.sample(&logits, &queries, &mut Alone) else { return false };
    assert_eq!(answers.len(), work.logit_rows.len());
    for (row, answer) in work.logit_rows.iter().zip(&answers) {
        if row.purpose == Purpose::Choose {
            assert!((answer.token.0 as usize) < SAMPLED_VOCAB, "a token was chosen that is none");
            sequences.push(row.sequence, answer.token);
        }
    }
    true
}
