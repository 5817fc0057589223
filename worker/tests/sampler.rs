//! The sampler against a plain one that sees the whole vocabulary, over several worlds, and against its own statistics.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod in_process;

use std::cmp::Ordering;

use phalanx_proto::{ids::TokenId, layout::even_part, sampling::SamplingSettings, v1};
use phalanx_worker::{
    collective::Alone,
    sampler::{Choice, History, Query, SampleError, Sampled, Sampler},
};
use xxhash_rust::xxh3::xxh3_64;

/// SplitMix64, for logits and settings.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.bits() % bound as u64) as usize
    }

    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.unit()).sum::<f64>() - 6.0
    }

    fn logits(&mut self, vocab: usize, spread: f64) -> Vec<f32> {
        (0..vocab).map(|_| (self.normal() * spread) as f32).collect()
    }
}

fn settings(message: &v1::Sampling) -> SamplingSettings {
    SamplingSettings::check(message, 1 << 20, 0).unwrap()
}

/// Every query over its row of the whole vocabulary, sampled by a group of `world` ranks that must agree.
fn sample(world: usize, rows: &[Vec<f32>], sampled: usize, queries: &[Query<'_>]) -> Result<Vec<Sampled>, SampleError> {
    let mut answers = in_process::on_every_rank(world, |mut end| {
        let rank = phalanx_worker::collective::Collective::rank(&end);
        let held = even_part(rows[0].len(), world, rank);
        let local: Vec<f32> = rows.iter().flat_map(|row| &row[held.clone()]).copied().collect();
        Sampler::new(held, sampled).sample(&local, queries, &mut end)
    });
    let first = answers.remove(0);
    for answer in answers {
        assert_eq!(format!("{answer:?}"), format!("{first:?}"), "ranks disagree");
    }
    first
}

fn edited(row: &[f32], sampled: usize, seen: &[(u32, u32)], choice: &Choice<'_>) -> Vec<f64> {
    let s = choice.settings;
    let mut row = row[..sampled].to_vec();
    for &(token, bias) in &s.logit_bias {
        row[token.index()] += bias;
    }
    for &(token, count) in seen {
        let logit = &mut row[token as usize];
        *logit = if *logit > 0.0 { *logit / s.repetition_penalty } else { *logit * s.repetition_penalty };
        *logit -= s.frequency_penalty * count as f32;
        *logit -= if count > 0 { s.presence_penalty } else { 0.0 };
    }
    for token in choice.forbidden {
        row[token.index()] = f32::NEG_INFINITY;
    }
    row.into_iter().map(f64::from).collect()
}

/// Tokens that may be chosen and their probabilities, by the definition of the filters.
fn distribution(edited: &[f64], s: &SamplingSettings) -> Vec<(usize, f64)> {
    let temperature = f64::from(s.temperature);
    let best = edited.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights = edited.iter().map(|x| ((x - best) / temperature).exp());
    let mut kept: Vec<(usize, f64)> = weights.enumerate().filter(|(_, w)| *w > 0.0).collect();
    kept.sort_by(|a, b| edited[b.0].partial_cmp(&edited[a.0]).unwrap_or(Ordering::Equal).then(a.0.cmp(&b.0)));
    kept.retain(|(_, w)| *w >= f64::from(s.min_p));
    if s.top_k > 0 {
        kept.truncate(s.top_k as usize);
    }
    if s.top_p < 1.0 {
        let nucleus = f64::from(s.top_p) * kept.iter().map(|(_, w)| w).sum::<f64>();
        let mut before = 0.0;
        kept.retain(|(_, w)| {
            let inside = before < nucleus;
            before += w;
            inside
        });
    }
    let total: f64 = kept.iter().map(|(_, w)| w).sum();
    kept.into_iter().map(|(token, w)| (token, w / total)).collect()
}

/// The published generator: xxh3 of (seed, choice, position) keys SplitMix64, the token counts.
fn gumbel(choice: &Choice<'_>, token: usize) -> f64 {
    let key = [
        choice.settings.seed.to_le_bytes().as_slice(),
        &choice.settings.choice.to_le_bytes(),
        &(choice.position as u64).to_le_bytes(),
    ]
    .concat();
    let mut random = Random(xxh3_64(&key).wrapping_add((token as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)));
    let u = ((random.bits() >> 12) as f64 + 0.5) / (1_u64 << 52) as f64;
    -(-u.ln()).ln()
}

fn plain(row: &[f32], sampled: usize, seen: &[(u32, u32)], choice: &Choice<'_>) -> TokenId {
    let edited = edited(row, sampled, seen, choice);
    let best = |keys: Vec<(usize, f64)>| {
        let first = |a: (usize, f64), b: (usize, f64)| if b.1 > a.1 { b } else { a };
        TokenId(keys.into_iter().reduce(first).unwrap().0 as u32)
    };
    if choice.settings.is_greedy() {
        return best(edited.into_iter().enumerate().collect());
    }
    let kept = distribution(&edited, choice.settings);
    let temperature = f64::from(choice.settings.temperature);
    let mut noisy: Vec<_> = kept.iter().map(|&(t, _)| (t, edited[t] / temperature + gumbel(choice, t))).collect();
    noisy.sort_by_key(|&(token, _)| token);
    best(noisy)
}

fn random_settings(random: &mut Random, vocab: usize) -> v1::Sampling {
    let pick = |random: &mut Random, values: &[f32]| values[random.below(values.len())];
    v1::Sampling {
        temperature: Some(pick(random, &[0.0, 0.3, 0.7, 1.0, 1.0, 1.9])),
        top_p: Some(pick(random, &[1.0, 1.0, 0.9, 0.5, 0.05, 0.999])),
        top_k: [0, 0, 1, 5, 63, 64, 65, 300][random.below(8)],
        min_p: pick(random, &[0.0, 0.0, 0.0, 0.05, 0.3, 1.0]),
        presence_penalty: pick(random, &[0.0, 0.0, 1.5, -0.5]),
        frequency_penalty: pick(random, &[0.0, 0.0, 0.7]),
        repetition_penalty: Some(pick(random, &[1.0, 1.0, 1.3, 0.6])),
        logit_bias: match random.below(3) {
            0 => (0..5).map(|i| (random.below(vocab) as u32, i as f32 * 4.0 - 8.0)).collect(),
            _ => Default::default(),
        },
        seed: Some(random.bits()),
        choice: random.below(3) as u32,
        logprobs: [None, Some(0), Some(5), Some(20)][random.below(4)],
        ..Default::default()
    }
}

#[test]
fn worlds_of_any_size_choose_what_a_plain_sampler_over_the_whole_vocabulary_chooses() {
    let mut random = Random(7);
    for round in 0..60 {
        let vocab = [1003, 257, 3000][round % 3];
        // Flat rows make the nucleus large, so that offers must grow.
        let rows: Vec<Vec<f32>> = (0..8).map(|i| random.logits(vocab, [0.01, 0.5, 2.0, 5.0][i % 4])).collect();
        let sampled = vocab - random.below(vocab / 3);
        let all: Vec<SamplingSettings> =
            rows.iter().map(|_| settings(&random_settings(&mut random, sampled))).collect();
        let seen: Vec<(u32, u32)> = (0..20).map(|i| (i * 8, i % 4)).collect();
        let generated: Vec<TokenId> =
            seen.iter().flat_map(|&(token, count)| vec![TokenId(token); count as usize]).collect();
        let prompt: Vec<TokenId> = seen.iter().map(|&(token, _)| TokenId(token)).collect();
        let history = History::new(&prompt, &generated);
        let forbidden = [TokenId(3), TokenId(sampled as u32 - 1)];
        let choices: Vec<Choice<'_>> = all
            .iter()
            .enumerate()
            .map(|(i, settings)| Choice {
                settings,
                position: 100 + i,
                history: &history,
                forbidden: &forbidden[i % 3..],
            })
            .map(|choice| if round % 2 == 0 { Choice { forbidden: &[], ..choice } } else { choice })
            .collect();
        let queries: Vec<Query<'_>> = choices.iter().copied().map(Query::Choose).collect();
        let expected: Vec<TokenId> = rows.iter().zip(&choices).map(|(row, c)| plain(row, sampled, &seen, c)).collect();
        let alone = sample(1, &rows, sampled, &queries).unwrap();
        let tokens: Vec<TokenId> = alone.iter().map(|answer| answer.token).collect();
        assert_eq!(tokens, expected, "round {round}: {all:#?}");
        for world in [2, 3, 4] {
            assert_eq!(sample(world, &rows, sampled, &queries).unwrap(), alone, "round {round}, world {world}");
        }
    }
}

#[test]
fn equal_logits_give_the_lowest_token() {
    let mut row = vec![0.0; 100];
    row[99] = 2.0;
    row[40] = 2.0;
    row[60] = 2.0;
    let greedy = settings(&v1::Sampling { temperature: Some(0.0), ..Default::default() });
    let history = History::default();
    let query = Query::Choose(Choice { settings: &greedy, position: 0, history: &history, forbidden: &[] });
    for world in [1, 2, 4] {
        assert_eq!(sample(world, &[row.clone()], 100, &[query]).unwrap()[0].token, TokenId(40));
    }
}

#[test]
fn tokens_beyond_the_tokenizer_are_never_chosen_or_reported() {
    let mut row = vec![0.0; 64];
    row[63] = 50.0;
    row[5] = 1.0;
    let history = History::default();
    for (temperature, top_p) in [(0.0, 1.0), (1.0, 1.0), (1.0, 0.9)] {
        let message = v1::Sampling {
            temperature: Some(temperature),
            top_p: Some(top_p),
            logprobs: Some(20),
            ..Default::default()
        };
        let settings = settings(&message);
        let query = Query::Choose(Choice { settings: &settings, position: 0, history: &history, forbidden: &[] });
        // With 20 tokens to choose from, three of four ranks hold rows that cannot be chosen.
        for world in [1, 2, 4] {
            let answer = &sample(world, &[row.clone()], 20, &[query]).unwrap()[0];
            assert!(answer.token.0 < 20 && answer.top.len() == 20 && answer.top.iter().all(|(token, _)| token.0 < 20));
            // The probability is that of the whole vocabulary.
            assert!(answer.logprob.unwrap() < -48.0);
        }
    }
}

#[test]
fn log_probabilities_are_those_of_the_raw_logits() {
    let mut random = Random(11);
    let row = random.logits(777, 3.0);
    let ln_sum = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
    let logprob = |token: TokenId| f64::from(row[token.index()]) - ln_sum;
    let biased = v1::Sampling {
        temperature: Some(0.5),
        logit_bias: [(400, 100.0)].into(),
        logprobs: Some(4),
        ..Default::default()
    };
    let (settings, history) = (settings(&biased), History::default());
    let choose = Query::Choose(Choice { settings: &settings, position: 0, history: &history, forbidden: &[] });
    let score = Query::Score { token: TokenId(776), alternatives: 0 };
    let mut order: Vec<u32> = (0..777).collect();
    order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]));
    for world in [1, 2, 4] {
        let answers = sample(world, &[row.clone(), row.clone()], 777, &[choose, score]).unwrap();
        assert_eq!((answers[0].token, answers[1].token), (TokenId(400), TokenId(776)));
        assert_eq!(answers[0].top.iter().map(|(token, _)| token.0).collect::<Vec<_>>(), order[..4]);
        assert!(answers[1].top.is_empty());
        let reported = answers.iter().flat_map(|a| a.top.iter().copied().chain([(a.token, a.logprob.unwrap())]));
        // One rounding to f32 of a value below 16.
        reported.for_each(|(token, value)| assert!((f64::from(value) - logprob(token)).abs() < 1e-6));
    }
}

#[test]
fn a_logit_that_is_not_finite_is_an_error_on_every_rank() {
    let (settings, history) = (settings(&v1::Sampling::default()), History::default());
    let query = Query::Choose(Choice { settings: &settings, position: 0, history: &history, forbidden: &[] });
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut rows = vec![vec![0.0; 50]; 2];
        rows[1][49] = bad;
        // Not even where the token could not be chosen.
        let error = sample(2, &rows, 40, &[query, query]).unwrap_err();
        assert!(matches!(error, SampleError::NotFinite { row: 1 }), "{error}");
    }
}

/// Divided by such a penalty, a positive logit would be infinite, and the distances to it no numbers.
#[test]
fn a_vanishing_repetition_penalty_still_chooses_a_token() {
    let seen: Vec<_> = (0..8).map(TokenId).collect();
    let history = History::new(&seen, &[]);
    let rows = [Random(9).logits(64, 3.0)];
    for (top_k, top_p, min_p) in [(0, 1.0, 0.0), (5, 0.9, 0.05), (0, 0.9, 0.0), (0, 1.0, 0.1), (0, 0.5, 0.1)] {
        let settings = settings(&v1::Sampling {
            repetition_penalty: Some(f32::from_bits(4)),
            temperature: Some(1.5),
            top_p: Some(top_p),
            top_k,
            min_p,
            ..Default::default()
        });
        let choice = Choice { settings: &settings, position: 8, history: &history, forbidden: &[] };
        for world in [1, 2] {
            let chosen = sample(world, &rows, 60, &[Query::Choose(choice)]).unwrap();
            assert!(seen.contains(&chosen[0].token), "{chosen:?}");
        }
    }
}

#[test]
fn nothing_to_choose_from_is_an_error() {
    let (settings, history) = (settings(&v1::Sampling::default()), History::default());
    let forbidden: Vec<TokenId> = (0..8).map(TokenId).collect();
    let query = Query::Choose(Choice { settings: &settings, position: 0, history: &history, forbidden: &forbidden });
    assert!(matches!(sample(2, &[vec![0.0; 8]], 8, &[query]), Err(SampleError::NothingLeft { row: 0 })));
}

#[test]
fn logits_of_the_wrong_shape_are_refused() {
    let score = Query::Score { token: TokenId(0), alternatives: 0 };
    assert!(matches!(Sampler::new(0..8, 8).sample(&[0.0; 7], &[score], &mut Alone), Err(SampleError::Shape { .. })));
}

/// Pearson's statistic of `counts` against `expected` probabilities; classes below 5 expected are pooled.
fn chi_square(counts: &[u32], expected: &[f64], draws: u32) -> (f64, usize) {
    let (mut statistic, mut classes, mut pooled) = (0.0, 0, (0.0, 0.0));
    for (&count, &p) in counts.iter().zip(expected) {
        let expected = p * f64::from(draws);
        if expected < 5.0 {
            pooled = (pooled.0 + f64::from(count), pooled.1 + expected);
            continue;
        }
        statistic += (f64::from(count) - expected).powi(2) / expected;
        classes += 1;
    }
    if pooled.1 >= 5.0 {
        statistic += (pooled.0 - pooled.1).powi(2) / pooled.1;
        classes += 1;
    }
    (statistic, classes - 1)
}

#[test]
fn frequencies_follow_the_softmax_with_and_without_filters() {
    const DRAWS: u32 = 40_000;
    let mut random = Random(3);
    let row = random.logits(200, 1.5);
    let cases = [
        v1::Sampling::default(),
        v1::Sampling { temperature: Some(0.6), ..Default::default() },
        v1::Sampling { temperature: Some(1.3), top_p: Some(0.8), ..Default::default() },
        v1::Sampling { top_k: 12, ..Default::default() },
        v1::Sampling { min_p: 0.1, top_p: Some(0.9), ..Default::default() },
    ];
    let history = History::default();
    for message in cases {
        let settings = settings(&v1::Sampling { seed: Some(99), ..message });
        let edited: Vec<f64> = row.iter().copied().map(f64::from).collect();
        let mut expected = vec![0.0; row.len()];
        distribution(&edited, &settings).into_iter().for_each(|(token, p)| expected[token] = p);
        let mut counts = vec![0; row.len()];
        for position in 0..DRAWS as usize {
            let query = Query::Choose(Choice { settings: &settings, position, history: &history, forbidden: &[] });
            let answer = Sampler::new(0..row.len(), row.len()).sample(&row, &[query], &mut Alone).unwrap();
            counts[answer[0].token.index()] += 1;
        }
        assert!(counts.iter().zip(&expected).all(|(&count, &p)| p > 0.0 || count == 0), "chosen against the filter");
        let (statistic, freedom) = chi_square(&counts, &expected, DRAWS);
        // Mean `freedom`, variance twice that: four standard deviations (about 1 in 10,000; the seed is fixed).
        let limit = freedom as f64 + 4.0 * (2.0 * freedom as f64).sqrt();
        assert!(freedom > 5 && statistic < limit, "{settings:?}: chi² {statistic} with {freedom} degrees of freedom");
    }
}
