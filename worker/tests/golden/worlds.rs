//! How a model is divided and how its work is cut into steps changes no greedy token; the latter changes no bit.

use phalanx_proto::{
    checkpoint::Checkpoint,
    ids::TokenId,
    layout::{Layout, LayoutError, Parallelism},
};
use phalanx_worker::{
    backend::{cpu::CpuBackend, reference::ReferenceBackend},
    model::Model,
};

use crate::{
    Candidate,
    files::{golden, prompts},
    group::{ALONE, Division, run},
    session::{Session, Slice, distance},
};

/// Tokens of a prompt that are computed at a time. No divisor of any prompt, block or window.
const CHUNK: usize = 101;

/// Every prompt of at most `longest` tokens, continued greedily in one batch, at each division.
fn golden_tokens_are_the_same_for<B: Candidate>(name: &str, divisions: &[Division], longest: usize) {
    let golden_prompts: Vec<_> = prompts(name).into_iter().filter(|prompt| prompt.ids.len() <= longest).collect();
    let asked: Vec<_> = golden_prompts.iter().map(|prompt| (prompt.ids.clone(), prompt.greedy.len())).collect();
    let lengths: Vec<_> = asked.iter().map(|(prompt, more)| prompt.len() + more).collect();
    for &division in divisions {
        let outputs = run(&golden(name), division, |model: Model<B>, end| {
            Session::new(model, end, &lengths, CHUNK).greedy(&asked, CHUNK)
        });
        for (index, (output, prompt)) in outputs.iter().zip(&golden_prompts).enumerate() {
            assert_eq!(*output, prompt.greedy, "{name} prompt {index} at {division:?}");
        }
    }
}

/// Logits of a whole prompt computed at once equal, bit for bit, those of the prompt in chunks, and those of the prompt
/// with another sequence in the same batch.
fn cutting_changes_no_bit<B: Candidate>(name: &str) {
    let prompts = prompts(name);
    let (prompt, other) = (&prompts[3].ids, &prompts[2].ids);
    let last: Vec<usize> = (prompt.len() - 40..prompt.len()).collect();
    let whole = run(&golden(name), ALONE, |model: Model<B>, end| {
        Session::new(model, end, &[prompt.len()], prompt.len()).prefill(0, prompt, prompt.len(), &last)
    });
    for chunk in [1, 16, 37, 129] {
        let chunked = run(&golden(name), ALONE, |model: Model<B>, end| {
            Session::new(model, end, &[prompt.len()], chunk).prefill(0, prompt, chunk, &last)
        });
        assert!(chunked == whole, "{name}: chunks of {chunk} differ by {:e}", distance(&chunked, &whole));
    }
    let together = run(&golden(name), ALONE, |model: Model<B>, end| {
        let mut session = Session::new(model, end, &[other.len(), prompt.len()], prompt.len());
        let slice = |sequence, tokens, wanted| Slice { sequence, tokens, wanted };
        session.step(&[slice(0, &other[..], vec![]), slice(1, &prompt[..], last.clone())])
    });
    assert!(together == whole, "{name}: in company, logits differ by {:e}", distance(&together, &whole));
}

/// A step that wants no logits leaves the same cache behind as one that does.
#[test]
fn a_step_without_logits_computes_the_cache_all_the_same() {
    let prompt: Vec<TokenId> = (0..20).map(|i| TokenId(i * 31)).collect();
    let logits = |wanted: &[usize]| {
        run(&golden("tiny-ragged"), ALONE, |model: Model<ReferenceBackend>, end| {
            let mut session = Session::new(model, end, &[32], 32);
            session.step(&[Slice { sequence: 0, tokens: &prompt[..19], wanted: wanted.to_vec() }]);
            session.step(&[Slice { sequence: 0, tokens: &prompt[19..], wanted: vec![0] }])
        })
    };
    assert_eq!(logits(&[]), logits(&[0, 18]));
}

#[test]
fn six_query_heads_refuse_four_ranks_and_name_the_sizes_that_fit() {
    let geometry = Checkpoint::open(&golden("tiny-ragged")).unwrap().geometry;
    let refused = Layout::new(&geometry, 4, Parallelism::Tensor).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "world size 4 does not fit: 6 query heads do not divide by 4; sizes that fit: [1, 2]"
    );
    assert!(matches!(refused, LayoutError::WorldSize { world_size: 4, .. }));
}

fn tensor(world: usize) -> Division {
    (world, Parallelism::Tensor)
}

fn expert(world: usize) -> Division {
    (world, Parallelism::Expert)
}

#[test]
fn reference_gives_the_golden_tokens_at_every_world_size_and_layout() {
    golden_tokens_are_the_same_for::<ReferenceBackend>("tiny", &[tensor(2), tensor(4), expert(4)], 300);
    golden_tokens_are_the_same_for::<ReferenceBackend>("tiny-ragged", &[tensor(2), expert(2)], 300);
}

#[test]
fn cpu_gives_the_golden_tokens_at_every_world_size_and_layout() {
    let divisions = [tensor(1), tensor(2), tensor(4), expert(2), expert(4)];
    golden_tokens_are_the_same_for::<CpuBackend>("tiny", &divisions, usize::MAX);
    golden_tokens_are_the_same_for::<CpuBackend>("tiny-ragged", &[tensor(2), expert(1), expert(2)], usize::MAX);
}

#[test]
fn reference_computes_the_same_bits_however_prompts_are_cut_and_batched() {
    cutting_changes_no_bit::<ReferenceBackend>("tiny");
    cutting_changes_no_bit::<ReferenceBackend>("tiny-ragged");
}

#[test]
fn cpu_computes_the_same_bits_however_prompts_are_cut_and_batched() {
    cutting_changes_no_bit::<CpuBackend>("tiny");
    cutting_changes_no_bit::<CpuBackend>("tiny-ragged");
}
