//! Every metric of the gateway. `phalanx_*` are ours; the same ones under vLLM's names feed dashboards that exist.

use std::sync::{Mutex, PoisonError, atomic::Ordering};

use phalanx_proto::v1::DeploymentLoad;
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Metric, Registry},
};

use crate::{
    access::Limit,
    upstream::{Fleet, state_name},
};

/// What every series of a request carries. All values come from configuration and coordinator, none from a client.
#[derive(Clone, Debug, Default, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct Labels {
    pub(crate) model_id: String,
    /// vLLM's name for the model.
    pub(crate) model_name: String,
    pub(crate) model_size: String,
    pub(crate) backend: String,
    /// Kind and width: `tp2`.
    pub(crate) parallelism: String,
    pub(crate) profile: String,
}

/// Where a request arrived and what was answered.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct Answer {
    pub(crate) route: String,
    pub(crate) status: u16,
}

/// A key by the name that its file gives it.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct KeyLabels {
    pub(crate) key: String,
}

/// Which limit of a key refused a request.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct KeyRefusal {
    pub(crate) limit: &'static str,
}

/// How a choice ended.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct Ending {
    pub(crate) finished_reason: &'static str,
}

/// The labels of `cache_config_info`.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CacheConfig {
    block_size: u32,
    num_gpu_blocks: u64,
}

/// The label of the group's state.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct State {
    state: &'static str,
}

pub(crate) type Histograms = Family<Labels, Histogram, fn() -> Histogram>;
pub(crate) type Counters<L = Labels> = Family<L, Counter>;
pub(crate) type Gauges<L = Labels> = Family<L, Gauge<f64, std::sync::atomic::AtomicU64>>;

/// All metrics, and the registry that writes them.
pub(crate) struct Instruments {
    registry: Registry,
    /// One scrape at a time: gauges are set from the fleet and then written.
    scrape: Mutex<()>,
    pub(crate) answers: Counters<Answer>,
    pub(crate) successes: Counters<(Labels, Ending)>,
    pub(crate) prompt_tokens: Counters,
    pub(crate) cached_tokens: Counters,
    pub(crate) generation_tokens: Counters,
    pub(crate) reasoning_tokens: Counters,
    pub(crate) cancelled: Counters,
    pub(crate) key_requests: Counters<KeyLabels>,
    pub(crate) key_refusals: Counters<(KeyLabels, KeyRefusal)>,
    pub(crate) key_prompt_tokens: Counters<KeyLabels>,
    pub(crate) key_generation_tokens: Counters<KeyLabels>,
    pub(crate) key_running: Gauges<KeyLabels>,
    pub(crate) first_token: Histograms,
    pub(crate) inter_token: Histograms,
    pub(crate) per_output_token: Histograms,
    pub(crate) end_to_end: Histograms,
    pub(crate) queue: Histograms,
    pub(crate) prefill: Histograms,
    pub(crate) decode: Histograms,
    pub(crate) request_prompt_tokens: Histograms,
    pub(crate) request_generation_tokens: Histograms,
    fleet: FleetGauges,
}

/// What the coordinator reports, copied at each scrape.
#[derive(Default)]
struct FleetGauges {
    running: Gauges,
    waiting: Gauges,
    kv_usage: Gauges,
    prefix_queries: Counters,
    prefix_hits: Counters,
    preemptions: Counters,
    steps: Counters,
    failed_epochs: Counters,
    integrity_failures: Counters,
    cache_config: Gauges<(Labels, CacheConfig)>,
    state: Gauges<(Labels, State)>,
}

/// 0.5 ms to 16 min, four to a decade: from the bundled model on a laptop to long answers of the large one.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.000_5, 10f64.powf(0.25), 26))
}

/// 1 to 131072 tokens.
fn tokens() -> Histogram {
    Histogram::new(exponential_buckets(1.0, 2.0, 18))
}

fn histograms(constructor: fn() -> Histogram) -> Histograms {
    Family::new_with_constructor(constructor)
}

impl Instruments {
    pub(crate) fn new(vllm_names: bool) -> Self {
        let mut instruments = Self {
            registry: Registry::default(),
            scrape: Mutex::new(()),
            answers: Family::default(),
            successes: Family::default(),
            prompt_tokens: Family::default(),
            cached_tokens: Family::default(),
            generation_tokens: Family::default(),
            reasoning_tokens: Family::default(),
            cancelled: Family::default(),
            key_requests: Family::default(),
            key_refusals: Family::default(),
            key_prompt_tokens: Family::default(),
            key_generation_tokens: Family::default(),
            key_running: Family::default(),
            first_token: histograms(seconds),
            inter_token: histograms(seconds),
            per_output_token: histograms(seconds),
            end_to_end: histograms(seconds),
            queue: histograms(seconds),
            prefill: histograms(seconds),
            decode: histograms(seconds),
            request_prompt_tokens: histograms(tokens),
            request_generation_tokens: histograms(tokens),
            fleet: FleetGauges::default(),
        };
        instruments.register(vllm_names);
        instruments
    }

    fn register(&mut self, vllm_names: bool) {
        let mut names = Names { registry: &mut self.registry, vllm_names };
        let f = &self.fleet;
        names.ours("http_requests", "Requests by route and status", &self.answers);
        names.ours("cached_prompt_tokens", "Prompt tokens taken from the prefix cache", &self.cached_tokens);
        names.ours("reasoning_tokens", "Tokens spent on reasoning", &self.reasoning_tokens);
        names.ours("cancelled_requests", "Requests whose client left", &self.cancelled);
        names.ours("key_requests", "Requests that a key's limits let through", &self.key_requests);
        names.ours("key_refusals", "Requests that a key's limits refused", &self.key_refusals);
        names.ours("key_prompt_tokens", "Prompt tokens of a key", &self.key_prompt_tokens);
        names.ours("key_generation_tokens", "Generated tokens of a key", &self.key_generation_tokens);
        names.ours("key_requests_running", "Requests of a key that are being answered", &self.key_running);
        names.ours("engine_steps", "Steps that the group has made", &f.steps);
        names.ours("failed_epochs", "Epochs that a lost, hung or differing rank ended", &f.failed_epochs);
        names.ours("integrity_failures", "Checks of the idle engine that found a leak", &f.integrity_failures);
        names.ours("group_state", "1 for the state that the group is in", &f.state);
        names.both("request_success", "Choices that ended, by reason", &self.successes);
        names.both("prompt_tokens", "Prompt tokens", &self.prompt_tokens);
        names.both("generation_tokens", "Generated tokens", &self.generation_tokens);
        names.both("time_to_first_token_seconds", "From request to first token", &self.first_token);
        names.both("inter_token_latency_seconds", "Between tokens of a choice", &self.inter_token);
        names.both("request_time_per_output_token_seconds", "Mean over a choice's tokens", &self.per_output_token);
        names.both("e2e_request_latency_seconds", "From request to last token", &self.end_to_end);
        names.both("request_queue_time_seconds", "Waiting for the first step", &self.queue);
        names.both("request_prefill_time_seconds", "From the first step to the first token", &self.prefill);
        names.both("request_decode_time_seconds", "From the first token to the last", &self.decode);
        names.both("request_prompt_tokens", "Prompt tokens of a request", &self.request_prompt_tokens);
        names.both("request_generation_tokens", "Generated tokens of a request", &self.request_generation_tokens);
        names.both("num_requests_running", "Sequences being computed", &f.running);
        names.both("num_requests_waiting", "Sequences in the queue", &f.waiting);
        names.both("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", &f.kv_usage);
        names.both("prefix_cache_queries", "Tokens looked up in the prefix cache", &f.prefix_queries);
        names.both("prefix_cache_hits", "Tokens found in the prefix cache", &f.prefix_hits);
        names.both("num_preemptions", "Sequences put back into the queue", &f.preemptions);
        names.both("cache_config_info", "Geometry of the KV cache", &f.cache_config);
        let genai = [
            ("gen_ai_server_request_duration_seconds", &self.end_to_end),
            ("gen_ai_server_time_to_first_token_seconds", &self.first_token),
            ("gen_ai_server_time_per_output_token_seconds", &self.per_output_token),
        ];
        for (name, histograms) in genai {
            self.registry.register(name, "OpenTelemetry's name of the same figure", histograms.clone());
        }
    }

    /// How often a key's limits refused a request.
    pub(crate) fn refusals_of(&self, key: &KeyLabels) -> u64 {
        let of = |limit: Limit| {
            let labels = (key.clone(), KeyRefusal { limit: limit.name() });
            self.key_refusals.get_or_create(&labels).get()
        };
        [Limit::Requests, Limit::Tokens, Limit::Concurrency].map(of).iter().sum()
    }

    /// Writes everything in the OpenMetrics text format.
    pub(crate) fn write(&self, fleet: &Fleet, served_as: Option<&str>) -> Result<String, std::fmt::Error> {
        let _one_at_a_time = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        for load in &fleet.deployments {
            self.fleet.set(load, &labels(load, served_as, NO_PROFILE), fleet.reachable);
        }
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// The profile label of requests without one, and of what concerns no single request.
pub(crate) const NO_PROFILE: &str = "none";

/// A deployment's labels.
pub(crate) fn labels(load: &DeploymentLoad, served_as: Option<&str>, profile: &str) -> Labels {
    let deployment = load.deployment.clone().unwrap_or_default();
    let name = served_as.map_or(deployment.model, str::to_owned);
    Labels {
        model_name: name.clone(),
        model_id: name,
        model_size: size_name(deployment.parameters),
        backend: deployment.backend,
        parallelism: format!("{}{}", deployment.parallelism, deployment.world_size),
        profile: profile.to_owned(),
    }
}

/// A number of weights as people write it: `21b`, `6m`.
pub(crate) fn size_name(parameters: u64) -> String {
    match parameters {
        0 => "unknown".to_owned(),
        1..1_000_000 => format!("{}k", (parameters / 1000).max(1)),
        1_000_000..1_000_000_000 => format!("{}m", (parameters + 500_000) / 1_000_000),
        _ => format!("{}b", (parameters + 500_000_000) / 1_000_000_000),
    }
}

impl FleetGauges {
    fn set(&self, load: &DeploymentLoad, labels: &Labels, reachable: bool) {
        let totals = load.totals.unwrap_or_default();
        self.running.get_or_create(labels).set(f64::from(load.running));
        self.waiting.get_or_create(labels).set(f64::from(load.waiting));
        let usage = if load.kv_blocks == 0 { 0.0 } else { load.kv_blocks_used as f64 / load.kv_blocks as f64 };
        self.kv_usage.get_or_create(labels).set(usage);
        let counters = [
            (&self.prefix_queries, totals.prefix_cache_queries),
            (&self.prefix_hits, totals.prefix_cache_hits),
            (&self.preemptions, totals.preemptions),
            (&self.steps, totals.steps),
            (&self.failed_epochs, totals.failed_epochs),
            (&self.integrity_failures, totals.integrity_failures),
        ];
        for (counter, total) in counters {
            // The coordinator counts; here its total is only passed on.
            counter.get_or_create(labels).inner().store(total, Ordering::Relaxed);
        }
        self.cache_config.clear();
        let block_size = load.deployment.as_ref().map_or(0, |deployment| deployment.block_size);
        let config = CacheConfig { block_size, num_gpu_blocks: load.kv_blocks };
        self.cache_config.get_or_create(&(labels.clone(), config)).set(1.0);
        self.state.clear();
        let state = if reachable { state_name(load.state()) } else { "unreachable" };
        self.state.get_or_create(&(labels.clone(), State { state })).set(1.0);
    }
}

/// Registers metrics under our name, and under vLLM's.
struct Names<'r> {
    registry: &'r mut Registry,
    vllm_names: bool,
}

impl Names<'_> {
    fn ours(&mut self, name: &str, help: &str, metric: &(impl Metric + Clone)) {
        self.registry.register(format!("phalanx_{name}"), help, metric.clone());
    }

    fn both(&mut self, name: &str, help: &str, metric: &(impl Metric + Clone)) {
        self.ours(name, help, metric);
        if self.vllm_names {
            self.registry.register(format!("vllm:{name}"), help, metric.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_written_as_people_do() {
        let sizes = [0, 500, 6_400_000, 20_914_757_184, 116_829_156_672].map(size_name);
        assert_eq!(sizes, ["unknown", "1k", "6m", "21b", "117b"]);
    }

    #[test]
    fn a_metric_appears_under_both_names_with_the_same_value() {
        let instruments = Instruments::new(true);
        let labels = Labels { model_id: "nano".into(), model_name: "nano".into(), ..Labels::default() };
        instruments.prompt_tokens.get_or_create(&labels).inc_by(7);
        let text = instruments.write(&Fleet::default(), None).unwrap();
        for name in ["phalanx_prompt_tokens_total", "vllm:prompt_tokens_total"] {
            assert!(text.contains(&format!("{name}{{model_id=\"nano\",model_name=\"nano\"")), "{text}");
        }
        assert!(text.ends_with("# EOF\n"));
        assert!(!Instruments::new(false).write(&Fleet::default(), None).unwrap().contains("vllm:"));
    }
}
