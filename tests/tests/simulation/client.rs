//! One request as the gateway makes it: a stream of tokens that is taken up again where it was.

use std::time::Duration;

use phalanx_proto::{
    fault::{Fault, FaultKind},
    v1::{self, generate_event::Event, inference_client::InferenceClient},
};
use tokio::time::{Instant, sleep};
use tonic::transport::{Channel, Endpoint};

use crate::network::{COORDINATOR, PORT, dial};

/// As the gateway's.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const PING: Duration = Duration::from_secs(10);
/// Longest time without any news before a request is given up.
const STALL: Duration = Duration::from_secs(200);
/// First and longest pause between attempts.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// What is asked for.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    pub(crate) id: String,
    pub(crate) prompt: Vec<u32>,
    pub(crate) stop_token_ids: Vec<u32>,
    /// When it is asked for.
    pub(crate) after: Duration,
    /// The client leaves once it has so many tokens.
    pub(crate) leaves_after: Option<usize>,
}

/// How it ended.
#[derive(Debug)]
pub(crate) enum End {
    Finished(v1::Finished),
    Left,
    Failed(Fault),
}

/// What was heard.
#[derive(Debug)]
pub(crate) struct Heard {
    pub(crate) tokens: Vec<u32>,
    /// Streams that were taken up again after tokens had come.
    pub(crate) resumes: usize,
    pub(crate) end: End,
}

/// A connection to the coordinator, as soon as there is one.
pub(crate) async fn connect() -> Result<InferenceClient<Channel>, Fault> {
    let endpoint = Endpoint::from_shared(format!("http://{COORDINATOR}:{PORT}")).unwrap();
    let endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(PING)
        .keep_alive_timeout(PING)
        .keep_alive_while_idle(true);
    let channel = dial(endpoint).await.map_err(|error| Fault::new(FaultKind::NotReady, error.to_string()))?;
    Ok(InferenceClient::new(channel))
}

/// Asks, and asks again from where it was, until it has ended.
pub(crate) async fn ask(wish: &Wish) -> Heard {
    sleep(wish.after).await;
    let (mut tokens, mut attempts, mut resumes) = (Vec::new(), 0, 0);
    let (mut pause, mut news) = (PAUSE.0, Instant::now());
    loop {
        let before = tokens.len();
        let fault = match attempt(wish, attempts, &mut tokens).await {
            Ok(end) => return Heard { tokens, resumes, end },
            Err(fault) => fault,
        };
        if tokens.len() > before {
            (pause, news) = (PAUSE.0, Instant::now());
        }
        let passing = fault.kind.is_transient() || fault.kind == FaultKind::StaleEpoch;
        if !passing || news.elapsed() > STALL {
            return Heard { tokens, resumes, end: End::Failed(fault) };
        }
        attempts += 1;
        resumes += usize::from(!tokens.is_empty());
        sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

/// One stream. Its tokens are appended; an error is what ended it before its end.
async fn attempt(wish: &Wish, number: usize, tokens: &mut Vec<u32>) -> Result<End, Fault> {
    let mut client = connect().await?;
    let request = v1::GenerateRequest {
        request_id: format!("{}-{number}", wish.id),
        prompt: wish.prompt.clone(),
        stop_token_ids: wish.stop_token_ids.clone(),
        sampling: Some(v1::Sampling { temperature: Some(0.0), seed: Some(0), ..Default::default() }),
        resume: tokens.clone(),
        ..Default::default()
    };
    let mut stream = client.generate(request).await.map_err(|status| Fault::from(&status))?.into_inner();
    loop {
        if wish.leaves_after.is_some_and(|most| tokens.len() >= most) {
            return Ok(End::Left);
        }
        match stream.message().await {
            Ok(Some(v1::GenerateEvent { event: Some(Event::Tokens(chunk)) })) => {
                tokens.extend(chunk.tokens.iter().map(|token| token.id));
            }
            Ok(Some(v1::GenerateEvent { event: Some(Event::Finished(finished)) })) => {
                return match stream.message().await {
                    Ok(None) | Err(_) => Ok(End::Finished(finished)),
                    Ok(Some(more)) => Err(Fault::new(FaultKind::Internal, format!("{more:?} follows the end"))),
                };
            }
            Ok(Some(_)) => {}
            Ok(None) => return Err(Fault::new(FaultKind::WorkerLost, "the stream broke off")),
            Err(status) => return Err(Fault::from(&status)),
        }
    }
}
