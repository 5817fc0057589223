//! The bundled model's sixty golden answers, token by token.

use phalanx_proto::{ids::TokenId, layout::Parallelism};
use phalanx_worker::{
    backend::{cpu::CpuBackend, reference::ReferenceBackend},
    model::Model,
};

use crate::{
    Candidate,
    files::{golden, nano},
    group::run,
    session::Session,
};

/// Tokens of a prompt that are computed at a time.
const CHUNK: usize = 64;

pub(crate) struct Answer {
    pub(crate) id: String,
    pub(crate) prompt: Vec<TokenId>,
    pub(crate) completion: Vec<TokenId>,
    /// The smallest lead of a chosen token over the next one, and of which token of the completion.
    pub(crate) min_margin: (f64, usize),
}

pub(crate) fn answers() -> Vec<Answer> {
    let text = std::fs::read_to_string(golden("nano.jsonl")).unwrap();
    let answer = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let ids = |field: &str| {
            let ids = line[field].as_array().unwrap().iter();
            ids.map(|id| TokenId(id.as_u64().unwrap() as u32)).collect()
        };
        let id = line["id"].as_str().unwrap().to_owned();
        let min_margin = (line["min_margin"].as_f64().unwrap(), line["min_margin_at"].as_u64().unwrap() as usize);
        Answer { id, prompt: ids("prompt_ids"), completion: ids("completion_ids"), min_margin }
    };
    text.lines().map(answer).collect()
}

/// All answers in one batch.
fn answers_are_golden_for<B: Candidate>(worlds: &[usize]) {
    let answers = answers();
    assert_eq!(answers.len(), 60);
    let asked: Vec<_> = answers.iter().map(|answer| (answer.prompt.clone(), answer.completion.len())).collect();
    let lengths: Vec<_> = asked.iter().map(|(prompt, more)| prompt.len() + more).collect();
    for &world in worlds {
        let outputs = run(&nano(), (world, Parallelism::Tensor), |model: Model<B>, end| {
            Session::new(model, end, &lengths, CHUNK).greedy(&asked, CHUNK)
        });
        for (output, answer) in outputs.iter().zip(&answers) {
            assert_eq!(*output, answer.completion, "{} at world {world}", answer.id);
        }
    }
}

#[test]
fn reference_gives_nanos_golden_answers() {
    answers_are_golden_for::<ReferenceBackend>(&[1]);
}

#[test]
fn cpu_gives_nanos_golden_answers_at_worlds_1_2_and_4() {
    answers_are_golden_for::<CpuBackend>(&[1, 2, 4]);
}
