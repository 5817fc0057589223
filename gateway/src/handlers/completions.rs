//! `/v1/completions`: bare text, or token ids, to be continued.

use std::sync::Arc;

use axum::{Extension, body::Body, extract::State, response::Response};
use http::Request;

use super::{
    deliver::{self, Dialect, End, Frame},
    prepare::{Ask, Prepared, start_all},
    replies::{Choice, Replies},
};
use crate::{
    app::{App, unix_seconds},
    body::read_json,
    frame::Identity,
    openai::{
        completion::{CompletionRequest, Prompt},
        error::ApiError,
        reply::{FinishReason, TextChoice, TextLogprobs},
    },
    stream::{TextAssembler, TextPiece, TextSettings},
};

/// What the endpoint calls its prompt.
const PROMPT: &str = "prompt";

/// Continues prompts.
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let body = read_json(&app.config, request).await?;
    let mut asked = CompletionRequest::from_body(body)?;
    let place = app.admit()?;
    let prepared = Prepared::new(&app, &identity, std::mem::take(&mut asked.params), "cmpl")?;
    let prompts = encode(&app, std::mem::take(&mut asked.prompts), &identity.id).await?;
    let prompt_tokens = prompts.iter().map(|prompt| prompt.ids.len() as u64).sum();
    let plan = plan(&prepared, &asked, &prompts)?;
    let mut meter = prepared.meter(&app, &identity, "text_completion", plan.len());
    let requests = plan.iter().map(|(prompt, ask)| prepared.request(prompt.ids.clone(), &[], *ask));
    let generations = start_all(&app, requests, &mut meter, &identity, PROMPT).await?;
    let choices = generations.into_iter().zip(&plan).map(|(generation, (prompt, ask))| Choice {
        generation,
        assembler: TextAssembler::new(Arc::clone(app.harmony.tokenizer()), settings(&app, &prepared, &asked, prompt)),
        counts_prompt: ask.choice == 0,
        counts_tokens: !is_prompt_only(&prepared),
    });
    let replies = Replies::new(choices.collect(), prompt_tokens, meter, identity.id, PROMPT, place);
    let return_token_ids = prepared.params.return_token_ids;
    let ids = plan.iter().map(|(prompt, _)| return_token_ids.then(|| prompt.ids.clone()));
    let dialect = TextDialect { logprobs: asked.logprobs.is_some(), prompt_ids: ids.collect() };
    let frame = Frame {
        id: prepared.id.clone(),
        deadline: identity.deadline,
        created: unix_seconds(),
        model: prepared.served.name.clone(),
        choices: plan.len(),
        return_token_ids,
        prompt_token_ids: None,
        headers: prepared.headers(),
    };
    match prepared.params.stream {
        Some(options) => Ok(deliver::streamed(app, replies, dialect, frame, options)),
        None => deliver::whole(&app, replies, &dialect, frame).await,
    }
}

/// A prompt in both forms.
struct Encoded {
    text: Option<String>,
    ids: Vec<u32>,
}

async fn encode(app: &App, prompts: Vec<Prompt>, request_id: &str) -> Result<Vec<Encoded>, ApiError> {
    let tokenizer = Arc::clone(app.harmony.tokenizer());
    let encode_one = move |prompt| match prompt {
        Prompt::Text(text) => Encoded { ids: tokenizer.encode_with_special(&text), text: Some(text) },
        Prompt::Tokens(ids) => Encoded { text: None, ids },
    };
    let encoded = tokio::task::spawn_blocking(move || prompts.into_iter().map(encode_one).collect());
    encoded.await.map_err(|error| {
        // Not the panic's own words, which may quote the prompt.
        tracing::error!(request_id, panicked = error.is_panic(), "prompt could not be encoded");
        ApiError::internal(request_id)
    })
}

fn is_prompt_only(prepared: &Prepared) -> bool {
    prepared.params.max_tokens == Some(0)
}

/// Every choice of every prompt, in the order of their indices.
fn plan<'p>(
    prepared: &Prepared,
    asked: &CompletionRequest,
    prompts: &'p [Encoded],
) -> Result<Vec<(&'p Encoded, Ask)>, ApiError> {
    let mut plan = Vec::new();
    for prompt in prompts {
        let max_tokens = prepared.max_tokens(prompt.ids.len(), PROMPT)?;
        for choice in 0..prepared.params.n {
            let ask = Ask {
                index: u32::try_from(plan.len()).unwrap_or(u32::MAX),
                choice,
                // The coordinator generates at least one token; it is dropped when none was asked for.
                max_tokens: max_tokens.map(|most| most.max(1)),
                logprobs: asked.logprobs,
                prompt_logprobs: asked.logprobs.filter(|_| asked.echo),
            };
            plan.push((prompt, ask));
        }
    }
    Ok(plan)
}

fn settings(app: &App, prepared: &Prepared, asked: &CompletionRequest, prompt: &Encoded) -> TextSettings {
    let text_of = || prompt.text.clone().unwrap_or_else(|| app.harmony.tokenizer().decode(&prompt.ids));
    TextSettings {
        echo: asked.echo.then(|| (text_of(), prompt.ids.clone())),
        stop: prepared.params.stop.clone(),
        stop_tokens: prepared.params.stop_token_ids.clone(),
        skip_special_tokens: asked.skip_special_tokens,
        logprobs: asked.logprobs.is_some(),
        prompt_only: is_prompt_only(prepared),
    }
}

/// Text answers as OpenAI writes them.
struct TextDialect {
    logprobs: bool,
    /// Of each choice's prompt, when token ids were asked for.
    prompt_ids: Vec<Option<Vec<u32>>>,
}

impl Dialect for TextDialect {
    type Assembler = TextAssembler;
    type Chunk = TextChoice;
    type Whole = TextChoice;

    const OBJECTS: (&'static str, &'static str) = ("text_completion", "text_completion");

    fn opening(&self, index: u32) -> Option<TextChoice> {
        // Text has no role to open with; only the prompt's ids need a chunk of their own.
        let prompt_token_ids = self.prompt_ids.get(index as usize).cloned().flatten()?;
        Some(TextChoice { prompt_token_ids: Some(prompt_token_ids), ..self.chunk(index, TextPiece::default(), None) })
    }

    fn chunk(&self, index: u32, piece: TextPiece, token_ids: Option<Vec<u32>>) -> TextChoice {
        let TextPiece { text, logprobs } = piece;
        TextChoice { index, text, logprobs, finish_reason: None, prompt_token_ids: None, token_ids }
    }

    fn closing(&self, index: u32, reason: FinishReason, token_ids: Option<Vec<u32>>) -> TextChoice {
        TextChoice { finish_reason: Some(reason), ..self.chunk(index, TextPiece::default(), token_ids) }
    }

    fn whole(&self, index: u32, pieces: Vec<TextPiece>, end: End) -> TextChoice {
        let mut text = String::new();
        let mut logprobs = TextLogprobs::default();
        for piece in pieces {
            text.push_str(&piece.text);
            logprobs.extend(piece.logprobs.unwrap_or_default());
        }
        TextChoice {
            index,
            text,
            logprobs: self.logprobs.then_some(logprobs),
            finish_reason: Some(end.reason),
            prompt_token_ids: self.prompt_ids.get(index as usize).cloned().flatten(),
            token_ids: end.token_ids,
        }
    }
}
