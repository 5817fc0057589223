//! A cluster put together from single processes, so that something can stand between them.

use std::{
    fs::File,
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use phalanx_proto::v1::{
    DeploymentLoad, GenerateRequest, GroupState, Sampling, WatchRequest, generate_event::Event,
    inference_client::InferenceClient,
};
use tonic::transport::Channel;

use crate::cluster::binary;

/// Longest time that a process may take to say something expected.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest time that a process may take to end after SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Processes that end with the test. Each one's standard error goes to a file of its own.
pub struct Parts {
    logs: tempfile::TempDir,
    processes: Vec<(String, Child)>,
}

impl Default for Parts {
    fn default() -> Self {
        let logs = tempfile::tempdir().unwrap_or_else(|error| panic!("no directory for logs: {error}"));
        Self { logs, processes: Vec::new() }
    }
}

impl Parts {
    /// Starts `phalanx` with `args` (separated by blanks) under `name`; answers with its process id.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(&mut self, name: &str, args: &str) -> u32 {
        let mut command = Command::new(binary());
        command.args(args.split_whitespace());
        self.launch(name, command)
    }

    /// Starts a prepared command under `name`; answers with its process id.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn launch(&mut self, name: &str, mut command: Command) -> u32 {
        let log = File::create(self.log_path(name)).unwrap_or_else(|error| panic!("log of {name}: {error}"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?} cannot be started: {error}"));
        let pid = child.id();
        self.processes.push((name.to_owned(), child));
        pid
    }

    fn log_path(&self, name: &str) -> PathBuf {
        self.logs.path().join(name)
    }

    /// What the process of that name has written to standard error.
    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.log_path(name)).unwrap_or_default()
    }

    /// Waits for a line with `sign` in the log of `name` and answers with it.
    ///
    /// # Panics
    /// When there is none within a minute.
    pub fn line(&self, name: &str, sign: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let log = self.log(name);
            // A line without its end may still be growing.
            let mut whole = log.split_inclusive('\n').filter(|line| line.ends_with('\n'));
            if let Some(line) = whole.find(|line| line.contains(sign)) {
                return line.trim_end().to_owned();
            }
            assert!(Instant::now() < deadline, "{name} has not said {sign:?}, only:\n{log}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for a process to end by itself; answers with its exit code.
    ///
    /// # Panics
    /// When it does not end within a minute.
    pub fn exit_code(&mut self, name: &str) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = self.processes.iter_mut().find(|(own, _)| own == name);
            let (_, child) = found.unwrap_or_else(|| panic!("there is no process {name}"));
            if let Ok(Some(status)) = child.try_wait() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "{name} still runs; it said:\n{}", self.log(name));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Starts a coordinator of the small model for two ranks on a free port of loopback.
    ///
    /// # Panics
    /// When it does not listen in time.
    pub fn coordinator(&mut self, more: &str) -> SocketAddr {
        let args = "coordinator nano -tp 2 --listen 127.0.0.1:0 --no-enable-prefix-caching --log warn,phalanx=info,phalanx_coordinator=info";
        self.start("coordinator", &format!("{args} {more}"));
        address_in(&self.line("coordinator", "coordinator listens"))
    }

    /// Starts a worker of the small model.
    pub fn worker(&mut self, name: &str, rank: u32, coordinator: &str, more: &str) -> u32 {
        self.start(name, &format!("worker nano --rank {rank} --threads 1 --coordinator {coordinator} {more}"))
    }

    /// Starts a gateway on a free port of loopback; answers with its base address.
    ///
    /// # Panics
    /// When it does not listen in time.
    pub fn gateway(&mut self, coordinator: &str, more: &str) -> String {
        let args = "gateway nano --port 0 --current-date none --log warn,phalanx_gateway=info";
        self.start("gateway", &format!("{args} --coordinator {coordinator} {more}"));
        format!("http://{}", address_in(&self.line("gateway", "gateway listening")))
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        for (_, child) in &mut self.processes {
            if let Ok(None) = child.try_wait() {
                let _ = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
            }
        }
        let deadline = Instant::now() + STOP_TIMEOUT;
        for (_, child) in &mut self.processes {
            while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            for (name, _) in &self.processes {
                eprintln!("--- {name}\n{}", self.log(name));
            }
        }
    }
}

/// The value of the field `address` of a log line.
fn address_in(line: &str) -> SocketAddr {
    let field = line.split("address=").nth(1).and_then(|rest| rest.split_whitespace().next());
    field.and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("no address in {line:?}"))
}

/// Waits until `wanted` is true of the deployment's load, and answers with that load.
///
/// # Panics
/// When the coordinator ends its stream, or `patience` runs out.
pub async fn until(
    client: &InferenceClient<Channel>,
    patience: Duration,
    wanted: impl Fn(&DeploymentLoad) -> bool,
) -> DeploymentLoad {
    let mut last = DeploymentLoad::default();
    let search = async {
        let request = WatchRequest { interval_ms: 10 };
        let watch = client.clone().watch(request).await.unwrap_or_else(|status| panic!("watch: {status}"));
        let mut watch = watch.into_inner();
        loop {
            let capacity = watch.message().await.unwrap_or_else(|status| panic!("watch: {status}"));
            let mut capacity = capacity.unwrap_or_else(|| panic!("the coordinator ended its watch stream"));
            last = capacity.deployments.remove(0);
            if wanted(&last) {
                return;
            }
        }
    };
    let found = tokio::time::timeout(patience, search).await;
    assert!(found.is_ok(), "not within {patience:?}; last seen: {last:?}");
    last
}

/// Waits until the group can generate.
///
/// # Panics
/// When it cannot within a minute.
pub async fn until_ready(client: &InferenceClient<Channel>) -> DeploymentLoad {
    until(client, PATIENCE, |load| load.state() == GroupState::Ready).await
}

/// Epochs that have failed so far.
pub fn failed_epochs(load: &DeploymentLoad) -> u64 {
    load.totals.as_ref().map_or(0, |totals| totals.failed_epochs)
}

/// A greedy request of `tokens` tokens whose prompt depends on `index`.
pub fn request(index: u64, tokens: u32) -> GenerateRequest {
    let length = 5 + (index * 37) % 100;
    GenerateRequest {
        prompt: (0..length).map(|position| ((index * 7919 + position * 104_729) % 3000) as u32).collect(),
        max_tokens: Some(tokens),
        sampling: Some(Sampling { temperature: Some(0.0), ignore_eos: true, ..Default::default() }),
        ..Default::default()
    }
}

/// Runs a request to its end; answers with its tokens. `seen` is called after every chunk with the tokens so far.
///
/// # Errors
/// What the coordinator says, or that the stream ended without its last event.
pub async fn generate(
    mut client: InferenceClient<Channel>,
    request: GenerateRequest,
    mut seen: impl FnMut(usize),
) -> Result<Vec<u32>, tonic::Status> {
    let mut stream = client.generate(request).await?.into_inner();
    let mut tokens = Vec::new();
    while let Some(event) = stream.message().await? {
        match event.event {
            Some(Event::Tokens(chunk)) => {
                tokens.extend(chunk.tokens.iter().map(|token| token.id));
                seen(tokens.len());
            }
            Some(Event::Finished(finished)) => {
                assert_eq!(finished.completion_tokens as usize, tokens.len(), "usage counts every token once");
                return Ok(tokens);
            }
            Some(Event::Admitted(_)) | None => {}
        }
    }
    Err(tonic::Status::data_loss("the stream ended without its last event"))
}
