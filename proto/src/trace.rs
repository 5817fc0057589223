//! W3C trace context (`traceparent`) between a span and gRPC metadata.

use std::collections::HashMap;

use opentelemetry::{
    Context,
    propagation::{Extractor, Injector, TextMapPropagator},
    trace::TraceContextExt,
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::metadata::{MetadataMap, MetadataValue};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// Name of the header and of the metadata key.
pub const TRACEPARENT: &str = "traceparent";

#[derive(Default)]
struct Carrier(HashMap<String, String>);

impl Injector for Carrier {
    fn set(&mut self, key: &str, value: String) {
        self.0.insert(key.to_owned(), value);
    }
}

impl Extractor for Carrier {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }
}

/// The `traceparent` that names `span` as the parent; empty when the span is not traced.
pub fn traceparent_of(span: &Span) -> String {
    let mut carrier = Carrier::default();
    propagator().inject_context(&span.context(), &mut carrier);
    carrier.0.remove(TRACEPARENT).unwrap_or_default()
}

/// Makes `span` a child of the one that `traceparent` names. Malformed text leaves the span a root.
pub fn set_parent(span: &Span, traceparent: &str) {
    let carrier = Carrier(HashMap::from([(TRACEPARENT.to_owned(), traceparent.to_owned())]));
    let context = propagator().extract_with_context(&Context::new(), &carrier);
    if context.span().span_context().is_valid() {
        // Fails only when the span is disabled or already entered; then there is nothing to attach to.
        let _ = span.set_parent(context);
    }
}

/// Writes the trace context of `span` into outgoing metadata.
pub fn inject(span: &Span, metadata: &mut MetadataMap) {
    if let Ok(value) = MetadataValue::try_from(traceparent_of(span))
        && !value.is_empty()
    {
        metadata.insert(TRACEPARENT, value);
    }
}

/// Reads the trace context of incoming metadata; empty when there is none.
pub fn extract(metadata: &MetadataMap) -> &str {
    metadata.get(TRACEPARENT).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

fn propagator() -> TraceContextPropagator {
    TraceContextPropagator::new()
}
