//! A real etcd on loopback, to be killed, stopped and robbed of its data.

use std::{
    net::{TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::faults::signal;

/// Longest time it may take to listen.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// One etcd, alone in its cluster.
pub struct Etcd {
    process: Child,
    directory: tempfile::TempDir,
    scheme: &'static str,
    client_port: u16,
    peer_port: u16,
    more: Vec<String>,
}

impl Etcd {
    /// Starts one that anybody may use.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start() -> Self {
        Self::start_with("http", Vec::new())
    }

    /// Starts one that is spoken to by `scheme`, with `more` arguments.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start_with(scheme: &'static str, more: Vec<String>) -> Self {
        let directory = tempfile::tempdir().unwrap_or_else(|error| panic!("no directory for etcd: {error}"));
        let (client_port, peer_port) = (free_port(), free_port());
        let process = launch(&arguments(directory.path().join("data"), scheme, client_port, peer_port), &more);
        let etcd = Self { process, directory, scheme, client_port, peer_port, more };
        etcd.wait_until_it_listens();
        etcd
    }

    /// Where clients reach it.
    pub fn url(&self) -> String {
        format!("{}://127.0.0.1:{}", self.scheme, self.client_port)
    }

    /// Ends it as a power cut would.
    pub fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Starts it again with what it had written.
    ///
    /// # Panics
    /// When it does not start.
    pub fn restart(&mut self) {
        let data = self.directory.path().join("data");
        self.process = launch(&arguments(data, self.scheme, self.client_port, self.peer_port), &self.more);
        self.wait_until_it_listens();
    }

    /// Destroys everything that it had written. It must have been killed.
    ///
    /// # Panics
    /// When the files cannot be removed.
    pub fn lose_data(&self) {
        let removed = std::fs::remove_dir_all(self.directory.path().join("data"));
        removed.unwrap_or_else(|error| panic!("etcd's data: {error}"));
    }

    /// Stops it where it is, so that connections stay and nothing is answered.
    pub fn freeze(&self) {
        signal(self.process.id(), "STOP");
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        signal(self.process.id(), "CONT");
    }

    /// Calls its JSON door, such as `kv/range`.
    ///
    /// # Panics
    /// When it does not answer.
    pub fn call(&self, door: &str, body: &Value) -> Value {
        let url = format!("{}/v3/{door}", self.url());
        let body = body.to_string();
        let output = Command::new("curl").args(["-sS", "--max-time", "5", &url, "-d", &body]).output();
        let output = output.unwrap_or_else(|error| panic!("curl: {error}"));
        let text = String::from_utf8_lossy(&output.stdout);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{url}: {error}: {text:?} {:?}", output.stderr))
    }

    /// The value of a key, if there is one.
    pub fn get(&self, key: &str) -> Option<String> {
        let answer = self.call("kv/range", &json!({"key": base64(key.as_bytes())}));
        Some(String::from_utf8_lossy(&from_base64(answer["kvs"][0]["value"].as_str()?)).into_owned())
    }

    fn wait_until_it_listens(&self) {
        let deadline = Instant::now() + START_TIMEOUT;
        while TcpStream::connect(("127.0.0.1", self.client_port)).is_err() {
            assert!(Instant::now() < deadline, "etcd does not listen on port {}", self.client_port);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

fn arguments(data: PathBuf, scheme: &str, client_port: u16, peer_port: u16) -> Vec<String> {
    let (client, peer) = (format!("{scheme}://127.0.0.1:{client_port}"), format!("http://127.0.0.1:{peer_port}"));
    let mut arguments = vec![format!("--data-dir={}", data.display()), "--log-level=panic".into()];
    arguments.extend([format!("--listen-client-urls={client}"), format!("--advertise-client-urls={client}")]);
    arguments.extend([format!("--listen-peer-urls={peer}"), format!("--initial-advertise-peer-urls={peer}")]);
    arguments.push(format!("--initial-cluster=default={peer}"));
    arguments
}

fn launch(arguments: &[String], more: &[String]) -> Child {
    let mut command = Command::new("etcd");
    command.args(arguments).args(more).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap_or_else(|error| panic!("etcd: {error}; run the tests with tests/run, which installs it"))
}

/// A port of loopback that nobody used a moment ago.
///
/// # Panics
/// When there is none.
pub fn free_port() -> u16 {
    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    free.unwrap_or_else(|error| panic!("no free port: {error}")).port()
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Keys and values are base64 in etcd's JSON.
fn base64(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0_u32, |word, &byte| word << 8 | u32::from(byte)) << (8 * (3 - chunk.len()));
        let digits = (0..=chunk.len()).map(|place| ALPHABET[(word >> (18 - 6 * place) & 63) as usize] as char);
        text.extend(digits.chain(std::iter::repeat_n('=', 3 - chunk.len())));
    }
    text
}

fn from_base64(text: &str) -> Vec<u8> {
    let digits: Vec<u32> = text
        .bytes()
        .filter_map(|byte| ALPHABET.iter().position(|&own| own == byte))
        .map(|digit| digit as u32)
        .collect();
    let mut bytes = Vec::new();
    for chunk in digits.chunks(4) {
        let word = chunk.iter().fold(0_u32, |word, digit| word << 6 | digit) << (6 * (4 - chunk.len()));
        bytes.extend((1..chunk.len()).map(|place| (word >> (24 - 8 * place)) as u8));
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_goes_there_and_back() {
        for (plain, coded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("/phalanx", "L3BoYWxhbng=")] {
            assert_eq!(base64(plain.as_bytes()), coded);
            assert_eq!(from_base64(coded), plain.as_bytes());
        }
    }
}
