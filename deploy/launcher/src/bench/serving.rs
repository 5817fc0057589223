//! Closed-loop load on an OpenAI server: each level keeps so many streams in flight.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use futures::StreamExt;
use serde::Serialize;
use serde_json::{Value, json};

use super::{Percentiles, Times, sse::SseLines};
use crate::{access::http_client, cli::BenchArgs};

/// What one level of concurrency gave.
#[derive(Debug, Serialize)]
struct Level {
    concurrency: usize,
    requests: usize,
    failed: usize,
    seconds: f64,
    input_tokens: u64,
    output_tokens: u64,
    output_tokens_per_second: f64,
    requests_per_second: f64,
    ttft_ms: Percentiles,
    inter_token_ms: Percentiles,
    end_to_end_ms: Percentiles,
    /// Share of the steps' time that is not the model's execution (scheduling, gRPC, waiting for a plan).
    overhead_share: Option<f64>,
    first_error: Option<String>,
}

/// One finished stream.
struct Sample {
    first: Duration,
    gaps: Vec<Duration>,
    total: Duration,
    input_tokens: u64,
    output_tokens: u64,
}

pub(super) async fn run(args: BenchArgs) -> Result<()> {
    let target = Arc::new(Target::new(args).await?);
    target.request(usize::MAX).await.context("warm-up request")?;
    let mut levels = Vec::new();
    if !target.args.json {
        println!(
            "{:>7} {:>4} {:>6} {:>10} {:>8} {:>24} {:>24} {:>8}",
            "streams", "ok", "failed", "out tok/s", "req/s", "TTFT ms p50/p95/p99", "inter-token ms", "overhead"
        );
    }
    for &concurrency in &target.args.concurrency {
        let level = run_level(&target, concurrency.max(1)).await?;
        if !target.args.json {
            print_level(&level);
        }
        levels.push(level);
    }
    if target.args.json {
        println!("{}", serde_json::to_string_pretty(&json!({"model": target.model, "levels": levels}))?);
    }
    if let Some(error) = levels.iter().find_map(|level| level.first_error.as_ref()) {
        bail!("some requests failed, the first with: {error}");
    }
    Ok(())
}

fn print_level(level: &Level) {
    let show = |p: &Percentiles| format!("{:.1}/{:.1}/{:.1}", p.p50, p.p95, p.p99);
    println!(
        "{:>7} {:>4} {:>6} {:>10.1} {:>8.2} {:>24} {:>24} {:>8}",
        level.concurrency,
        level.requests - level.failed,
        level.failed,
        level.output_tokens_per_second,
        level.requests_per_second,
        show(&level.ttft_ms),
        show(&level.inter_token_ms),
        level.overhead_share.map_or("-".into(), |share| format!("{:.1}%", share * 100.0)),
    );
}

async fn run_level(target: &Arc<Target>, concurrency: usize) -> Result<Level> {
    let total = target.args.requests.unwrap_or((4 * concurrency).max(8));
    let next = Arc::new(AtomicUsize::new(0));
    let before = target.step_times().await;
    let start = Instant::now();
    let streams = (0..concurrency).map(|_| {
        let (target, next) = (target.clone(), next.clone());
        tokio::spawn(async move {
            let mut samples = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= total {
                    return samples;
                }
                samples.push(target.request(concurrency << 32 | index).await);
            }
        })
    });
    let mut samples = Vec::new();
    for stream in streams.collect::<Vec<_>>() {
        samples.extend(stream.await?);
    }
    let seconds = start.elapsed().as_secs_f64();
    let overhead = before.zip(target.step_times().await).and_then(|(before, after)| after.overhead_since(&before));
    summarize(concurrency, seconds, samples, overhead)
}

fn summarize(concurrency: usize, seconds: f64, samples: Vec<Result<Sample>>, overhead: Option<f64>) -> Result<Level> {
    let (mut first, mut gaps, mut total) = (Times::new()?, Times::new()?, Times::new()?);
    let (mut input_tokens, mut output_tokens, mut failed, mut first_error) = (0, 0, 0, None);
    let requests = samples.len();
    for sample in samples {
        match sample {
            Ok(sample) => {
                first.record(sample.first);
                total.record(sample.total);
                sample.gaps.iter().for_each(|&gap| gaps.record(gap));
                input_tokens += sample.input_tokens;
                output_tokens += sample.output_tokens;
            }
            Err(error) => {
                failed += 1;
                first_error.get_or_insert(format!("{error:#}"));
            }
        }
    }
    Ok(Level {
        concurrency,
        requests,
        failed,
        seconds,
        input_tokens,
        output_tokens,
        output_tokens_per_second: output_tokens as f64 / seconds,
        requests_per_second: (requests - failed) as f64 / seconds,
        ttft_ms: first.percentiles(),
        inter_token_ms: gaps.percentiles(),
        end_to_end_ms: total.percentiles(),
        overhead_share: overhead,
        first_error,
    })
}

/// The coordinator's running totals, as the gateway's `/stats` shows them.
struct StepTimes {
    step_us: f64,
    execute_us: f64,
}

impl StepTimes {
    fn overhead_since(&self, before: &Self) -> Option<f64> {
        let step = self.step_us - before.step_us;
        let execute = self.execute_us - before.execute_us;
        (step > 0.0).then(|| (1.0 - execute / step).max(0.0))
    }
}

struct Target {
    args: BenchArgs,
    http: reqwest::Client,
    model: String,
    vocab_size: u64,
}

impl Target {
    async fn new(args: BenchArgs) -> Result<Self> {
        let http = http_client()?;
        let url = format!("{}/v1/models", args.url);
        let models: Value = http.get(&url).send().await.with_context(|| url.clone())?.json().await.context(url)?;
        let model = models["data"][0]["id"].as_str().context("the server lists no model")?.to_owned();
        // Ordinary tokens only: specials would end up as control tokens in the prompt.
        let vocab_size = models["data"][0]["vocab_size"].as_u64().unwrap_or(1000).min(1000);
        Ok(Self { args, http, model, vocab_size })
    }

    async fn step_times(&self) -> Option<StepTimes> {
        let stats: Value = self.http.get(format!("{}/stats", self.args.url)).send().await.ok()?.json().await.ok()?;
        let totals = stats["totals"].as_object()?;
        Some(StepTimes { step_us: totals.get("step_us")?.as_f64()?, execute_us: totals.get("execute_us")?.as_f64()? })
    }

    async fn request(&self, index: usize) -> Result<Sample> {
        let start = Instant::now();
        let body = self.body(index as u64);
        let request = self.http.post(format!("{}/v1/completions", self.args.url)).json(&body);
        let response = request.send().await?;
        let status = response.status();
        if !status.is_success() {
            bail!("{status}: {}", response.text().await?);
        }
        let mut events = SseLines::new(response.bytes_stream().boxed());
        let (mut times, mut usage, mut done) = (Vec::new(), Value::Null, false);
        while let Some(data) = events.next().await? {
            if data == "[DONE]" {
                done = true;
                break;
            }
            let chunk: Value = serde_json::from_str(&data)?;
            if !chunk["error"].is_null() {
                bail!("{}", chunk["error"]);
            }
            if !chunk["usage"].is_null() {
                usage = chunk["usage"].clone();
            }
            if chunk["choices"].as_array().is_some_and(|choices| !choices.is_empty()) {
                times.push(start.elapsed());
            }
        }
        let first = *times.first().context("the stream ended without a token")?;
        anyhow::ensure!(done, "the stream ended without [DONE]");
        Ok(Sample {
            first,
            gaps: times.windows(2).map(|pair| pair[1] - pair[0]).collect(),
            total: start.elapsed(),
            input_tokens: usage["prompt_tokens"].as_u64().unwrap_or(0),
            output_tokens: usage["completion_tokens"].as_u64().unwrap_or(times.len() as u64),
        })
    }

    fn body(&self, index: u64) -> Value {
        let prompt: Vec<u64> = (0..self.args.input_len as u64)
            .map(|position| mix(self.args.seed ^ index.rotate_left(20) ^ position.rotate_left(44)) % self.vocab_size)
            .collect();
        json!({
            "model": self.model, "prompt": prompt, "max_tokens": self.args.output_len, "temperature": 0,
            "ignore_eos": true, "stream": true, "stream_options": {"include_usage": true},
        })
    }
}

/// SplitMix64's finalizer: prompts that differ everywhere, the same at every run.
pub(super) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
