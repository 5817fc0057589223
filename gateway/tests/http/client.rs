//! A client that knows no more of HTTP than the test needs, so that what it sees is what was sent.

use std::{collections::HashMap, net::SocketAddr};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

/// A whole response.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// The body of a response that must be a success.
    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text());
        self.json()
    }

    /// Status, parameter and code of a response that must be an error in OpenAI's form.
    pub(crate) fn error(&self) -> (u16, Value, Value) {
        let body = self.json();
        let error = body["error"].as_object().unwrap_or_else(|| panic!("{body}"));
        let keys: Vec<_> = error.keys().map(String::as_str).collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        assert!(error["message"].as_str().is_some_and(|text| !text.is_empty()));
        (self.status, error["param"].clone(), error["code"].clone())
    }
}

/// Speaks to one address, with a connection of its own each time.
#[derive(Clone, Copy)]
pub(crate) struct Client(pub(crate) SocketAddr);

impl Client {
    pub(crate) async fn get(self, path: &str) -> Answer {
        self.raw(format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").as_bytes()).await
    }

    pub(crate) async fn post(self, path: &str, body: Value) -> Answer {
        self.post_bytes(path, body.to_string().as_bytes(), "").await
    }

    /// `headers` are whole lines.
    pub(crate) async fn post_bytes(self, path: &str, body: &[u8], headers: &str) -> Answer {
        self.raw(&post_request(path, body, headers)).await
    }

    pub(crate) async fn get_as(self, key: &str, path: &str) -> Answer {
        self.raw(format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{}\r\n", bearer(key)).as_bytes())
            .await
    }

    pub(crate) async fn chat_as(self, key: &str, body: Value) -> Answer {
        self.post_bytes("/v1/chat/completions", chat_body(body).to_string().as_bytes(), &bearer(key)).await
    }

    /// Sends bytes and reads the response to its end.
    pub(crate) async fn raw(self, request: &[u8]) -> Answer {
        let mut stream = self.send(request).await;
        let mut body = Vec::new();
        while let Some(chunk) = stream.chunk().await {
            body.extend(chunk);
        }
        Answer { status: stream.status, headers: stream.headers, body }
    }

    pub(crate) async fn chat(self, body: Value) -> Answer {
        self.post("/v1/chat/completions", chat_body(body)).await
    }

    /// Begins a streamed answer.
    pub(crate) async fn open(self, path: &str, body: Value) -> Events {
        self.open_with(path, body, "").await
    }

    /// Begins a streamed answer. `headers` are whole lines.
    pub(crate) async fn open_with(self, path: &str, mut body: Value, headers: &str) -> Events {
        body["stream"] = json!(true);
        self.send(&post_request(path, body.to_string().as_bytes(), headers)).await
    }

    async fn send(self, request: &[u8]) -> Events {
        let mut socket = TcpStream::connect(self.0).await.unwrap();
        socket.write_all(request).await.unwrap();
        Events::begin(BufReader::new(socket)).await
    }
}

/// The header line with a key.
pub(crate) fn bearer(key: &str) -> String {
    format!("authorization: Bearer {key}\r\n")
}

/// A chat about what the scripted coordinator knows, unless the body says otherwise.
pub(crate) fn chat_body(mut body: Value) -> Value {
    if body.get("messages").is_none() {
        body["messages"] = json!([{"role": "user", "content": "Spell tree."}]);
    }
    body
}

fn post_request(path: &str, body: &[u8], headers: &str) -> Vec<u8> {
    let typed = if headers.to_lowercase().contains("content-type") { "" } else { "content-type: application/json\r\n" };
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{typed}{headers}content-length: {length}\r\n\r\n"
    );
    [head.as_bytes(), body].concat()
}

/// A response being read.
pub(crate) struct Events {
    pub(crate) status: u16,
    pub(crate) headers: HashMap<String, String>,
    socket: BufReader<TcpStream>,
    /// Bytes that are left of a body of known length; `None`: chunks.
    left: Option<usize>,
    buffer: String,
}

impl Events {
    async fn begin(mut socket: BufReader<TcpStream>) -> Self {
        let line = read_line(&mut socket).await;
        let status = line.split(' ').nth(1).unwrap_or_else(|| panic!("{line:?}")).parse().unwrap();
        let mut headers = HashMap::new();
        loop {
            let line = read_line(&mut socket).await;
            let Some((name, value)) = line.split_once(": ") else { break };
            headers.insert(name.to_owned(), value.to_owned());
        }
        let left = headers.get("content-length").map(|length| length.parse().unwrap());
        Self { status, headers, socket, left, buffer: String::new() }
    }

    /// The next bytes of the body.
    async fn chunk(&mut self) -> Option<Vec<u8>> {
        let length = match self.left.take() {
            Some(length) => {
                self.left = Some(0);
                length
            }
            None => {
                let line = read_line(&mut self.socket).await;
                if line.is_empty() {
                    // The connection was cut before the last chunk.
                    return None;
                }
                usize::from_str_radix(&line, 16).unwrap()
            }
        };
        if length == 0 {
            return None;
        }
        let mut bytes = vec![0; length];
        self.socket.read_exact(&mut bytes).await.unwrap();
        if self.left.is_none() {
            read_line(&mut self.socket).await;
        }
        Some(bytes)
    }

    /// The next event or comment, without the empty line after it.
    pub(crate) async fn next(&mut self) -> Option<String> {
        loop {
            if let Some((event, rest)) = self.buffer.split_once("\n\n") {
                let event = event.to_owned();
                self.buffer = rest.to_owned();
                return Some(event);
            }
            let chunk = self.chunk().await?;
            self.buffer.push_str(std::str::from_utf8(&chunk).expect("chunks hold whole characters"));
        }
    }

    /// Everything that follows: the data of events, without comments.
    pub(crate) async fn rest(&mut self) -> Vec<String> {
        let mut all = Vec::new();
        while let Some(event) = self.next().await {
            if !event.starts_with(':') {
                all.push(event.strip_prefix("data: ").unwrap_or_else(|| panic!("{event:?}")).to_owned());
            }
        }
        assert_eq!(self.buffer, "", "the stream ends after an event");
        all
    }

    /// The chunks of a stream that must end well.
    pub(crate) async fn chunks(&mut self) -> Vec<Value> {
        assert_eq!(self.status, 200);
        let mut events = self.rest().await;
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

async fn read_line(socket: &mut BufReader<TcpStream>) -> String {
    let mut line = String::new();
    socket.read_line(&mut line).await.unwrap();
    line.trim_end().to_owned()
}
