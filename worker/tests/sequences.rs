//! The table of live sequences: what a plan turns into, and which plans are refused.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::sync::{Arc, Mutex};

use phalanx_proto::{
    fault::{Fault, FaultKind},
    ids::{BlockId, Epoch, Rank, SequenceId, Step, TokenId},
    plan::{Admission, Plan, Slice},
    sampling::SamplingSettings,
    v1,
};
use phalanx_worker::{
    sampler::Query,
    sequences::{Bounds, LogitRow, Purpose, Sequences, Work},
};
use tracing::{
    Event, Metadata, Subscriber,
    span::{Attributes, Id, Record},
};

fn table() -> Sequences {
    Sequences::new(Bounds { epoch: Epoch(1), rank: Rank(0), max_batch_tokens: 16, max_batch_sequences: 3 })
}

fn admission(sequence: u64, tokens: &[u32], prompt_tokens: usize, sampling: &v1::Sampling) -> Admission {
    Admission {
        sequence: SequenceId(sequence),
        tokens: tokens.iter().copied().map(TokenId).collect(),
        prompt_tokens,
        sampling: SamplingSettings::check(sampling, 1000, 0).unwrap(),
        stop_tokens: vec![TokenId(7), TokenId(9)],
        traceparent: String::new(),
    }
}

fn slice(sequence: u64, first_position: usize, num_tokens: usize, sample: bool) -> Slice {
    Slice {
        sequence: SequenceId(sequence),
        first_position,
        num_tokens,
        full_blocks: vec![BlockId(first_position as u32)],
        sliding_blocks: vec![BlockId(100 + first_position as u32)],
        sample,
    }
}

fn plan(step: u64, admit: Vec<Admission>, slices: Vec<Slice>) -> Plan {
    Plan { epoch: Epoch(1), step: Step(step), retire: Vec::new(), admit, slices }
}

fn tokens(work: &Work) -> Vec<u32> {
    work.batch.tokens.iter().map(|token| token.0).collect()
}

fn assert_broken(result: Result<Work, Fault>, part: &str) {
    let fault = result.expect_err(part);
    assert!(fault.kind == FaultKind::Internal && fault.message.contains(part), "{fault} lacks {part:?}");
}

#[test]
fn a_chunked_prompt_and_a_decode_share_one_flat_batch() {
    let mut table = table();
    let neutral = v1::Sampling::default();
    let admit = vec![admission(1, &[10, 11, 12, 13, 14], 5, &neutral), admission(2, &[20, 21], 2, &neutral)];
    let work = table.apply(&plan(1, admit, vec![slice(1, 0, 3, false), slice(2, 0, 2, true)])).unwrap();
    assert_eq!(tokens(&work), [10, 11, 12, 20, 21]);
    assert_eq!(work.batch.positions, [0, 1, 2, 0, 1]);
    let rows: Vec<_> = work.batch.sequences.iter().map(|s| (s.rows.clone(), s.first_position)).collect();
    assert_eq!(rows, [(0..3, 0), (3..5, 0)]);
    assert_eq!(work.logit_rows, [LogitRow { row: 4, sequence: SequenceId(2), purpose: Purpose::Choose }]);

    // The plan for step 2 may be made before the token of step 1 is known; it is fed here.
    table.push(SequenceId(2), TokenId(99));
    let work = table.apply(&plan(2, Vec::new(), vec![slice(2, 2, 1, true), slice(1, 3, 2, true)])).unwrap();
    assert_eq!(tokens(&work), [99, 13, 14]);
    assert_eq!(work.batch.positions, [2, 3, 4]);
    assert_eq!(work.batch.sequences[0].full_table, [BlockId(0), BlockId(2)]);
    assert_eq!(work.batch.sequences[1].sliding_table, [BlockId(100), BlockId(103)]);
    assert_eq!(work.logit_rows.iter().map(|row| row.row).collect::<Vec<_>>(), [0, 2]);
}

#[test]
fn the_first_slice_may_start_behind_cached_blocks() {
    let mut table = table();
    let admit = vec![admission(1, &[10, 11, 12, 13, 14], 5, &v1::Sampling::default())];
    let work = table.apply(&plan(1, admit, vec![slice(1, 4, 1, true)])).unwrap();
    assert_eq!((tokens(&work), work.batch.sequences[0].first_position), (vec![14], 4));
}

#[test]
fn a_retired_sequence_is_gone_before_the_same_plan_admits_it_again() {
    let mut table = table();
    let admit = || vec![admission(1, &[10, 11], 2, &v1::Sampling::default())];
    table.apply(&plan(1, admit(), vec![slice(1, 0, 2, true)])).unwrap();
    table.push(SequenceId(1), TokenId(50));
    let again = Plan { retire: vec![SequenceId(1)], ..plan(2, admit(), vec![slice(1, 0, 2, true)]) };
    let work = table.apply(&again).unwrap();
    assert_eq!((tokens(&work), table.len()), (vec![10, 11], 1));
    assert_eq!(work.batch.sequences[0].full_table, [BlockId(0)]);
    table.apply(&Plan { retire: vec![SequenceId(1)], ..plan(3, Vec::new(), Vec::new()) }).unwrap();
    assert!(table.is_empty());
}

#[test]
fn prompt_log_probabilities_score_the_prompt_s_tokens_and_stop_at_its_end() {
    let mut table = table();
    let sampling = v1::Sampling { prompt_logprobs: Some(3), ..Default::default() };
    // Three prompt tokens and two that were sampled before a fault.
    let admit = vec![admission(1, &[10, 11, 12, 13, 14], 3, &sampling)];
    let work = table.apply(&plan(1, admit, vec![slice(1, 0, 5, true)])).unwrap();
    let score = |row, token| LogitRow {
        row,
        sequence: SequenceId(1),
        purpose: Purpose::Score { token: TokenId(token), alternatives: 3 },
    };
    let choose = LogitRow { row: 4, sequence: SequenceId(1), purpose: Purpose::Choose };
    assert_eq!(work.logit_rows, [score(0, 11), score(1, 12), choose]);
}

#[test]
fn stop_tokens_are_forbidden_until_min_tokens_and_the_position_goes_on() {
    let mut table = table();
    let sampling = v1::Sampling { min_tokens: 2, ..Default::default() };
    let mut work =
        table.apply(&plan(1, vec![admission(1, &[5, 6, 8], 2, &sampling)], vec![slice(1, 0, 3, true)])).unwrap();
    // One token was sampled before; so one more may not be a stop token, and the next may.
    for (step, (position, forbidden)) in [(3, 2), (4, 0), (5, 0)].into_iter().enumerate() {
        let queries = table.queries(&work.logit_rows).unwrap();
        let Query::Choose(choice) = queries[0] else { panic!("{queries:?}") };
        assert_eq!((choice.position, choice.forbidden.len()), (position, forbidden));
        table.push(SequenceId(1), TokenId(40));
        work = table.apply(&plan(step as u64 + 2, Vec::new(), vec![slice(1, position, 1, true)])).unwrap();
    }
}

/// Writes down which spans open, with their fields, and which close.
#[derive(Clone, Default)]
struct Spans(Arc<Mutex<Vec<String>>>);

impl Subscriber for Spans {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut log = self.0.lock().unwrap();
        let fields = span.values().to_string().trim().to_owned();
        log.push(format!("open {} root={} {fields}", span.metadata().name(), span.is_root()));
        Id::from_u64(log.len() as u64)
    }

    fn try_close(&self, id: Id) -> bool {
        self.0.lock().unwrap().push(format!("close {}", id.into_u64()));
        true
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &Event<'_>) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[test]
fn a_traced_sequence_is_a_span_from_admission_to_retirement_that_tells_no_token() {
    let spans = Spans::default();
    tracing::subscriber::with_default(spans.clone(), || {
        let mut table = table();
        let admit = |id| admission(id, &[777, 888], 2, &v1::Sampling::default());
        let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned();
        let admit = vec![Admission { traceparent, ..admit(1) }, admit(2)];
        table.apply(&plan(1, admit, vec![slice(1, 0, 2, true)])).unwrap();
        table.push(SequenceId(1), TokenId(999));
        let opened = "open worker.sequence root=true {rank: 0, epoch: 1, sequence: 1, prompt_tokens: 2}";
        assert_eq!(*spans.0.lock().unwrap(), [opened], "one request is traced");
        table.apply(&Plan { retire: vec![SequenceId(1)], ..plan(2, Vec::new(), Vec::new()) }).unwrap();
        assert_eq!(*spans.0.lock().unwrap(), [opened, "close 1"]);
    });
}

#[test]
fn plans_that_do_not_follow_are_refused() {
    let neutral = v1::Sampling::default();
    let admit = |id| admission(id, &[10, 11, 12], 3, &neutral);
    let started = || {
        let mut table = table();
        table.apply(&plan(1, vec![admit(1)], vec![slice(1, 0, 2, false)])).unwrap();
        table
    };
    let next = |slices| plan(2, Vec::new(), slices);
    assert_broken(started().apply(&next(vec![slice(2, 0, 1, false)])), "sequence 2: has a slice, but it is not live");
    assert_broken(started().apply(&next(vec![slice(1, 1, 1, false)])), "starts at position 1, the next one is 2");
    assert_broken(started().apply(&next(vec![slice(1, 3, 1, false)])), "starts at position 3, the next one is 2");
    assert_broken(started().apply(&next(vec![slice(1, 2, 2, true)])), "ends at position 4, only 3 tokens are known");
    assert_broken(started().apply(&next(vec![slice(1, 2, 1, true), slice(1, 3, 1, true)])), "two slices");
    assert_broken(started().apply(&plan(2, vec![admit(1)], Vec::new())), "is live already");
    assert_broken(started().apply(&Plan { retire: vec![SequenceId(3)], ..next(Vec::new()) }), "is not live");
    let early = plan(1, vec![admit(1)], vec![slice(1, 0, 2, true)]);
    assert_broken(table().apply(&early), "samples after position 2, but 3 tokens are known");
    let four = (1..=4).map(admit).collect();
    assert_broken(
        table().apply(&plan(1, four, (1..=4).map(|id| slice(id, 0, 1, false)).collect())),
        "4 tokens of 4 sequences, the group was formed for 16 of 3",
    );
}
