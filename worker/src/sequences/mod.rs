//! The table of live sequences: a plan goes in, the flat batch of its step comes out.
//!
//! The plan names positions, never tokens: a token sampled in one step is the input of the next one here, on every
//! rank, before the coordinator has seen it.

mod sequence;

use phalanx_proto::{
    fault::{Fault, FaultKind},
    ids::{Epoch, Rank, SequenceId, Step, TokenId},
    plan::{Plan, Slice},
};
use rustc_hash::FxHashMap;

use self::sequence::Sequence;
use crate::{
    backend::{Batch, BatchSequence},
    sampler::Query,
};

/// What a group was formed with, as far as it concerns plans.
#[derive(Clone, Debug)]
pub struct Bounds {
    /// The formation.
    pub epoch: Epoch,
    /// This rank.
    pub rank: Rank,
    /// Most tokens in one plan.
    pub max_batch_tokens: usize,
    /// Most sequences in one plan.
    pub max_batch_sequences: usize,
}

/// What one row of logits is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The sequence's next token is chosen from it.
    Choose,
    /// It tells how probable this token of the prompt was, and this many alternatives.
    Score {
        /// The prompt's token that follows.
        token: TokenId,
        /// Alternatives to report.
        alternatives: usize,
    },
}

/// One row of logits that a step needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogitRow {
    /// Row of the batch.
    pub row: usize,
    /// Whose it is.
    pub sequence: SequenceId,
    /// What it is for.
    pub purpose: Purpose,
}

/// What one step computes.
#[derive(Clone, Debug, Default)]
pub struct Work {
    /// The tokens.
    pub batch: Batch,
    /// Rows that get logits, in the order of the plan's slices.
    pub logit_rows: Vec<LogitRow>,
}

/// Every live sequence of one epoch.
pub struct Sequences {
    bounds: Bounds,
    live: FxHashMap<SequenceId, Sequence>,
}

/// A plan that no coordinator sends: a bug there, or ranks that went apart.
fn broken(sequence: SequenceId, problem: impl std::fmt::Display) -> Fault {
    Fault::new(FaultKind::Internal, format!("broken plan: sequence {sequence}: {problem}"))
}

impl Sequences {
    /// No sequences yet.
    pub fn new(bounds: Bounds) -> Self {
        Self { bounds, live: FxHashMap::default() }
    }

    /// Number of live sequences.
    pub fn len(&self) -> usize {
        self.live.len()
    }

    /// Whether no sequence is live.
    pub fn is_empty(&self) -> bool {
        self.live.is_empty()
    }

    /// Retires, admits and lays out the slices of a plan.
    ///
    /// # Errors
    /// A fault of kind `Internal` when the plan does not follow from the ones before; the table must not be used again.
    pub fn apply(&mut self, plan: &Plan) -> Result<Work, Fault> {
        self.check_size(plan)?;
        for &id in &plan.retire {
            self.live.remove(&id).ok_or_else(|| broken(id, "retired, but it is not live"))?;
        }
        for admission in &plan.admit {
            let id = admission.sequence;
            if self.live.insert(id, Sequence::new(admission, &self.bounds)).is_some() {
                return Err(broken(id, "admitted, but it is live already"));
            }
        }
        let mut work = Work::default();
        for slice in &plan.slices {
            self.lay_out(slice, plan.step, &mut work)?;
        }
        Ok(work)
    }

    fn check_size(&self, plan: &Plan) -> Result<(), Fault> {
        let (tokens, sequences) = (plan.num_tokens(), plan.slices.len());
        let Bounds { max_batch_tokens, max_batch_sequences, .. } = self.bounds;
        if tokens <= max_batch_tokens && sequences <= max_batch_sequences {
            return Ok(());
        }
        let problem = format!(
            "broken plan: {tokens} tokens of {sequences} sequences, \
             the group was formed for {max_batch_tokens} of {max_batch_sequences}"
        );
        Err(Fault::new(FaultKind::Internal, problem))
    }

    fn lay_out(&mut self, slice: &Slice, step: Step, work: &mut Work) -> Result<(), Fault> {
        let id = slice.sequence;
        let sequence = self.live.get_mut(&id).ok_or_else(|| broken(id, "has a slice, but it is not live"))?;
        sequence.extend(slice, step)?;
        let positions = slice.first_position..slice.first_position + slice.num_tokens;
        let batch = &mut work.batch;
        let first_row = batch.tokens.len();
        batch.tokens.extend(&sequence.tokens()[positions.clone()]);
        batch.positions.extend(positions.clone().map(|position| position as u32));
        batch.sequences.push(BatchSequence {
            rows: first_row..batch.tokens.len(),
            first_position: slice.first_position,
            full_table: sequence.full_table().to_vec(),
            sliding_table: sequence.sliding_table().to_vec(),
        });
        let row_of = |position: usize| first_row + position - slice.first_position;
        let scores = sequence.scored(positions.clone());
        work.logit_rows.extend(scores.map(|(position, purpose)| LogitRow {
            row: row_of(position),
            sequence: id,
            purpose,
        }));
        if slice.sample {
            work.logit_rows.push(LogitRow { row: row_of(positions.end - 1), sequence: id, purpose: Purpose::Choose });
        }
        Ok(())
    }

    /// What is asked of each of a step's rows of logits.
    ///
    /// # Errors
    /// A fault of kind `Internal` when a row's sequence is not live.
    pub fn queries(&self, rows: &[LogitRow]) -> Result<Vec<Query<'_>>, Fault> {
        let query = |row: &LogitRow| match row.purpose {
            Purpose::Score { token, alternatives } => Ok(Query::Score { token, alternatives }),
            Purpose::Choose => {
                let sequence = self.live.get(&row.sequence).ok_or_else(|| broken(row.sequence, "is not live"))?;
                Ok(Query::Choose(sequence.choice()))
            }
        };
        rows.iter().map(query).collect()
    }

    /// Appends a chosen token to its sequence.
    pub fn push(&mut self, sequence: SequenceId, token: TokenId) {
        if let Some(sequence) = self.live.get_mut(&sequence) {
            sequence.push(token);
        }
    }
}
