//! The public door: tokens in, tokens out.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use futures::Stream;
use phalanx_proto::{
    fault::{Fault, FaultKind},
    trace,
    v1::{self, generate_event::Event, inference_server::Inference},
};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, metadata::MetadataMap};
use tracing::{Span, field, info_span};

use super::{Groups, find_group, request, watch};
use crate::group::{ClientItem, Message, Submission};

/// Items that wait for a client to read them; more are merged by the group's task.
const STREAM_ITEMS: usize = 64;
/// Length of a W3C `traceparent`.
const TRACEPARENT_BYTES: usize = 55;

/// `phalanx.v1.Inference`.
#[derive(Debug)]
pub(crate) struct InferenceService {
    pub groups: Groups,
}

#[tonic::async_trait]
impl Inference for InferenceService {
    type GenerateStream = GenerateStream;
    type WatchStream = watch::CapacityStream;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let (metadata, _, message) = request.into_parts();
        let group = find_group(&self.groups, &message.model)?;
        let model = group.deployment.config.served_model_name.as_str();
        let span = info_span!(
            "coordinator.generate",
            request_id = field::Empty,
            model,
            prompt_tokens = message.prompt.len(),
            completion_tokens = field::Empty,
            finish_reason = field::Empty,
        );
        let traceparent = traceparent(&span, &metadata);
        let request = request::check(message, &group.deployment, traceparent)?;
        span.record("request_id", request.request_id.as_str());
        let (events, items) = mpsc::channel(STREAM_ITEMS);
        let submit = |reply| Message::Generate(Box::new(Submission { request, events, span: span.clone(), reply }));
        group.ask(submit).await??;
        Ok(Response::new(GenerateStream { items, ended: false }))
    }

    async fn abort(&self, request: Request<v1::AbortRequest>) -> Result<Response<v1::AbortResponse>, Status> {
        let request_id = request.into_inner().request_id;
        let mut aborted = false;
        for group in self.groups.iter() {
            let request_id = request_id.clone();
            aborted |= group.ask(|reply| Message::Abort { request_id, reply }).await?;
        }
        Ok(Response::new(v1::AbortResponse { aborted }))
    }

    async fn models(&self, _: Request<v1::ModelsRequest>) -> Result<Response<v1::ModelsResponse>, Status> {
        let deployments = self.groups.iter().filter_map(|group| group.load.borrow().deployment.clone()).collect();
        Ok(Response::new(v1::ModelsResponse { deployments }))
    }

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Ok(Response::new(watch::capacity(&self.groups, request.get_ref())))
    }
}

/// Makes `span` a child of the caller's and names it for the ranks. Without a tracer here, the ranks' spans become
/// children of the caller's own.
fn traceparent(span: &Span, metadata: &MetadataMap) -> String {
    let caller = trace::extract(metadata);
    trace::set_parent(span, caller);
    let own = trace::traceparent_of(span);
    if own.is_empty() && caller.len() == TRACEPARENT_BYTES { caller.to_owned() } else { own }
}

/// One request's events. Ends after the terminal one; dropping it cancels the request.
#[derive(Debug)]
pub(crate) struct GenerateStream {
    items: mpsc::Receiver<ClientItem>,
    ended: bool,
}

impl Stream for GenerateStream {
    type Item = ClientItem;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<ClientItem>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let item = std::task::ready!(self.items.poll_recv(context)).unwrap_or_else(|| {
            let text = "the request was cancelled because its stream was not read, or the coordinator ended";
            Err(Fault::new(FaultKind::Draining, text).into())
        });
        self.ended = matches!(item, Err(_) | Ok(v1::GenerateEvent { event: Some(Event::Finished(_)) }));
        Poll::Ready(Some(item))
    }
}
