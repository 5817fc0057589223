//! Chooses tokens from logits whose vocabulary is divided over the ranks, without gathering the logits.
//!
//! Every rank offers its best candidates; what is gathered is the same everywhere, and the choice is a pure function of
//! it and of a counter-based generator. So all ranks choose the same token by themselves, and a group of any size
//! chooses the token that one rank alone would choose from the same logits.
//!
//! 1. First exchange, all rows: each rank's largest logit and its own winner. Greedy choices and plain temperature
//!    (Gumbel-max) are decided by it.
//! 2. Second exchange, rows with log-probabilities or filters: sums of weights, most probable tokens, the k best
//!    candidates, or how the weights are spread. Choices with `top_k` are decided by it.
//! 3. Third exchange, rows with `top_p` or `min_p` alone: each rank's winner inside the nucleus, and the few candidates
//!    at its edge.
//!
//! Order: logit bias, penalties, forbidden tokens, temperature, `min_p`, `top_k`, `top_p`. Log-probabilities are those
//! of the model's own logits, over the whole vocabulary.

mod candidates;
mod filter;
mod history;
mod noise;
mod shard;
mod weights;
mod wire;

use std::ops::Range;

use phalanx_proto::ids::TokenId;
use thiserror::Error;

pub use self::history::{Choice, History};
use self::{
    candidates::{Candidate, first, read_all, write_all},
    filter::{Filter, Final, Narrowed, Offer},
    shard::Shard,
    weights::{Boundary, Weighing, ln_weights},
    wire::{Reader, Writer},
};
use crate::collective::{Collective, CollectiveError};

/// Why no token was chosen.
#[derive(Debug, Error)]
pub enum SampleError {
    /// The model gave a logit that is NaN or infinite.
    #[error("a logit is not finite")]
    NotFinite {
        /// Index of the query.
        row: usize,
    },
    /// Every token is forbidden.
    #[error("no token of the vocabulary may be chosen")]
    NothingLeft {
        /// Index of the query.
        row: usize,
    },
    /// The number of logits is not that of the queries times this rank's rows.
    #[error("{found} logits for {queries} queries over {rows} rows of the vocabulary")]
    Shape {
        /// Logits given.
        found: usize,
        /// Queries given.
        queries: usize,
        /// Rows of this rank.
        rows: usize,
    },
    /// Another rank sent something else than what its part of the exchange is; a bug.
    #[error("rank {rank} sent a malformed message of {bytes} bytes while sampling")]
    Malformed {
        /// The rank.
        rank: usize,
        /// Length of its message.
        bytes: usize,
    },
    /// The ranks could not exchange candidates.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}

/// What is asked of one row of logits.
#[derive(Clone, Copy, Debug)]
pub enum Query<'a> {
    /// Choose the next token.
    Choose(Choice<'a>),
    /// Say how probable `token` was.
    Score {
        /// The token that did come next.
        token: TokenId,
        /// Number of most probable tokens to report beside it.
        alternatives: usize,
    },
}

impl Query<'_> {
    /// Number of alternatives to report, if log-probabilities are wanted.
    fn logprobs(&self) -> Option<usize> {
        match self {
            Self::Choose(choice) => choice.settings.logprobs.map(|count| count as usize),
            Self::Score { alternatives, .. } => Some(*alternatives),
        }
    }
}

/// A chosen or scored token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: TokenId,
    /// Natural logarithm of its probability, if that was asked for.
    pub logprob: Option<f32>,
    /// The most probable tokens with their log-probabilities, best first.
    pub top: Vec<(TokenId, f32)>,
}

/// One rank's sampler.
#[derive(Clone, Debug)]
pub struct Sampler {
    rows: Range<usize>,
    sampled_vocab: usize,
}

/// What the first exchange tells about one row.
#[derive(Clone, Copy)]
struct Summary {
    raw_max: f32,
    best: Candidate,
}

/// What the log-probabilities of one row follow from.
struct Report {
    /// Logarithm of the sum of exponentials.
    ln_sum: f64,
    top: Vec<Candidate>,
}

impl Sampler {
    /// A sampler for the rank that holds `rows` of the vocabulary. Tokens from `sampled_vocab` on are never chosen:
    /// matrices have more rows than the tokenizer has tokens.
    pub fn new(rows: Range<usize>, sampled_vocab: usize) -> Self {
        Self { rows, sampled_vocab }
    }

    /// Answers each query from its row of `logits`, `[queries, rows of this rank]`. All ranks give the same queries and
    /// get the same answers.
    ///
    /// # Errors
    /// When a logit is not finite, nothing may be chosen, or the group is aborted; on every rank alike.
    pub fn sample(
        &self,
        logits: &[f32],
        queries: &[Query<'_>],
        collective: &mut dyn Collective,
    ) -> Result<Vec<Sampled>, SampleError> {
        let width = self.rows.len();
        if logits.len() != queries.len() * width || width == 0 {
            return Err(SampleError::Shape { found: logits.len(), queries: queries.len(), rows: width });
        }
        if queries.is_empty() {
            return Ok(Vec::new());
        }
        let shard = |(row, query)| Shard::new(row, &self.rows, self.sampled_vocab, query);
        let shards: Vec<Shard<'_>> = logits.chunks_exact(width).zip(queries).map(shard).collect();
        let summaries = exchange_summaries(&shards, queries, collective)?;
        let mut rows = rows(queries, &summaries);
        narrow(&shards, &mut rows, collective)?;
        finish(&shards, &mut rows, collective)?;
        Ok(rows.iter().map(sampled).collect())
    }
}

fn sampled(row: &Row) -> Sampled {
    let logprob = |raw: f32, report: &Report| (f64::from(raw) - report.ln_sum) as f32;
    let report = row.report.as_ref();
    Sampled {
        token: TokenId(row.winner.token),
        logprob: report.map(|report| logprob(row.winner.raw, report)),
        top: report.map_or_else(Vec::new, |report| {
            report.top.iter().map(|c| (TokenId(c.token), logprob(c.raw, report))).collect()
        }),
    }
}

/// Gathers `message` and reads every rank's with `read`, which must use up all of it.
fn gather<T>(
    message: &Writer,
    collective: &mut dyn Collective,
    read: impl Fn(&mut Reader<'_>) -> Option<T>,
) -> Result<Vec<T>, SampleError> {
    let gathered = collective.all_gather(&message.0)?;
    let parse = |(rank, bytes): (usize, &Vec<u8>)| {
        let mut reader = Reader(bytes);
        let read = read(&mut reader).filter(|_| reader.0.is_empty());
        read.ok_or(SampleError::Malformed { rank, bytes: bytes.len() })
    };
    gathered.iter().enumerate().map(parse).collect()
}

fn exchange_summaries(
    shards: &[Shard<'_>],
    queries: &[Query<'_>],
    collective: &mut dyn Collective,
) -> Result<Vec<Summary>, SampleError> {
    let mut message = Writer::default();
    for (shard, query) in shards.iter().zip(queries) {
        message.f32(shard.raw_max());
        shard.best(query).write(&mut message);
    }
    let read = |reader: &mut Reader<'_>| {
        let summary = |_| Some(Summary { raw_max: reader.f32()?, best: Candidate::read(reader)? });
        (0..queries.len()).map(summary).collect::<Option<Vec<_>>>()
    };
    let ranks = gather(&message, collective, read)?;
    (0..queries.len()).map(|row| summary(row, ranks.iter().map(|rank| rank[row]))).collect()
}

fn summary(row: usize, ranks: impl Iterator<Item = Summary>) -> Result<Summary, SampleError> {
    let mut merged = Summary { raw_max: f32::NEG_INFINITY, best: Candidate::NONE };
    for rank in ranks {
        if rank.raw_max.is_nan() {
            return Err(SampleError::NotFinite { row });
        }
        merged.raw_max = merged.raw_max.max(rank.raw_max);
        if rank.best.order(&merged.best).is_lt() {
            merged.best = rank.best;
        }
    }
    if merged.best == Candidate::NONE { Err(SampleError::NothingLeft { row }) } else { Ok(merged) }
}

/// One row on its way from logits to a token. All ranks know the same of it.
struct Row {
    /// The choice, final once the filter is gone.
    winner: Candidate,
    raw_max: f32,
    /// Alternatives to report, if log-probabilities are wanted.
    logprobs: Option<usize>,
    report: Option<Report>,
    filter: Option<Filter>,
    /// Where the nucleus of a filtered choice ends.
    boundary: Option<Boundary>,
}

fn rows(queries: &[Query<'_>], summaries: &[Summary]) -> Vec<Row> {
    let row = |(query, summary): (&Query<'_>, &Summary)| Row {
        winner: summary.best,
        raw_max: summary.raw_max,
        logprobs: query.logprobs(),
        report: None,
        filter: match query {
            Query::Choose(choice) => Filter::new(choice, summary.best.key),
            Query::Score { .. } => None,
        },
        boundary: None,
    };
    queries.iter().zip(summaries).map(row).collect()
}

/// The second exchange.
fn narrow(shards: &[Shard<'_>], rows: &mut [Row], collective: &mut dyn Collective) -> Result<(), SampleError> {
    let asked = |row: &Row| row.logprobs.is_some() || row.filter.is_some();
    if !rows.iter().any(asked) {
        return Ok(());
    }
    let mut message = Writer::default();
    for (shard, row) in shards.iter().zip(&*rows).filter(|(_, row)| asked(row)) {
        if let Some(top) = row.logprobs {
            message.u128(Weighing::raw(row.raw_max).sum(shard.raw()));
            write_all(&shard.alternatives(top), &mut message);
        }
        if let Some(filter) = &row.filter {
            filter.offer(shard).write(&mut message);
        }
    }
    let ranks = gather(&message, collective, |reader| {
        rows.iter().map(|row| Part::read(row, reader)).collect::<Option<Vec<_>>>()
    })?;
    for (row, parts) in rows.iter_mut().zip(by_row(ranks)) {
        let (reports, offers): (Vec<_>, Vec<_>) = parts.into_iter().map(|part| (part.report, part.offer)).unzip();
        if let Some(top) = row.logprobs {
            row.report = Some(Report::new(reports.into_iter().flatten(), top, row.raw_max));
        }
        let offers = offers.into_iter().flatten().collect();
        match row.filter.as_ref().map(|filter| filter.narrow(offers)) {
            Some(Narrowed::Chosen(winner)) => (row.winner, row.filter) = (winner, None),
            Some(Narrowed::Open(boundary)) => row.boundary = boundary,
            None => {}
        }
    }
    Ok(())
}

/// The third exchange.
fn finish(shards: &[Shard<'_>], rows: &mut [Row], collective: &mut dyn Collective) -> Result<(), SampleError> {
    let mut message = Writer::default();
    for (shard, row) in shards.iter().zip(&*rows) {
        if let Some(filter) = &row.filter {
            filter.finish(row.boundary, shard).write(&mut message);
        }
    }
    if message.0.is_empty() {
        return Ok(());
    }
    let open = rows.iter().filter(|row| row.filter.is_some()).count();
    let read = |reader: &mut Reader<'_>| (0..open).map(|_| Final::read(reader)).collect::<Option<Vec<_>>>();
    let ranks = gather(&message, collective, read)?;
    let open = rows.iter_mut().filter(|row| row.filter.is_some());
    for (row, finals) in open.zip(by_row(ranks)) {
        if let Some(filter) = row.filter.take() {
            row.winner = filter.decide(row.boundary, finals);
        }
    }
    Ok(())
}

/// One rank's part of one row in the second exchange.
struct Part {
    /// Sum of weights and most probable tokens.
    report: Option<(u128, Vec<Candidate>)>,
    offer: Option<Offer>,
}

impl Part {
    /// Reads what `row` asked for, which is the same on every rank.
    fn read(row: &Row, reader: &mut Reader<'_>) -> Option<Self> {
        let report = match row.logprobs {
            Some(_) => Some((reader.u128()?, read_all(reader)?)),
            None => None,
        };
        let offer = match &row.filter {
            Some(filter) => Some(filter.read_offer(reader)?),
            None => None,
        };
        Some(Self { report, offer })
    }
}

impl Report {
    fn new(parts: impl Iterator<Item = (u128, Vec<Candidate>)>, top: usize, raw_max: f32) -> Self {
        let (sums, alternatives): (Vec<_>, Vec<_>) = parts.unzip();
        let ln_sum = f64::from(raw_max) + ln_weights(sums.iter().sum());
        Self { ln_sum, top: first(alternatives.into_iter().flatten(), top) }
    }
}

/// Turns each rank's rows into each row's ranks.
fn by_row<T>(ranks: Vec<Vec<T>>) -> Vec<Vec<T>> {
    let mut rows: Vec<Vec<T>> = ranks.first().map_or_else(Vec::new, |rank| rank.iter().map(|_| Vec::new()).collect());
    for rank in ranks {
        rows.iter_mut().zip(rank).for_each(|(row, part)| row.push(part));
    }
    rows
}
