//! Executes the plans of one epoch, in order, on one rank.
//!
//! A step is: retire and admit, run the model over the flat batch, choose tokens, report. Step (e, s) runs only while e
//! is this executor's epoch and s is next. After a fault the executor must not be used again: the epoch is over.

mod device;
pub mod faults;

use std::collections::BTreeMap;

use phalanx_proto::{
    fault::{Fault, FaultKind},
    ids::{BlockId, Epoch, SequenceId, Step, TokenId},
    plan::{Plan, token_digest},
    v1,
};

pub use self::device::{Command, Device, Event, Run};
use crate::{
    backend::{Backend, Batch, BatchSequence, KvCacheSpec},
    collective::Collective,
    instruments::StepClock,
    model::Model,
    sampler::{SampleError, Sampled, Sampler},
    sequences::{Bounds, LogitRow, Purpose, Sequences, Work},
};

/// What a group is formed with, beside its collective.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Formation {
    /// The epoch.
    pub epoch: Epoch,
    /// Tokens a block of the KV cache.
    pub block_size: usize,
    /// Blocks of each full-attention layer.
    pub full_blocks: usize,
    /// Blocks of each sliding-window layer.
    pub sliding_blocks: usize,
    /// Most tokens in one plan.
    pub max_batch_tokens: usize,
    /// Most sequences in one plan.
    pub max_batch_sequences: usize,
    /// Tokens from here on are never chosen.
    pub sampled_vocab: usize,
}

impl Formation {
    /// Checks a coordinator's `Form`. Tokens from `sampled_vocab` on will never be chosen.
    ///
    /// # Errors
    /// A fault of kind `Internal` naming the number that cannot be: a coordinator never sends it.
    pub fn from_message(form: &v1::Form, sampled_vocab: usize) -> Result<Self, Fault> {
        let kv = form.kv.unwrap_or_default();
        let numbers = [
            ("kv.block_size", kv.block_size),
            ("max_batch_tokens", form.max_batch_tokens),
            ("max_batch_sequences", form.max_batch_sequences),
        ];
        if let Some((name, _)) = numbers.iter().find(|(_, number)| *number == 0) {
            return Err(Fault::new(FaultKind::Internal, format!("form of epoch {}: {name} is 0", form.epoch)));
        }
        Ok(Self {
            epoch: Epoch(form.epoch),
            block_size: kv.block_size as usize,
            full_blocks: kv.full_blocks as usize,
            sliding_blocks: kv.sliding_blocks as usize,
            max_batch_tokens: form.max_batch_tokens as usize,
            max_batch_sequences: form.max_batch_sequences as usize,
            sampled_vocab,
        })
    }

    /// The KV cache of `model` under this formation.
    pub fn cache<B: Backend>(&self, model: &Model<B>) -> KvCacheSpec {
        model.kv_cache_spec(self.block_size, self.full_blocks, self.sliding_blocks)
    }
}

/// One rank's part of one epoch. The weights outlive it.
pub struct Executor<'a, B: Backend> {
    model: &'a mut Model<B>,
    collective: Box<dyn Collective>,
    sequences: Sequences,
    sampler: Sampler,
    epoch: Epoch,
    next_step: Step,
    clock: StepClock,
}

impl<'a, B: Backend> Executor<'a, B> {
    /// Empties the KV cache and waits for step 1.
    ///
    /// # Errors
    /// When there is no memory for the KV cache.
    pub fn new(model: &'a mut Model<B>, collective: Box<dyn Collective>, formation: &Formation) -> Result<Self, Fault> {
        let cache = formation.cache(model);
        model.allocate_kv_cache(&cache).map_err(|error| faults::of_backend(&error))?;
        let bounds = Bounds {
            epoch: formation.epoch,
            rank: model.layout().rank,
            max_batch_tokens: formation.max_batch_tokens,
            max_batch_sequences: formation.max_batch_sequences,
        };
        let sampler = Sampler::new(model.layout().vocab_rows.clone(), formation.sampled_vocab);
        Ok(Self {
            model,
            collective,
            sequences: Sequences::new(bounds),
            sampler,
            epoch: formation.epoch,
            next_step: Step(1),
            clock: StepClock::default(),
        })
    }

    /// The model, for what can be asked of it between steps.
    pub fn model(&self) -> &Model<B> {
        self.model
    }

    /// Runs one token through the whole model on all ranks, before the first plan: the collective has proved itself and
    /// buffers are in place when the group says that it is ready. What it writes to the KV cache is never read.
    ///
    /// # Errors
    /// When the model or the collective fails.
    pub fn warm_up(&mut self) -> Result<(), Fault> {
        let sequence = BatchSequence {
            rows: 0..1,
            first_position: 0,
            full_table: vec![BlockId(0)],
            sliding_table: vec![BlockId(0)],
        };
        let batch = Batch { tokens: vec![TokenId(0)], positions: vec![0], sequences: vec![sequence] };
        let logits = self.model.forward(&batch, &[0], &mut *self.collective);
        logits.map(drop).map_err(|error| faults::of_model(&error))
    }

    /// Executes the next plan. `plan_digest` is the digest of its message, which the result repeats.
    ///
    /// # Errors
    /// When the plan is not the next one of this epoch or does not follow from those before, the model fails, or the
    /// collective is aborted. The message names epoch and step, and the sequence where there is one.
    pub fn execute(&mut self, plan: &Plan, plan_digest: u64) -> Result<v1::StepResult, Fault> {
        self.check_turn(plan)?;
        self.step(plan, plan_digest).map_err(|fault| {
            let message = format!("epoch {}, step {}: {}", plan.epoch, plan.step, fault.message);
            Fault { message, ..fault }
        })
    }

    fn check_turn(&mut self, plan: &Plan) -> Result<(), Fault> {
        let (epoch, next) = (self.epoch, self.next_step);
        if plan.epoch != epoch {
            let message = format!("plan of epoch {}, this group was formed for epoch {epoch}", plan.epoch);
            return Err(Fault::new(FaultKind::StaleEpoch, message));
        }
        if plan.step != next {
            let message = format!("epoch {epoch}: plan of step {}, expected step {next}", plan.step);
            return Err(Fault::new(FaultKind::Internal, message));
        }
        self.next_step = next.next();
        Ok(())
    }

    fn step(&mut self, plan: &Plan, plan_digest: u64) -> Result<v1::StepResult, Fault> {
        let mut timer = self.clock.start();
        let work = self.sequences.apply(plan)?;
        let (logits, collective_time) = self.forward(&work)?;
        timer.executed(collective_time);
        let answers = self.choose(&work.logit_rows, &logits)?;
        let chosen = || work.logit_rows.iter().zip(&answers).filter(|(row, _)| row.purpose == Purpose::Choose);
        for (row, answer) in chosen() {
            self.sequences.push(row.sequence, answer.token);
        }
        let mut result = v1::StepResult {
            epoch: plan.epoch.0,
            step: plan.step.0,
            plan_digest,
            token_digest: token_digest(chosen().map(|(row, answer)| (row.sequence, answer.token))),
            ..Default::default()
        };
        if self.model.layout().rank.index() == 0 {
            let sampled =
                chosen().map(|(row, answer)| v1::SampledToken { sequence: row.sequence.0, token: Some(token(answer)) });
            result.sampled = sampled.collect();
            result.prompt_logprobs = prompt_logprobs(&work.logit_rows, &answers);
        }
        result.timing = Some(self.clock.stop(&timer));
        Ok(result)
    }

    /// This rank's logits, and the time spent in sums over the group. A plan may have nothing to compute.
    fn forward(&mut self, work: &Work) -> Result<(Vec<f32>, std::time::Duration), Fault> {
        if work.batch.tokens.is_empty() {
            return Ok(Default::default());
        }
        let rows: Vec<usize> = work.logit_rows.iter().map(|row| row.row).collect();
        let logits = self.model.forward(&work.batch, &rows, &mut *self.collective);
        Ok((logits.map_err(|error| faults::of_model(&error))?, self.model.collective_time()))
    }

    fn choose(&mut self, rows: &[LogitRow], logits: &[f32]) -> Result<Vec<Sampled>, Fault> {
        let queries = self.sequences.queries(rows)?;
        self.sampler.sample(logits, &queries, &mut *self.collective).map_err(|error| {
            let of_row =
                |row: usize| rows.get(row).map_or_else(String::new, |row| format!("sequence {}: ", row.sequence));
            match &error {
                SampleError::Collective(error) => faults::of_collective(error),
                SampleError::NotFinite { row } | SampleError::NothingLeft { row } => {
                    Fault::new(FaultKind::Internal, format!("{}{error}", of_row(*row)))
                }
                SampleError::Shape { .. } | SampleError::Malformed { .. } => {
                    Fault::new(FaultKind::Internal, error.to_string())
                }
            }
        })
    }
}

fn token(answer: &Sampled) -> v1::Token {
    v1::Token {
        id: answer.token.0,
        logprob: answer.logprob,
        top: answer.top.iter().map(|&(id, logprob)| v1::TopLogprob { id: id.0, logprob }).collect(),
    }
}

/// Scores by sequence, each in the order of its positions.
fn prompt_logprobs(rows: &[LogitRow], answers: &[Sampled]) -> Vec<v1::PromptLogprobs> {
    let mut by_sequence: BTreeMap<SequenceId, Vec<v1::Token>> = BTreeMap::new();
    for (row, answer) in rows.iter().zip(answers) {
        if matches!(row.purpose, Purpose::Score { .. }) {
            by_sequence.entry(row.sequence).or_default().push(token(answer));
        }
    }
    by_sequence.into_iter().map(|(sequence, tokens)| v1::PromptLogprobs { sequence: sequence.0, tokens }).collect()
}
