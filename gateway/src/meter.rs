//! Measures one request from its arrival to its end, whichever way it ends.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use phalanx_proto::v1::Admitted;
use prometheus_client::metrics::histogram::Histogram;
use tracing::{Span, debug, field::Empty, info_span};

use crate::{
    access::Tenant,
    instruments::{Ending, Instruments, KeyLabels, Labels},
    openai::{
        error::ApiError,
        params::Params,
        reply::{FinishReason, Usage},
    },
    stats::Stats,
};

/// What a request is measured with.
pub(crate) struct Meter {
    instruments: Arc<Instruments>,
    stats: Arc<Stats>,
    labels: Labels,
    /// Whose tokens they are.
    tenant: Option<Arc<Tenant>>,
    inter_token: Histogram,
    span: Span,
    arrived: Instant,
    admitted: Option<Instant>,
    first_token: Option<Instant>,
    /// When each choice had its last token.
    last_tokens: Vec<Option<Instant>>,
    reasons: Vec<&'static str>,
    settled: bool,
}

impl Meter {
    pub(crate) fn new(
        instruments: Arc<Instruments>,
        stats: Arc<Stats>,
        labels: Labels,
        choices: usize,
        span: Span,
        arrived: Instant,
    ) -> Self {
        stats.began(arrived, &labels.profile);
        Self {
            inter_token: instruments.inter_token.get_or_create_owned(&labels),
            instruments,
            stats,
            labels,
            tenant: None,
            span,
            arrived,
            admitted: None,
            first_token: None,
            last_tokens: vec![None; choices],
            reasons: Vec::new(),
            settled: false,
        }
    }

    /// Counts the tokens towards the limits of a key.
    pub(crate) fn charged_to(mut self, tenant: Option<Arc<Tenant>>) -> Self {
        self.tenant = tenant;
        self
    }

    /// The coordinator has taken the prompts.
    pub(crate) fn prompt(&mut self, count: u64) {
        if let Some(tenant) = &self.tenant {
            tenant.quota.charge(count, Instant::now());
            let key = KeyLabels { key: tenant.name.clone() };
            self.instruments.key_prompt_tokens.get_or_create(&key).inc_by(count);
        }
    }

    /// The request's span.
    pub(crate) fn span(&self) -> &Span {
        &self.span
    }

    /// A choice left the queue.
    pub(crate) fn admitted(&mut self, admitted: &Admitted) {
        if self.admitted.is_none() {
            self.admitted = Some(Instant::now());
            let queued = Duration::from_micros(admitted.queued_us).as_secs_f64();
            self.instruments.queue.get_or_create(&self.labels).observe(queued);
        }
    }

    /// A choice got tokens.
    pub(crate) fn tokens(&mut self, choice: usize, count: usize) {
        let now = Instant::now();
        if self.first_token.is_none() {
            self.first_token = Some(now);
            let after = now - self.arrived;
            self.stats.first_token(now, after);
            self.instruments.first_token.get_or_create(&self.labels).observe(after.as_secs_f64());
            let prefill = now - self.admitted.unwrap_or(self.arrived);
            self.instruments.prefill.get_or_create(&self.labels).observe(prefill.as_secs_f64());
        }
        self.stats.tokens(now, 0, count as u64);
        self.instruments.generation_tokens.get_or_create(&self.labels).inc_by(count as u64);
        if let Some(tenant) = &self.tenant {
            tenant.quota.charge(count as u64, now);
            let key = KeyLabels { key: tenant.name.clone() };
            self.instruments.key_generation_tokens.get_or_create(&key).inc_by(count as u64);
        }
        if let Some(last) = self.last_tokens.get_mut(choice) {
            if let Some(last) = last {
                // Tokens that come together came at equal distances, as far as anybody can tell.
                let each = (now - *last).as_secs_f64() / count.max(1) as f64;
                (0..count).for_each(|_| self.inter_token.observe(each));
            }
            *last = Some(now);
        }
    }

    /// A choice ended.
    pub(crate) fn ended(&mut self, reason: FinishReason) {
        self.reasons.push(reason.name());
        let ending = Ending { finished_reason: reason.name() };
        self.instruments.successes.get_or_create(&(self.labels.clone(), ending)).inc();
    }

    /// The request was answered.
    pub(crate) fn finish(&mut self, usage: &Usage) {
        self.settled = true;
        let now = Instant::now();
        let Self { instruments, labels, .. } = self;
        instruments.end_to_end.get_or_create(labels).observe((now - self.arrived).as_secs_f64());
        if let Some(first) = self.first_token {
            let decode = (now - first).as_secs_f64();
            instruments.decode.get_or_create(labels).observe(decode);
            let steps = usage.completion_tokens / (self.last_tokens.len() as u64).max(1);
            if steps > 1 {
                instruments.per_output_token.get_or_create(labels).observe(decode / (steps - 1) as f64);
            }
        }
        instruments.request_prompt_tokens.get_or_create(labels).observe(usage.prompt_tokens as f64);
        instruments.request_generation_tokens.get_or_create(labels).observe(usage.completion_tokens as f64);
        instruments.prompt_tokens.get_or_create(labels).inc_by(usage.prompt_tokens);
        instruments.cached_tokens.get_or_create(labels).inc_by(usage.cached_tokens);
        instruments.reasoning_tokens.get_or_create(labels).inc_by(usage.reasoning_tokens);
        self.stats.tokens(now, usage.prompt_tokens, 0);
        self.stats.finished(now, now - self.arrived);
        self.record(usage);
    }

    fn record(&self, usage: &Usage) {
        self.span.record("gen_ai.usage.input_tokens", usage.prompt_tokens);
        self.span.record("gen_ai.usage.output_tokens", usage.completion_tokens);
        self.span.record("gen_ai.usage.cache_read.input_tokens", usage.cached_tokens);
        self.span.record("gen_ai.usage.reasoning.output_tokens", usage.reasoning_tokens);
        self.span.record("gen_ai.response.finish_reasons", self.reasons.join(","));
        debug!(parent: &self.span, prompt = usage.prompt_tokens, completion = usage.completion_tokens, "answered");
    }

    /// The request failed.
    pub(crate) fn fail(&mut self, error: &ApiError) {
        self.settled = true;
        self.stats.failed(Instant::now());
        self.span.record("error.type", error.code.unwrap_or_else(|| error.kind.name()));
    }
}

impl Drop for Meter {
    /// A request that neither finished nor failed was left by its client: 499, which only logs and metrics see.
    fn drop(&mut self) {
        if !self.settled {
            self.stats.cancelled();
            self.instruments.cancelled.get_or_create(&self.labels).inc();
            self.span.record("error.type", "client_closed_request");
            debug!(parent: &self.span, status = 499, "client left");
        }
    }
}

/// The span of one request, with the attributes of the GenAI conventions. It carries no prompt and no answer.
pub(crate) fn request_span(operation: &'static str, model: &str, id: &str, params: &Params) -> Span {
    let span = info_span!(
        "request",
        otel.name = format!("{operation} {model}"),
        otel.kind = "server",
        gen_ai.operation.name = operation,
        gen_ai.provider.name = "phalanx",
        gen_ai.request.model = model,
        gen_ai.request.max_tokens = Empty,
        gen_ai.request.temperature = Empty,
        gen_ai.request.top_p = Empty,
        gen_ai.request.seed = Empty,
        gen_ai.request.choice.count = Empty,
        gen_ai.response.id = id,
        gen_ai.response.model = model,
        gen_ai.response.finish_reasons = Empty,
        gen_ai.usage.input_tokens = Empty,
        gen_ai.usage.output_tokens = Empty,
        gen_ai.usage.cache_read.input_tokens = Empty,
        gen_ai.usage.reasoning.output_tokens = Empty,
        "error.type" = Empty,
    );
    if let Some(max_tokens) = params.max_tokens {
        span.record("gen_ai.request.max_tokens", max_tokens);
    }
    if let Some(temperature) = params.sampling.temperature {
        span.record("gen_ai.request.temperature", f64::from(temperature));
    }
    if let Some(top_p) = params.sampling.top_p {
        span.record("gen_ai.request.top_p", f64::from(top_p));
    }
    if let Some(seed) = params.sampling.seed {
        span.record("gen_ai.request.seed", seed);
    }
    if params.n > 1 {
        span.record("gen_ai.request.choice.count", params.n);
    }
    span
}
