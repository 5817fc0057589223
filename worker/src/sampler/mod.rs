//! Chooses tokens from logits whose vocabulary is divided over the ranks, without gathering the logits.
//!
//! Every rank offers its best candidates; what is gathered is the same everywhere, and the choice is a pure function of
//! it and of a counter-based generator. So all ranks choose the same token by themselves, and a group of any size
//! chooses the token that one rank alone would choose from the same logits.
//!
//! 1. First exchange, all rows: each rank's largest logit and its own winner. Greedy choices and plain temperature
//!    (Gumbel-max) are decided by it.
//! 2. Second exchange, rows with filters or log-probabilities: weights' sums and the best 64 candidates of each rank.
//! 3. Further exchanges with four times as many candidates, until they provably cover the filter.
//!
//! Order: logit bias, penalties, forbidden tokens, temperature, `min_p`, `top_k`, `top_p`. Log-probabilities are those
//! of the model's own logits, over the whole vocabulary.

mod candidates;
mod history;
mod noise;
mod shard;
mod wire;

use std::ops::Range;

use phalanx_proto::ids::TokenId;
use thiserror::Error;

pub use self::history::{Choice, History};
use self::{
    candidates::{Candidate, Filter, Offer, first, ln_weights, read_all, write_all},
    noise::Noise,
    shard::Shard,
    wire::{Reader, Writer},
};
use crate::collective::{Collective, CollectiveError};

/// Candidates that each rank offers first for a filtered choice.
const FIRST_OFFER: usize = 64;
/// How many times more it offers when they were too few.
const OFFER_GROWTH: usize = 4;

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
        let (winners, reports) = exchange_candidates(&shards, queries, &summaries, collective)?;
        Ok(winners.iter().zip(&reports).map(|(winner, report)| sampled(winner, report.as_ref())).collect())
    }
}

fn sampled(winner: &Candidate, report: Option<&Report>) -> Sampled {
    let logprob = |raw: f32, report: &Report| (f64::from(raw) - report.ln_sum) as f32;
    Sampled {
        token: TokenId(winner.token),
        logprob: report.map(|report| logprob(winner.raw, report)),
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

/// One row's part of an exchange of candidates.
#[derive(Default)]
struct Part {
    /// Sum of weights and alternatives, where log-probabilities are wanted.
    report: Option<(u128, Vec<Candidate>)>,
    offer: Option<Offer>,
}

/// The winners of all rows, and what their log-probabilities follow from.
fn exchange_candidates(
    shards: &[Shard<'_>],
    queries: &[Query<'_>],
    summaries: &[Summary],
    collective: &mut dyn Collective,
) -> Result<(Vec<Candidate>, Vec<Option<Report>>), SampleError> {
    let mut winners: Vec<Candidate> = summaries.iter().map(|summary| summary.best).collect();
    let mut reports: Vec<Option<Report>> = queries.iter().map(|_| None).collect();
    let mut filters: Vec<Option<(Filter, Choice<'_>)>> = queries.iter().zip(summaries).map(filter).collect();
    let mut count = FIRST_OFFER;
    loop {
        let reported = |row: usize| queries[row].logprobs().filter(|_| count == FIRST_OFFER);
        let rows = (0..queries.len()).filter(|&row| reported(row).is_some() || filters[row].is_some());
        let rows: Vec<usize> = rows.collect();
        if rows.is_empty() {
            return Ok((winners, reports));
        }
        let parts = rows.iter().map(|&row| Part {
            report: reported(row)
                .map(|top| (shards[row].raw_mass(summaries[row].raw_max), shards[row].alternatives(top))),
            offer: filters[row].as_ref().map(|(filter, _)| shards[row].offer(filter, count)),
        });
        for (&row, parts) in rows.iter().zip(exchange_parts(parts.collect(), collective)?) {
            let (row_reports, offers): (Vec<_>, Vec<_>) =
                parts.into_iter().map(|part| (part.report, part.offer)).unzip();
            if let Some(top) = reported(row) {
                reports[row] = Some(report(row_reports.into_iter().flatten(), top, summaries[row].raw_max));
            }
            let offers: Vec<Offer> = offers.into_iter().flatten().collect();
            if let Some(winner) = filters[row].as_ref().and_then(|(filter, choice)| decide(filter, choice, &offers)) {
                winners[row] = winner;
                filters[row] = None;
            }
        }
        count *= OFFER_GROWTH;
    }
}

fn filter<'a>((query, summary): (&Query<'a>, &Summary)) -> Option<(Filter, Choice<'a>)> {
    match query {
        Query::Choose(choice) if Filter::applies(choice.settings) => {
            Some((Filter::new(choice.settings, summary.best.key), *choice))
        }
        _ => None,
    }
}

/// The winner, or nothing while the offers may not cover the filter.
fn decide(filter: &Filter, choice: &Choice<'_>, offers: &[Offer]) -> Option<Candidate> {
    let survivors = filter.survivors(offers)?;
    let noise = Noise::new(choice.settings.seed, choice.settings.choice, choice.position);
    filter.pick(&survivors, &noise)
}

fn report(parts: impl Iterator<Item = (u128, Vec<Candidate>)>, top: usize, raw_max: f32) -> Report {
    let (masses, alternatives): (Vec<_>, Vec<_>) = parts.unzip();
    let ln_sum = f64::from(raw_max) + ln_weights(masses.iter().sum());
    Report { ln_sum, top: first(alternatives.into_iter().flatten(), top) }
}

/// Every rank's parts, by row.
fn exchange_parts(mine: Vec<Part>, collective: &mut dyn Collective) -> Result<Vec<Vec<Part>>, SampleError> {
    let mut message = Writer::default();
    for part in &mine {
        if let Some((mass, alternatives)) = &part.report {
            message.u128(*mass);
            write_all(alternatives, &mut message);
        }
        if let Some(offer) = &part.offer {
            offer.write(&mut message);
        }
    }
    // Which parts a row has follows from the queries, which are the same on every rank.
    let read_part = |like: &Part, reader: &mut Reader<'_>| {
        let mut part = Part::default();
        if like.report.is_some() {
            part.report = Some((reader.u128()?, read_all(reader)?));
        }
        if like.offer.is_some() {
            part.offer = Some(Offer::read(reader)?);
        }
        Some(part)
    };
    let read = |reader: &mut Reader<'_>| mine.iter().map(|like| read_part(like, reader)).collect::<Option<Vec<_>>>();
    let ranks = gather(&message, collective, read)?;
    let mut rows: Vec<Vec<Part>> = mine.iter().map(|_| Vec::with_capacity(ranks.len())).collect();
    for rank in ranks {
        rows.iter_mut().zip(rank).for_each(|(row, part)| row.push(part));
    }
    Ok(rows)
}
