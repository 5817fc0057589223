//! Logs and traces of one process. Prompts and answers appear in neither.

use anyhow::{Context, Result};
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};
use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};

use crate::cli::{LogFormat, TelemetryArgs};

/// Sends what is left of the traces when the process ends.
pub(crate) struct Telemetry(Option<SdkTracerProvider>);

impl Telemetry {
    /// Sends buffered spans. Blocks for a moment; must not be called from an async task.
    pub(crate) fn flush(self) {
        if let Some(provider) = self.0 {
            // A receiver that is gone must not keep the process from ending in order.
            let _ = provider.shutdown();
        }
    }
}

/// Installs the process's subscriber. `role` names the process in traces (`gateway`, `coordinator`, `worker`).
pub(crate) fn init(args: &TelemetryArgs, role: &'static str) -> Result<Telemetry> {
    let filter = EnvFilter::try_new(&args.log).with_context(|| format!("--log {:?}", args.log))?;
    let format = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    let logs = match args.log_format {
        LogFormat::Text => format.boxed(),
        LogFormat::Json => format.json().boxed(),
    };
    let provider = args.otlp_traces_endpoint.as_deref().map(|endpoint| tracer(endpoint, role)).transpose()?;
    let traces = provider.as_ref().map(|provider| {
        // The exporter's own connections would otherwise be traced in turn.
        let ours = EnvFilter::new("off,phalanx=info,phalanx_gateway=info,phalanx_coordinator=info,phalanx_worker=info");
        tracing_opentelemetry::layer().with_tracer(provider.tracer("phalanx")).with_filter(ours)
    });
    tracing_subscriber::registry().with(logs.with_filter(filter)).with(traces).init();
    Ok(Telemetry(provider))
}

fn tracer(endpoint: &str, role: &'static str) -> Result<SdkTracerProvider> {
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .build()
        .with_context(|| format!("--otlp-traces-endpoint {endpoint}"))?;
    let resource = Resource::builder().with_service_name(format!("phalanx-{role}")).build();
    Ok(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build())
}
