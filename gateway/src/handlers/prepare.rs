//! From checked parameters to a request of the coordinator: profile, model, limits, sampling.

use std::sync::Arc;

use futures::future::try_join_all;
use http::{HeaderMap, HeaderName, HeaderValue};
use phalanx_proto::{
    trace,
    v1::{self, GenerateRequest, Sampling},
};
use tokio::time::timeout_at;
use uuid::Uuid;

use super::faults::api_error;
use crate::{
    access::{Tenant, salt_of},
    app::{App, Served},
    frame::Identity,
    instruments::{NO_PROFILE, labels},
    meter::{Meter, request_span},
    openai::{error::ApiError, params::Params},
    profiles::ReasoningEffort,
    upstream::Generation,
};

const PROFILE: HeaderName = HeaderName::from_static("x-phalanx-profile");
const IGNORED: HeaderName = HeaderName::from_static("x-phalanx-ignored-parameters");
/// Longest list of ignored parameters in a header, in bytes.
const MAX_IGNORED: usize = 1024;

/// A request whose profile has been applied and whose model is known.
pub(crate) struct Prepared {
    pub(crate) params: Params,
    pub(crate) served: Served,
    /// The answer's id: `chatcmpl-…`.
    pub(crate) id: String,
    pub(crate) seed: u64,
    /// Of the profile.
    pub(crate) reasoning_effort: Option<ReasoningEffort>,
    tenant: Option<Arc<Tenant>>,
    profile: Option<String>,
    /// Of the profile; unlike the request's own it gives way to the context.
    profile_max_tokens: Option<u32>,
}

/// What one choice asks of the coordinator beyond the shared parameters.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ask {
    /// Place of the choice in the answer.
    pub(crate) index: u32,
    /// Place among the choices of its prompt.
    pub(crate) choice: u32,
    pub(crate) max_tokens: Option<u32>,
    pub(crate) logprobs: Option<u32>,
    pub(crate) prompt_logprobs: Option<u32>,
}

impl Prepared {
    /// Applies the profile and finds the model.
    ///
    /// # Errors
    /// An unknown profile or model, one that the key may not use, or none that is known yet.
    pub(crate) fn new(app: &App, identity: &Identity, mut params: Params, id_prefix: &str) -> Result<Self, ApiError> {
        let unknown = |known: Vec<&str>| {
            let name = params.profile.clone().unwrap_or_default();
            ApiError::invalid_value("profile", format!("'{name}' is not one of {}", known.join(", ")))
        };
        let selected = app.config.profiles.select(params.profile.as_deref()).map_err(unknown)?;
        let (name, profile) = selected.map(|(name, profile)| (name.to_owned(), profile.clone())).unzip();
        let profile = profile.unwrap_or_default();
        profile.fill(&mut params.sampling);
        params.priority = params.priority.or(profile.priority);
        let model = params.model.clone().or(profile.model);
        let seed = params.sampling.seed.or(app.config.seed);
        let seed = seed.map_or_else(|| Uuid::new_v4().as_u64_pair().0, i64::cast_unsigned);
        Ok(Self {
            served: app.model(model.as_deref(), identity.tenant.as_deref())?,
            tenant: identity.tenant.clone(),
            id: format!("{id_prefix}-{}", Uuid::new_v4().simple()),
            seed,
            reasoning_effort: profile.reasoning_effort,
            profile: name,
            profile_max_tokens: profile.max_tokens,
            params,
        })
    }

    /// How many tokens may be generated after a prompt; `None` is the rest of the context.
    ///
    /// # Errors
    /// When the prompt alone, or with what was asked for, exceeds the context. `param` is what the prompt is called.
    pub(crate) fn max_tokens(&self, prompt_tokens: usize, param: &str) -> Result<Option<u32>, ApiError> {
        let context = self.served.load.deployment.as_ref().map_or(0, |deployment| deployment.max_model_len);
        let prompt = u32::try_from(prompt_tokens).unwrap_or(u32::MAX);
        let begin = format!("This model's maximum context length is {context} tokens");
        let rest = context.saturating_sub(prompt);
        if rest == 0 {
            let text = format!("{begin}, but the {param} alone have {prompt}; at least one must be left to answer.");
            return Err(ApiError::context_length(param, text));
        }
        let limit = match (self.params.max_tokens, self.profile_max_tokens) {
            (Some(asked), _) if asked > rest => {
                let text = format!("{begin}, but {prompt} in the {param} and {asked} to generate were asked for.");
                return Err(ApiError::context_length(param, text));
            }
            (Some(asked), _) => Some(asked),
            (None, profile) => profile.map(|most| most.min(rest)),
        };
        let least = self.params.sampling.min_tokens;
        if least > limit.unwrap_or(rest) {
            let text = format!("{least} is more than may be generated, {}", limit.unwrap_or(rest));
            return Err(ApiError::invalid_value("min_tokens", text));
        }
        Ok(limit)
    }

    /// One choice as the coordinator takes it. `stops` are the model's own ends.
    pub(crate) fn request(&self, prompt: Vec<u32>, stops: &[u32], ask: Ask) -> GenerateRequest {
        let deployment = self.served.load.deployment.clone().unwrap_or_default();
        let mut stop_token_ids = self.params.stop_token_ids.clone();
        stop_token_ids.extend(stops.iter().chain(&deployment.eos_token_ids));
        stop_token_ids.sort_unstable();
        stop_token_ids.dedup();
        GenerateRequest {
            request_id: format!("{}-{}", self.id, ask.index),
            model: deployment.model,
            prompt,
            max_tokens: ask.max_tokens,
            stop_token_ids,
            sampling: Some(self.sampling(ask)),
            priority: self.params.priority.unwrap_or(0),
            cache_salt: self.cache_salt(),
            resume: Vec::new(),
            tenant: self.tenant.as_ref().map(|tenant| v1::Tenant { id: tenant.name.clone(), weight: tenant.weight }),
        }
    }

    /// Tenants share no cached prefixes: the time to the first token would tell one what another has asked.
    fn cache_salt(&self) -> String {
        let asked = &self.params.cache_salt;
        self.tenant.as_ref().map_or_else(|| asked.clone(), |tenant| salt_of(&tenant.name, asked))
    }

    fn sampling(&self, ask: Ask) -> Sampling {
        let params = &self.params.sampling;
        Sampling {
            temperature: params.temperature,
            top_p: params.top_p,
            top_k: params.top_k.unwrap_or(0),
            min_p: params.min_p.unwrap_or(0.0),
            presence_penalty: params.presence_penalty.unwrap_or(0.0),
            frequency_penalty: params.frequency_penalty.unwrap_or(0.0),
            repetition_penalty: params.repetition_penalty,
            logit_bias: params.logit_bias.clone(),
            min_tokens: params.min_tokens,
            ignore_eos: params.ignore_eos,
            seed: Some(self.seed),
            choice: ask.choice,
            logprobs: ask.logprobs,
            prompt_logprobs: ask.prompt_logprobs,
        }
    }

    /// What the request is measured with, and its span below the client's.
    pub(crate) fn meter(&self, app: &App, identity: &Identity, operation: &'static str, choices: usize) -> Meter {
        let span = request_span(operation, &self.served.name, &self.id, &self.params);
        if !identity.traceparent.is_empty() {
            trace::set_parent(&span, &identity.traceparent);
        }
        let profile = self.profile.as_deref().unwrap_or(NO_PROFILE);
        let labels = labels(&self.served.load, app.served_as(), profile);
        let meter =
            Meter::new(Arc::clone(&app.instruments), Arc::clone(&app.stats), labels, choices, span, identity.arrived);
        meter.charged_to(self.tenant.clone())
    }

    /// The headers that say what applied and what did not.
    pub(crate) fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if let Some(value) = self.profile.as_deref().and_then(|name| HeaderValue::from_str(name).ok()) {
            headers.insert(PROFILE, value);
        }
        // Names of unknown parameters are the client's, so they may hold anything.
        let names = self.params.ignored.iter().map(|name| name.escape_default().to_string());
        let mut list = names.collect::<Vec<_>>().join(", ");
        list.truncate(MAX_IGNORED);
        if let (false, Ok(value)) = (list.is_empty(), HeaderValue::try_from(list)) {
            headers.insert(IGNORED, value);
        }
        headers
    }
}

/// Submits every choice of an answer. `prompt` is what its endpoint calls the prompt.
///
/// # Errors
/// The first fault of any of them, or the deadline; after either none of the others goes on.
pub(crate) async fn start_all(
    app: &App,
    requests: impl Iterator<Item = GenerateRequest>,
    meter: &mut Meter,
    identity: &Identity,
    prompt: &str,
) -> Result<Vec<Generation>, ApiError> {
    let span = meter.span().clone();
    let starts = requests.map(|request| Generation::start(Arc::clone(&app.upstream), request, span.clone()));
    let started = match timeout_at(identity.deadline.at, try_join_all(starts)).await {
        Ok(started) => started.map_err(|fault| api_error(&fault, &identity.id, prompt)),
        Err(_) => Err(ApiError::deadline(identity.deadline.ms)),
    };
    started.inspect_err(|error| meter.fail(error))
}
