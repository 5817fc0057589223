//! One trace a request, from the client's `traceparent` to every rank, and no prompt text in any span.

use std::{
    process::Command,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    trace::v1::Span,
};
use phalanx_tests::cluster::{Cluster, output_of};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};

const TRACE_ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const MARKER: &str = "zanzibar";

#[derive(Clone, Default)]
struct Receiver(Arc<Mutex<Vec<(String, Span)>>>);

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.iter().flat_map(|resource| &resource.attributes);
            let service =
                attributes.filter(|kv| kv.key == "service.name").map(|kv| format!("{:?}", kv.value)).collect();
            let service: String = service;
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.0.lock().unwrap().extend(spans.map(|span| (service.clone(), span)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_trace_leads_from_the_client_to_both_ranks() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let receiver = Receiver::default();
    let server = Server::builder().add_service(TraceServiceServer::new(receiver.clone()));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));

    let mut cluster =
        tokio::task::spawn_blocking(move || Cluster::start(&["-tp", "2", "--otlp-traces-endpoint", &endpoint]))
            .await
            .unwrap();
    let header = format!("traceparent: 00-{TRACE_ID}-00f067aa0ba902b7-01");
    let body =
        format!(r#"{{"messages": [{{"role": "user", "content": "Tell me about {MARKER}."}}], "max_tokens": 20}}"#);
    let url = format!("{}/v1/chat/completions", cluster.url);
    let (code, answer, _) = tokio::task::spawn_blocking(move || {
        output_of(Command::new("curl").args([
            "-sf",
            &url,
            "-H",
            "Content-Type: application/json",
            "-H",
            &header,
            "-d",
            &body,
        ]))
    })
    .await
    .unwrap();
    assert_eq!(code, Some(0), "{answer}");
    // Stopping sends what is still buffered.
    tokio::task::spawn_blocking(move || cluster.stop()).await.unwrap();

    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let spans = receiver.0.lock().unwrap().clone();
        let ours: Vec<_> = spans.iter().filter(|(_, span)| hex(&span.trace_id) == TRACE_ID).collect();
        let ranks = ours.iter().filter(|(service, _)| service.contains("worker")).count();
        let through =
            ["gateway", "coordinator"].iter().all(|role| ours.iter().any(|(service, _)| service.contains(role)));
        if ranks >= 2 && through {
            assert_spans(&ours);
            let text = format!("{spans:?}").to_lowercase();
            assert!(!text.contains(MARKER), "prompt text in a span");
            return;
        }
        assert!(Instant::now() < deadline, "{} spans of the trace arrived: {ours:?}", ours.len());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Each span's parent is another span of the trace or the client's.
fn assert_spans(spans: &[&(String, Span)]) {
    let ids: Vec<_> = spans.iter().map(|(_, span)| hex(&span.span_id)).chain(["00f067aa0ba902b7".into()]).collect();
    for (service, span) in spans {
        assert!(ids.contains(&hex(&span.parent_span_id)), "{service} {} has an unknown parent", span.name);
    }
    let (_, chat) = spans.iter().find(|(service, _)| service.contains("gateway")).unwrap();
    assert_eq!(chat.name, "chat nano");
    let keys: Vec<_> = chat.attributes.iter().map(|kv| kv.key.as_str()).collect();
    for key in
        ["gen_ai.operation.name", "gen_ai.request.model", "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"]
    {
        assert!(keys.contains(&key), "{key} is missing among {keys:?}");
    }
}
