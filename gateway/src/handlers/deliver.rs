//! From steps to one body, or to a stream of server-sent events.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Json,
    body::Body,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures::StreamExt;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use serde::Serialize;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tracing::{Instrument, warn};

use super::replies::{Replies, Step};
use crate::{
    app::App,
    frame::Deadline,
    openai::{
        error::ApiError,
        params::StreamOptions,
        reply::{Envelope, FinishReason, Usage},
    },
    stream::Assembler,
};

const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";
const DONE: &[u8] = b"data: [DONE]\n\n";

/// How an endpoint writes its answers.
pub(crate) trait Dialect: Send + 'static {
    /// What makes its pieces.
    type Assembler: Assembler;
    /// A choice of a chunk.
    type Chunk: Serialize + Send;
    /// A choice of a whole body.
    type Whole: Serialize + Send;

    /// `object` of a chunk, and of a whole body.
    const OBJECTS: (&'static str, &'static str);

    /// What comes before a choice's first piece.
    fn opening(&self, index: u32) -> Option<Self::Chunk>;

    /// One piece. The ids are those of all tokens since the last chunk.
    fn chunk(&self, index: u32, piece: PieceOf<Self>, token_ids: Option<Vec<u32>>) -> Self::Chunk;

    /// What comes after a choice's last piece.
    fn closing(&self, index: u32, reason: FinishReason, token_ids: Option<Vec<u32>>) -> Self::Chunk;

    /// All pieces of a choice.
    fn whole(&self, index: u32, pieces: Vec<PieceOf<Self>>, end: End) -> Self::Whole;
}

/// What a dialect's pieces are.
pub(crate) type PieceOf<D> = <<D as Dialect>::Assembler as Assembler>::Piece;

/// The end of a choice.
pub(crate) struct End {
    pub(crate) reason: FinishReason,
    /// If they were asked for.
    pub(crate) token_ids: Option<Vec<u32>>,
}

/// What the answer's frame holds.
pub(crate) struct Frame {
    pub(crate) id: String,
    pub(crate) deadline: Deadline,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) choices: usize,
    pub(crate) return_token_ids: bool,
    /// In the body, or in the first chunk.
    pub(crate) prompt_token_ids: Option<Vec<u32>>,
    pub(crate) headers: HeaderMap,
}

impl Frame {
    fn envelope<C>(&self, object: &'static str, choices: Vec<C>) -> Envelope<C> {
        let Self { id, created, model, .. } = self;
        let (id, created, model) = (id.clone(), *created, model.clone());
        Envelope { id, object, created, model, choices, usage: None, prompt_token_ids: None }
    }
}

/// Why nothing more is awaited.
async fn interruption(app: &App, deadline: Deadline) -> ApiError {
    tokio::select! {
        () = app.deadline.cancelled() => {
            ApiError::unavailable("draining", "The gateway is shutting down; the answer was cut.")
        }
        () = sleep_until(deadline.at) => ApiError::deadline(deadline.ms),
    }
}

/// Waits for the whole answer.
///
/// # Errors
/// What went wrong on the way; nothing of the answer is kept then.
pub(crate) async fn whole<D: Dialect>(
    app: &App,
    mut replies: Replies<D::Assembler>,
    dialect: &D,
    frame: Frame,
) -> Result<Response, ApiError> {
    let collected = async {
        let mut all: Vec<_> = (0..frame.choices).map(|_| (Vec::new(), Vec::new(), FinishReason::Stop)).collect();
        while let Some(step) = replies.next().await {
            let step = step?;
            let (pieces, token_ids, reason) = &mut all[step.index];
            pieces.extend(step.pieces);
            token_ids.extend(step.token_ids);
            *reason = step.finish.unwrap_or(*reason);
        }
        Ok(all)
    };
    let result = tokio::select! {
        result = collected => result,
        error = interruption(app, frame.deadline) => Err(error),
    };
    let all = result.inspect_err(|error| replies.fail(error))?;
    let usage = replies.complete();
    let whole = all.into_iter().zip(0..).map(|((pieces, token_ids, reason), index)| {
        let token_ids = frame.return_token_ids.then_some(token_ids);
        dialect.whole(index, pieces, End { reason, token_ids })
    });
    let mut body = frame.envelope(D::OBJECTS.1, whole.collect());
    body.usage = Some(usage.body());
    body.prompt_token_ids = frame.prompt_token_ids;
    Ok((frame.headers, Json(body)).into_response())
}

/// Answers with a stream of events. A task writes them, so that a client that does not read holds back nothing else.
pub(crate) fn streamed<D: Dialect>(
    app: Arc<App>,
    replies: Replies<D::Assembler>,
    dialect: D,
    frame: Frame,
    options: StreamOptions,
) -> Response {
    let (sender, receiver) = mpsc::channel(app.config.limits.stream_events);
    let headers = frame.headers.clone();
    let span = replies.span();
    let token_ids = vec![Vec::new(); frame.choices];
    let opened = vec![false; frame.choices];
    let writer = Writer { app, replies, dialect, frame, options, sender, opened, token_ids };
    tokio::spawn(writer.run().instrument(span));
    let fixed = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        // Some proxies collect whole answers unless they are told not to.
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    let body = Body::from_stream(ReceiverStream::new(receiver).map(Ok::<Bytes, Infallible>));
    (headers, fixed, body).into_response()
}

/// Writes the events of one stream.
struct Writer<D: Dialect> {
    app: Arc<App>,
    replies: Replies<D::Assembler>,
    dialect: D,
    frame: Frame,
    options: StreamOptions,
    sender: mpsc::Sender<Bytes>,
    /// Choices whose first chunk was sent.
    opened: Vec<bool>,
    /// Ids of tokens that no chunk has carried yet.
    token_ids: Vec<Vec<u32>>,
}

/// The client left, or does not read.
struct Gone;

impl<D: Dialect> Writer<D> {
    async fn run(mut self) {
        // A client that left needs no answer; dropping the replies cancels them.
        let _: Result<(), Gone> = self.write().await;
    }

    async fn write(&mut self) -> Result<(), Gone> {
        let mut quiet_since = Instant::now();
        loop {
            let step = tokio::select! {
                () = self.sender.closed() => return Err(Gone),
                step = self.replies.next() => step,
                () = sleep_until(quiet_since + self.app.config.timeouts.keep_alive) => {
                    self.send(Bytes::from_static(KEEP_ALIVE)).await?;
                    quiet_since = Instant::now();
                    continue;
                }
                error = interruption(&self.app, self.frame.deadline) => Some(Err(error)),
            };
            match step {
                Some(Ok(step)) => {
                    let events = self.events(step);
                    if !events.is_empty() {
                        self.send(events.into()).await?;
                        quiet_since = Instant::now();
                    }
                }
                Some(Err(error)) => {
                    self.replies.fail(&error);
                    // No [DONE] follows: a client that reads on finds the stream broken off.
                    return self.send(event(&error.body()).into()).await;
                }
                None => return self.end().await,
            }
        }
    }

    async fn end(&mut self) -> Result<(), Gone> {
        let usage = self.replies.complete();
        let mut events = Vec::new();
        if self.options.include_usage {
            let mut last = self.frame.envelope::<D::Chunk>(D::OBJECTS.0, Vec::new());
            last.usage = Some(usage.body());
            events.extend(event(&last));
        }
        events.extend_from_slice(DONE);
        self.send(events.into()).await
    }

    /// The events of one step, one after the other.
    fn events(&mut self, step: Step<PieceOf<D>>) -> Vec<u8> {
        let place = step.index;
        let index = u32::try_from(place).unwrap_or(u32::MAX);
        let mut chunks = Vec::new();
        if !std::mem::replace(&mut self.opened[place], true) {
            chunks.extend(self.dialect.opening(index));
        }
        if self.frame.return_token_ids {
            self.token_ids[place].extend(step.token_ids);
        }
        for piece in step.pieces {
            let token_ids = self.take_ids(place);
            chunks.push(self.dialect.chunk(index, piece, token_ids));
        }
        if let Some(reason) = step.finish {
            let token_ids = self.take_ids(place);
            chunks.push(self.dialect.closing(index, reason, token_ids));
        }
        let usage = self.options.continuous_usage_stats.then(|| self.replies.usage());
        chunks.into_iter().flat_map(|chunk| self.event_of(chunk, usage)).collect()
    }

    fn take_ids(&mut self, place: usize) -> Option<Vec<u32>> {
        self.frame.return_token_ids.then(|| std::mem::take(&mut self.token_ids[place]))
    }

    fn event_of(&mut self, chunk: D::Chunk, usage: Option<Usage>) -> Vec<u8> {
        let mut envelope = self.frame.envelope(D::OBJECTS.0, vec![chunk]);
        envelope.usage = usage.map(|usage| usage.body());
        envelope.prompt_token_ids = self.frame.prompt_token_ids.take();
        event(&envelope)
    }

    /// Sends, or gives up on a client that has not read for too long.
    async fn send(&mut self, events: Bytes) -> Result<(), Gone> {
        let wait: Duration = self.app.config.timeouts.unread;
        match timeout(wait, self.sender.send(events)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Gone),
            Err(_) => {
                warn!(seconds = wait.as_secs(), "client does not read its stream");
                Err(Gone)
            }
        }
    }
}

/// One server-sent event.
fn event(data: &impl Serialize) -> Vec<u8> {
    let mut bytes = b"data: ".to_vec();
    // Writing into memory cannot fail, and none of these types has a map with keys that are not text.
    if let Err(error) = serde_json::to_writer(&mut bytes, data) {
        warn!(%error, "an event could not be written");
    }
    bytes.extend_from_slice(b"\n\n");
    bytes
}
