//! A coordinator that plays scripted token streams over real gRPC.

use std::{
    collections::HashMap,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex},
};

use futures::Stream;
use phalanx_proto::{
    fault::{Fault, FaultKind},
    v1::{
        AbortRequest, AbortResponse, Admitted, Capacity, Deployment, DeploymentLoad, FinishReason, Finished,
        GenerateEvent, GenerateRequest, GroupState, ModelsRequest, ModelsResponse, RankState, Token, TokenChunk,
        TopLogprob, Totals, WatchRequest,
        generate_event::Event,
        inference_server::{Inference, InferenceServer},
    },
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tokio_stream::{
    StreamExt,
    wrappers::{ReceiverStream, TcpListenerStream, WatchStream},
};
use tonic::{Request, Response, Status};

use super::golden::LINES;

pub(crate) const MODEL: &str = "nano";
pub(crate) const MAX_MODEL_LEN: u32 = 1024;
pub(crate) const CACHED_TOKENS: u32 = 16;

/// How the next streams behave.
#[derive(Clone)]
pub(crate) struct Behaviour {
    /// Tokens of one chunk.
    pub(crate) group: usize,
    /// Played instead of what the prompt's golden line says.
    pub(crate) answer: Option<Vec<u32>>,
    /// Answered to every request.
    pub(crate) refuse: Option<Fault>,
    /// The next stream breaks after this many tokens; the ones after it do not.
    pub(crate) fail_once: Option<(usize, Fault)>,
    /// Streams stand still after this many tokens.
    pub(crate) hold_at: Option<usize>,
}

pub(crate) struct Coordinator {
    scripts: HashMap<Vec<u32>, Vec<u32>>,
    pub(crate) behaviour: Mutex<Behaviour>,
    /// What was asked, in order.
    pub(crate) requests: Mutex<Vec<GenerateRequest>>,
    /// Streams that their client left.
    pub(crate) cancelled: watch::Sender<usize>,
    pub(crate) capacity: watch::Sender<Capacity>,
}

pub(crate) fn capacity(state: GroupState) -> Capacity {
    let deployment = Deployment {
        model: MODEL.to_owned(),
        world_size: 2,
        parallelism: "tp".to_owned(),
        backend: "cpu".to_owned(),
        max_model_len: MAX_MODEL_LEN,
        vocab_size: 3072,
        parameters: 6_400_000,
        eos_token_ids: vec![3055, 3052, 3065],
        block_size: 16,
    };
    let totals = Totals { prefix_cache_queries: 640, prefix_cache_hits: 320, preemptions: 3, ..Totals::default() };
    let load = DeploymentLoad {
        deployment: Some(deployment),
        state: state as i32,
        epoch: 4,
        running: 2,
        waiting: 5,
        max_waiting: 64,
        kv_blocks_used: 25,
        kv_blocks: 100,
        totals: Some(totals),
        ranks: vec![RankState { rank: 0, host: "here".into(), ..RankState::default() }],
        ..DeploymentLoad::default()
    };
    Capacity { deployments: vec![load] }
}

impl Coordinator {
    /// Serves on a port of its own for as long as the test runs.
    pub(crate) async fn start() -> (Arc<Self>, SocketAddr) {
        let coordinator = Arc::new(Self {
            scripts: LINES.iter().map(|line| (line.prompt_ids.clone(), line.completion_ids.clone())).collect(),
            behaviour: Mutex::new(Behaviour { group: 1, answer: None, refuse: None, fail_once: None, hold_at: None }),
            requests: Mutex::default(),
            cancelled: watch::Sender::new(0),
            capacity: watch::Sender::new(capacity(GroupState::Ready)),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let service = InferenceServer::from_arc(Arc::clone(&coordinator));
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        (coordinator, address)
    }

    pub(crate) fn behave(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.behaviour.lock().unwrap());
    }

    /// The last request.
    pub(crate) fn asked(&self) -> GenerateRequest {
        self.requests.lock().unwrap().last().unwrap().clone()
    }

    pub(crate) fn asked_count(&self) -> usize {
        self.requests.lock().unwrap().len()
    }

    fn answer_to(&self, request: &GenerateRequest, behaviour: &Behaviour) -> Result<Vec<u32>, Status> {
        let scripted = behaviour.answer.as_ref().or_else(|| self.scripts.get(&request.prompt));
        let unknown = || Fault::invalid("prompt", format!("no script for the prompt {:?}", request.prompt));
        scripted.cloned().ok_or_else(|| unknown().into())
    }
}

/// Plays one stream.
struct Player {
    request: GenerateRequest,
    answer: Vec<u32>,
    behaviour: Behaviour,
    sender: mpsc::Sender<Result<GenerateEvent, Status>>,
}

impl Player {
    /// Whether the client stayed to the end.
    async fn play(self) -> bool {
        let prompt_tokens = self.request.prompt.len() as u32;
        let admitted = Admitted {
            request_id: self.request.request_id.clone(),
            prompt_tokens,
            cached_tokens: CACHED_TOKENS,
            queued_us: 1500,
        };
        if !self.send(Event::Admitted(admitted)).await {
            return false;
        }
        let (tokens, reason) = self.tokens();
        let resumed = self.request.resume.len();
        let prompt = self.prompt_logprobs();
        if !prompt.is_empty() && !self.send(Event::Tokens(TokenChunk { tokens: Vec::new(), prompt })).await {
            return false;
        }
        for (at, group) in tokens[resumed..].chunks(self.behaviour.group).enumerate() {
            let sent = at * self.behaviour.group;
            if self.behaviour.hold_at.is_some_and(|most| sent >= most) {
                self.sender.closed().await;
                return false;
            }
            if let Some((after, fault)) = &self.behaviour.fail_once
                && sent >= *after
            {
                let _ = self.sender.send(Err(fault.clone().into())).await;
                return true;
            }
            let first = resumed + sent;
            let tokens = group.iter().enumerate().map(|(offset, &id)| self.token(id, first + offset));
            if !self.send(Event::Tokens(TokenChunk { tokens: tokens.collect(), prompt: Vec::new() })).await {
                return false;
            }
        }
        let completion_tokens = tokens.len() as u32;
        let cached_tokens = CACHED_TOKENS;
        let reason = reason as i32;
        self.send(Event::Finished(Finished { reason, prompt_tokens, completion_tokens, cached_tokens })).await
    }

    fn tokens(&self) -> (Vec<u32>, FinishReason) {
        let ignores = self.request.sampling.as_ref().unwrap().ignore_eos;
        let stop = |id: &u32| !ignores && self.request.stop_token_ids.contains(id);
        let end = self.answer.iter().position(stop).map_or(self.answer.len(), |at| at + 1);
        match self.request.max_tokens {
            Some(most) if (most as usize) < end => (self.answer[..most as usize].to_vec(), FinishReason::Length),
            _ => (self.answer[..end].to_vec(), FinishReason::Stop),
        }
    }

    /// A token whose log-probability tells its place: -0.1, -0.2, …, which neither f32 nor f64 has exactly.
    fn token(&self, id: u32, place: usize) -> Token {
        let logprob = -(place as f32 + 1.0) / 10.0;
        let wanted = self.request.sampling.as_ref().unwrap().logprobs;
        let top = (0..wanted.unwrap_or(0)).map(|rank| TopLogprob { id: id + rank, logprob: logprob - rank as f32 });
        Token { id, logprob: wanted.map(|_| logprob), top: top.collect() }
    }

    fn prompt_logprobs(&self) -> Vec<Token> {
        if self.request.sampling.as_ref().unwrap().prompt_logprobs.is_none() {
            return Vec::new();
        }
        self.request.prompt.iter().enumerate().skip(1).map(|(place, &id)| self.token(id, place)).collect()
    }

    async fn send(&self, event: Event) -> bool {
        self.sender.send(Ok(GenerateEvent { event: Some(event) })).await.is_ok()
    }
}

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Inference for Coordinator {
    type GenerateStream = Streamed<GenerateEvent>;
    type WatchStream = Streamed<Capacity>;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let request = request.into_inner();
        self.requests.lock().unwrap().push(request.clone());
        let behaviour = self.behaviour.lock().unwrap().clone();
        self.behave(|behaviour| behaviour.fail_once = None);
        if let Some(fault) = behaviour.refuse {
            return Err(fault.into());
        }
        let answer = self.answer_to(&request, &behaviour)?;
        let (sender, receiver) = mpsc::channel(1);
        let cancelled = self.cancelled.clone();
        tokio::spawn(async move {
            if !(Player { request, answer, behaviour, sender }).play().await {
                cancelled.send_modify(|count| *count += 1);
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn abort(&self, _: Request<AbortRequest>) -> Result<Response<AbortResponse>, Status> {
        Err(Fault::new(FaultKind::Unsupported, "the gateway cancels by dropping its stream").into())
    }

    async fn models(&self, _: Request<ModelsRequest>) -> Result<Response<ModelsResponse>, Status> {
        Err(Fault::new(FaultKind::Unsupported, "the gateway learns of models from Watch").into())
    }

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let stream = WatchStream::new(self.capacity.subscribe()).map(Ok);
        Ok(Response::new(Box::pin(stream)))
    }
}
