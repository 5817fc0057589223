//! Random-weight checkpoints with the release's awkward divisibilities, at world 1.

use phalanx_proto::ids::TokenId;
use phalanx_worker::{
    backend::{cpu::CpuBackend, reference::ReferenceBackend},
    model::Model,
};

use crate::{
    Candidate,
    files::{Prompt, golden, prompts},
    group::{ALONE, run},
    in_process::InProcess,
    recorder::Recorder,
    session::{Session, Slice, distance},
};

/// Tokens of a prompt that are computed at a time.
const CHUNK: usize = 512;

/// Every golden logit and greedy token of a checkpoint.
fn golden_values_hold<B: Candidate>(name: &str) {
    for (index, prompt) in prompts(name).iter().enumerate() {
        let (logits, greedy) = run(&golden(name), ALONE, |model: Model<B>, end| answer(model, end, prompt));
        let distance = distance(&logits, &prompt.logits.floats());
        println!("{name} prompt {index}: {} tokens, largest difference {distance:.2e}", prompt.ids.len());
        assert!(distance <= B::LOGIT_TOLERANCE, "{name} prompt {index}: a logit differs by {distance}");
        assert_eq!(greedy, prompt.greedy, "{name} prompt {index}");
    }
}

fn answer<B: Candidate>(model: Model<B>, end: InProcess, prompt: &Prompt) -> (Vec<f32>, Vec<TokenId>) {
    let mut session = Session::new(model, end, &[prompt.ids.len(), prompt.ids.len() + prompt.greedy.len()], CHUNK);
    let logits = session.prefill(0, &prompt.ids, CHUNK, &prompt.positions);
    let mut greedy: Vec<TokenId> = Vec::new();
    let mut last = session.prefill(1, &prompt.ids, CHUNK, &[prompt.ids.len() - 1]);
    while greedy.len() < prompt.greedy.len() {
        greedy.push(crate::session::argmax(&last));
        last = session.step(&[Slice { sequence: 1, tokens: &greedy[greedy.len() - 1..], wanted: vec![0] }]);
    }
    (logits, greedy)
}

/// Hidden states, attention outputs, router logits and the last norm of the short prompts.
fn inner_values_hold<B: Candidate>(name: &str) {
    for prompt in prompts(name).iter().filter(|prompt| !prompt.inner.is_empty()) {
        run(&golden(name), ALONE, |model: Model<Recorder<B>>, end| {
            let layers = model.geometry().num_hidden_layers();
            let mut session = Session::new(model, end, &[prompt.ids.len()], CHUNK);
            session.prefill(0, &prompt.ids, CHUNK, &prompt.positions);
            let recording = &session.backend().recording;
            for layer in 0..layers {
                let expect = |what: &str, index: usize, found: &[f32]| {
                    let distance = distance(found, &prompt.inner[what].row(index));
                    // Every backend computes in f32 before the first experts.
                    let exact = layer == 0 && index == layer;
                    let tolerance = if exact { ReferenceBackend::LOGIT_TOLERANCE } else { B::LOGIT_TOLERANCE };
                    assert!(distance <= tolerance, "{name} layer {layer}: {what} differs by {distance}");
                };
                expect("hidden", layer, &recording.stream[2 * layer]);
                expect("attn", layer, &recording.products[4 * layer + 3]);
                expect("router", layer, &recording.router[layer]);
                expect("hidden", layer + 1, &recording.stream[2 * layer + 2]);
            }
            let last = distance(recording.norms.last().unwrap(), &prompt.inner["final"].floats());
            assert!(last <= B::LOGIT_TOLERANCE, "{name}: the last norm differs by {last}");
        });
    }
}

#[test]
fn reference_equals_the_golden_values_of_tiny() {
    golden_values_hold::<ReferenceBackend>("tiny");
}

#[test]
fn reference_equals_the_golden_values_of_tiny_ragged() {
    golden_values_hold::<ReferenceBackend>("tiny-ragged");
}

#[test]
fn reference_equals_the_golden_values_within_each_layer() {
    inner_values_hold::<ReferenceBackend>("tiny");
    inner_values_hold::<ReferenceBackend>("tiny-ragged");
}

#[test]
fn cpu_equals_the_golden_values_of_tiny() {
    golden_values_hold::<CpuBackend>("tiny");
}

#[test]
fn cpu_equals_the_golden_values_of_tiny_ragged() {
    golden_values_hold::<CpuBackend>("tiny-ragged");
}

#[test]
fn cpu_equals_the_golden_values_within_each_layer() {
    inner_values_hold::<CpuBackend>("tiny");
    inner_values_hold::<CpuBackend>("tiny-ragged");
}
