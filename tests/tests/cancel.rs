//! Cancelling at every phase leaves nothing behind.

use std::time::{Duration, Instant};

use phalanx_proto::v1::{
    AbortRequest, GenerateRequest, GroupState, Sampling, WatchRequest, inference_client::InferenceClient,
};
use phalanx_tests::{cluster::Cluster, full_size};
use tonic::transport::Channel;

/// Requests that are cancelled, at CI's size and at full size.
const CANCELS: (u64, u64) = (2000, 20_000);
/// More than run at once, so that some are cancelled while they are queued.
const STREAMS: u64 = 40;

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Starts a completion and cancels it after a number of tokens that differs from request to request.
async fn one(mut client: InferenceClient<Channel>, index: u64) {
    let dice = mix(index + 1);
    let prompt_len = 1 + dice % 200;
    let max_tokens = 1 + (dice >> 16) % 24;
    // 0: at once (queued or prefill), max_tokens: the last step.
    let cancel_after = (dice >> 32) % (max_tokens + 1);
    let request_id = format!("cancel-{index}");
    let request = GenerateRequest {
        request_id: request_id.clone(),
        prompt: (0..prompt_len).map(|i| (mix(dice ^ i) % 3000) as u32).collect(),
        max_tokens: Some(max_tokens as u32),
        sampling: Some(Sampling { temperature: Some(0.0), ignore_eos: true, ..Default::default() }),
        ..Default::default()
    };
    let mut stream = client.generate(request).await.unwrap().into_inner();
    let mut seen = 0;
    while seen < cancel_after {
        let Some(event) = stream.message().await.unwrap() else { break };
        if let Some(phalanx_proto::v1::generate_event::Event::Tokens(chunk)) = event.event {
            seen += chunk.tokens.len() as u64;
        }
    }
    if dice & 1 == 0 {
        // It may have ended a moment before; both answers are right.
        client.abort(AbortRequest { request_id }).await.unwrap();
        while let Ok(Some(_)) = stream.message().await {}
    }
    drop(stream);
}

#[tokio::test(flavor = "multi_thread")]
async fn random_cancels_at_every_phase_leave_no_block_behind() {
    let (cancels, started) = (if full_size() { CANCELS.1 } else { CANCELS.0 }, Instant::now());
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let args = ["-tp".to_owned(), "2".into(), "--grpc-port".into(), port.clone(), "--max-num-seqs".into(), "16".into()];
    let args: Vec<String> = args.into_iter().chain(["--no-enable-prefix-caching".to_owned()]).collect();
    let cluster =
        tokio::task::spawn_blocking(move || Cluster::start(&args.iter().map(String::as_str).collect::<Vec<_>>()));
    let _cluster = cluster.await.unwrap();
    let client = InferenceClient::connect(format!("http://127.0.0.1:{port}")).await.unwrap();
    let tasks = (0..STREAMS).map(|stream| {
        let client = client.clone();
        tokio::spawn(async move {
            for index in (stream..cancels).step_by(STREAMS as usize) {
                one(client.clone(), index).await;
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    let mut watch = client.clone().watch(WatchRequest { interval_ms: 20 }).await.unwrap().into_inner();
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let load = watch.message().await.unwrap().unwrap().deployments.remove(0);
        let totals = load.totals.unwrap_or_default();
        // The engine's books are checked whenever it has been idle for a moment.
        if (load.running, load.waiting, load.kv_blocks_used) == (0, 0, 0) && totals.integrity_checks > 0 {
            assert_eq!(totals.integrity_failures, 0, "{load:?}");
            assert_eq!((load.state(), load.epoch), (GroupState::Ready, 1), "no rank was lost on the way: {load:?}");
            println!("{cancels} cancels in {:.1} s: 0 blocks and 0 slots left", started.elapsed().as_secs_f64());
            return;
        }
        assert!(Instant::now() < deadline, "left behind: {load:?}");
    }
}
