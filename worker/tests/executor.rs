//! The executor over the bundled model: plans in, results out.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod in_process;
mod script;

use phalanx_proto::{
    checkpoint::Checkpoint,
    fault::{Fault, FaultKind},
    ids::{Epoch, Rank},
    layout::{Layout, Parallelism},
    plan::{Plan, message_digest},
    v1,
};
use phalanx_worker::{
    backend::{Arithmetic, Backend, cpu::CpuBackend, reference::ReferenceBackend},
    collective::{AbortHandle, Alone, Collective, CollectiveError},
    executor::{Executor, Formation},
    model::Model,
};

use self::script::{BLOCK_SIZE, BLOCKS, completions, conversations, greedy, log, model_dir};

fn load<B: Backend>(rank: usize, world_size: usize, backend: impl Fn(Arithmetic) -> B) -> Model<B> {
    let checkpoint = Checkpoint::open(&model_dir()).unwrap();
    let layout = Layout::new(&checkpoint.geometry, world_size, Parallelism::Tensor).unwrap();
    let layout = layout.rank(&checkpoint.geometry, Rank(rank as u32));
    let backend = backend(Arithmetic::new(checkpoint.geometry.clone()));
    Model::load(&checkpoint, layout, backend, &|_| {}).unwrap()
}

fn reference(arithmetic: Arithmetic) -> ReferenceBackend {
    ReferenceBackend::new(arithmetic)
}

fn cpu(arithmetic: Arithmetic) -> CpuBackend {
    CpuBackend::new(arithmetic, 1).unwrap()
}

fn formation(epoch: u64) -> Formation {
    Formation {
        epoch: Epoch(epoch),
        block_size: BLOCK_SIZE,
        full_blocks: BLOCKS,
        sliding_blocks: BLOCKS,
        max_batch_tokens: 256,
        max_batch_sequences: 8,
        sampled_vocab: 3072,
    }
}

fn execute<B: Backend>(executor: &mut Executor<'_, B>, message: &v1::Plan) -> Result<v1::StepResult, Fault> {
    executor.execute(&Plan::from_message(message, 3072)?, message_digest(message))
}

/// Every rank's results of the whole log.
fn run<B: Backend>(
    world_size: usize,
    plans: &[v1::Plan],
    backend: impl Fn(Arithmetic) -> B + Sync,
) -> Vec<Vec<v1::StepResult>> {
    in_process::on_every_rank(world_size, |end| {
        let mut model = load(end.rank(), world_size, &backend);
        let mut executor = Executor::new(&mut model, Box::new(end), &formation(plans[0].epoch)).unwrap();
        executor.warm_up().unwrap();
        plans.iter().map(|plan| execute(&mut executor, plan).unwrap()).collect()
    })
}

fn assert_golden(world_size: usize, ranks: &[Vec<v1::StepResult>], plans: &[v1::Plan]) {
    let golden: Vec<Vec<u32>> = conversations().into_iter().map(|c| c.completion_ids).collect();
    assert_eq!(completions(&ranks[0]), golden, "world {world_size}");
    for rank in &ranks[1..] {
        assert_eq!(rank.len(), plans.len());
        for (theirs, first) in rank.iter().zip(&ranks[0]) {
            let digests = |result: &v1::StepResult| (result.step, result.plan_digest, result.token_digest);
            assert_eq!(digests(theirs), digests(first));
            assert!(theirs.sampled.is_empty(), "only rank 0 reports tokens");
        }
    }
    let digests: Vec<u64> = plans.iter().map(message_digest).collect();
    assert_eq!(ranks[0].iter().map(|result| result.plan_digest).collect::<Vec<_>>(), digests);
}

#[test]
fn conversations_that_share_steps_get_their_golden_completions_in_every_world() {
    let plans = log(1, &conversations(), &greedy());
    for world_size in [1, 2, 4] {
        assert_golden(world_size, &run(world_size, &plans, cpu), &plans);
    }
    assert_golden(2, &run(2, &plans, reference), &plans);
}

#[test]
fn weights_outlive_an_epoch_and_a_replay_goes_on_where_it_ended() {
    let all = conversations();
    let golden = &all[0];
    let plans = log(7, &all[..1], &greedy());
    let mut model = load(0, 1, reference);
    let executed = plans.len() / 2;
    let mut executor = Executor::new(&mut model, Box::new(Alone), &formation(7)).unwrap();
    let results: Vec<_> = plans[..executed].iter().map(|plan| execute(&mut executor, plan).unwrap()).collect();
    let emitted = completions(&results)[0].clone();
    assert!(!emitted.is_empty() && golden.completion_ids.starts_with(&emitted));

    // The next epoch admits prompt and emitted tokens; the continuation is the undisturbed one.
    let resumed = script::Conversation {
        prompt_ids: [&golden.prompt_ids[..], &emitted].concat(),
        completion_ids: golden.completion_ids[emitted.len()..].to_vec(),
    };
    let mut plans = log(8, &[resumed], &greedy());
    plans[0].admit[0].prompt_tokens = golden.prompt_ids.len() as u32;
    let mut executor = Executor::new(&mut model, Box::new(Alone), &formation(8)).unwrap();
    let results: Vec<_> = plans.iter().map(|plan| execute(&mut executor, plan).unwrap()).collect();
    assert_eq!([emitted, completions(&results)[0].clone()].concat(), golden.completion_ids);
}

#[test]
fn log_probabilities_of_a_prompt_do_not_depend_on_how_it_was_cut() {
    let conversation = &conversations()[0];
    let sampling = v1::Sampling { prompt_logprobs: Some(2), logprobs: Some(3), ..greedy() };
    let collect = |plans: &[v1::Plan]| {
        let results = run(1, plans, reference).remove(0);
        let prompt = results.iter().flat_map(|result| result.prompt_logprobs.clone()).flat_map(|of| of.tokens);
        (prompt.collect::<Vec<_>>(), results.into_iter().flat_map(|result| result.sampled).next().unwrap())
    };
    let chunked = log(1, std::slice::from_ref(conversation), &sampling);
    let mut whole = chunked[0].clone();
    let prompt = conversation.prompt_ids.len();
    let blocks: Vec<u32> = (0..prompt.div_ceil(BLOCK_SIZE) as u32).collect();
    whole.slices[0] = v1::Slice {
        num_tokens: prompt as u32,
        full_blocks: blocks.clone(),
        sliding_blocks: blocks,
        sample: true,
        ..whole.slices[0].clone()
    };
    let ((chunked, first), (whole, whole_first)) = (collect(&chunked), collect(&[whole]));
    let ids = |tokens: &[v1::Token]| tokens.iter().map(|token| token.id).collect::<Vec<_>>();
    assert_eq!(ids(&chunked), conversation.prompt_ids[1..]);
    assert_eq!(ids(&whole), conversation.prompt_ids[1..]);
    for (a, b) in chunked.iter().zip(&whole) {
        // The reference backend sums in an order that depends on the chunk.
        assert!((a.logprob.unwrap() - b.logprob.unwrap()).abs() < 1e-4 && a.top.len() == 2);
        assert!(a.logprob.unwrap() <= a.top[0].logprob && a.top[0].logprob <= 0.0);
    }
    let (a, b) = (first.token.unwrap(), whole_first.token.unwrap());
    assert_eq!((a.id, a.top[0].id, a.top.len()), (b.id, a.id, 3));
}

fn assert_fault(fault: &Fault, kind: FaultKind, part: &str) {
    assert!(fault.kind == kind && fault.message.contains(part), "{:?}: {fault} lacks {part:?}", fault.kind);
}

#[test]
fn plans_out_of_turn_are_refused() {
    let plans = log(5, &conversations()[..1], &greedy());
    let mut model = load(0, 1, reference);
    let mut executor = Executor::new(&mut model, Box::new(Alone), &formation(5)).unwrap();
    let stale = v1::Plan { epoch: 4, ..plans[0].clone() };
    assert_fault(&execute(&mut executor, &stale).unwrap_err(), FaultKind::StaleEpoch, "plan of epoch 4");
    assert_fault(&execute(&mut executor, &plans[1]).unwrap_err(), FaultKind::Internal, "step 2, expected step 1");
    execute(&mut executor, &plans[0]).unwrap();
    assert_fault(&execute(&mut executor, &plans[0]).unwrap_err(), FaultKind::Internal, "step 1, expected step 2");
}

#[test]
fn plans_without_the_blocks_they_need_are_refused() {
    let cases = [
        ("FullAttention", v1::Slice { full_blocks: vec![0], ..Default::default() }),
        ("SlidingAttention", v1::Slice { sliding_blocks: vec![0, 1, BLOCKS as u32], ..Default::default() }),
    ];
    let mut model = load(0, 1, reference);
    for (part, blocks) in cases {
        let mut plan = log(1, &conversations()[..1], &greedy()).remove(0);
        let slice = &mut plan.slices[0];
        if !blocks.full_blocks.is_empty() {
            slice.full_blocks = blocks.full_blocks;
        }
        if !blocks.sliding_blocks.is_empty() {
            slice.sliding_blocks = blocks.sliding_blocks;
        }
        let mut executor = Executor::new(&mut model, Box::new(Alone), &formation(1)).unwrap();
        let fault = execute(&mut executor, &plan).unwrap_err();
        assert_fault(&fault, FaultKind::Internal, part);
        assert_fault(&fault, FaultKind::Internal, "epoch 1, step 1: broken plan");
    }
}

#[test]
fn an_aborted_collective_ends_the_step_of_every_rank() {
    let plans = log(1, &conversations()[..1], &greedy());
    let mut ends = in_process::group(2);
    let (abort, silent) = (ends[0].abort_handle(), ends.pop());
    let mut model = load(0, 2, reference);
    let mut executor = Executor::new(&mut model, Box::new(ends.remove(0)), &formation(1)).unwrap();
    let fault = std::thread::scope(|scope| {
        let step = scope.spawn(|| execute(&mut executor, &plans[0]).unwrap_err());
        abort.abort();
        step.join().unwrap()
    });
    assert_fault(&fault, FaultKind::CollectiveAborted, "epoch 1, step 1");
    drop(silent);
}

/// A group of one that was aborted.
struct AbortedAlone;

impl Collective for AbortedAlone {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_reduce_sum(&mut self, _values: &mut [f32]) -> Result<(), CollectiveError> {
        panic!("a group of one has nothing to sum");
    }

    fn all_gather(&mut self, _mine: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        panic!("the abort was noticed only when a token was chosen");
    }

    fn check_abort(&self) -> Result<(), CollectiveError> {
        Err(CollectiveError::Aborted { epoch: 1 })
    }

    fn abort_handle(&self) -> AbortHandle {
        AbortHandle::new(|| {})
    }
}

#[test]
fn a_group_of_one_notices_an_abort_between_its_layers() {
    let mut model = load(0, 1, reference);
    let mut executor = Executor::new(&mut model, Box::new(AbortedAlone), &formation(1)).unwrap();
    let plans = log(1, &conversations()[..1], &greedy());
    let fault = execute(&mut executor, &plans[0]).unwrap_err();
    assert_fault(&fault, FaultKind::CollectiveAborted, "epoch 1, step 1");
}

#[test]
fn a_plan_with_nothing_to_compute_is_acknowledged() {
    let mut model = load(0, 1, reference);
    let mut executor = Executor::new(&mut model, Box::new(Alone), &formation(1)).unwrap();
    let empty = v1::Plan { epoch: 1, step: 1, ..Default::default() };
    let result = execute(&mut executor, &empty).unwrap();
    assert_eq!((result.epoch, result.step, result.plan_digest), (1, 1, message_digest(&empty)));
    assert!(result.sampled.is_empty() && result.timing.is_some());
}

#[test]
fn a_form_without_block_size_is_refused() {
    let form = v1::Form { epoch: 1, max_batch_tokens: 1, max_batch_sequences: 1, ..Default::default() };
    assert_fault(&Formation::from_message(&form, 10).unwrap_err(), FaultKind::Internal, "kv.block_size is 0");
}
