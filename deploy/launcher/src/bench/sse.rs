//! The client's side of server-sent events.

use anyhow::Result;
use bytes::Bytes;
use futures::{StreamExt, stream::BoxStream};

/// Longest event that is taken, in bytes.
const MAX_EVENT_BYTES: usize = 16 << 20;

/// The `data:` payloads of a response body, in order.
pub(crate) struct SseLines {
    body: BoxStream<'static, reqwest::Result<Bytes>>,
    buffer: Vec<u8>,
}

impl SseLines {
    pub(crate) fn new(body: BoxStream<'static, reqwest::Result<Bytes>>) -> Self {
        Self { body, buffer: Vec::new() }
    }

    /// The next payload; comments and other fields are passed over. `None` at the end of the body.
    pub(crate) async fn next(&mut self) -> Result<Option<String>> {
        loop {
            while let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                if let Some(data) = line.strip_prefix(b"data:") {
                    return Ok(Some(String::from_utf8_lossy(data).trim().to_owned()));
                }
            }
            let Some(chunk) = self.body.next().await else { return Ok(None) };
            self.buffer.extend_from_slice(&chunk?);
            anyhow::ensure!(self.buffer.len() <= MAX_EVENT_BYTES, "an event of more than {MAX_EVENT_BYTES} bytes");
        }
    }
}
