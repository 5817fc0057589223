//! Child processes: started by role and rank, watched, started again, ended in order.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader},
    os::{fd::OwnedFd, unix::process::CommandExt},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{sync::mpsc, task::JoinHandle};
use tracing::warn;

use crate::EXIT_REFUSED;

/// More crashes than this within [`CRASH_WINDOW`] and a child is not started again.
const MAX_CRASHES: usize = 5;
const CRASH_WINDOW: Duration = Duration::from_secs(60);
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);

/// Tells a child that its life is bound to its parent's.
pub(crate) const SUPERVISED_ENV: &str = "PHALANX_SUPERVISED_BY";

/// How to start one child, again and again.
pub(crate) struct ChildSpec {
    /// For people: `worker 1`.
    pub name: String,
    /// Arguments after the program's own path.
    pub args: Vec<String>,
    /// Listening socket handed over as standard input.
    pub listener: Option<std::net::TcpListener>,
}

/// Something a child did.
#[derive(Debug)]
pub(crate) enum ChildEvent {
    /// The process ended and is being started again.
    Restarted { name: String, status: ExitStatus },
    /// The process ended and stays away: refused, or crashed too often. `last_words` is its last line on stderr.
    Gone { name: String, status: ExitStatus, last_words: String },
}

/// One supervised child.
pub(crate) struct Supervised {
    task: JoinHandle<()>,
    stop: mpsc::Sender<Stop>,
}

#[derive(Clone, Copy)]
enum Stop {
    Ask,
    Kill,
}

impl Supervised {
    /// Starts the child and watches over it.
    ///
    /// # Errors
    /// When the process cannot be started at all.
    pub(crate) fn start(spec: ChildSpec, events: mpsc::Sender<ChildEvent>) -> Result<Self> {
        let first = Running::spawn(&spec)?;
        let (stop, orders) = mpsc::channel(4);
        Ok(Self { task: tokio::spawn(watch(spec, first, orders, events)), stop })
    }

    /// Asks the child to end, waits up to `grace`, then ends it.
    pub(crate) async fn stop(mut self, grace: Duration) {
        // A closed channel means that the child is gone already.
        let _ = self.stop.send(Stop::Ask).await;
        if tokio::time::timeout(grace, &mut self.task).await.is_err() {
            let _ = self.stop.send(Stop::Kill).await;
            let _ = self.task.await;
        }
    }
}

struct Running {
    pid: Option<Pid>,
    exit: tokio::sync::oneshot::Receiver<(ExitStatus, String)>,
}

impl Running {
    fn spawn(spec: &ChildSpec) -> Result<Self> {
        let program = std::env::current_exe().context("the path of this program")?;
        let mut command = Command::new(program);
        command.args(&spec.args).env(SUPERVISED_ENV, std::process::id().to_string()).process_group(0);
        // The file's flags have been handed on one by one.
        command.env_remove("PHALANX_CONFIG").stderr(Stdio::piped());
        match &spec.listener {
            Some(listener) => command.stdin(Stdio::from(OwnedFd::from(listener.try_clone()?))),
            None => command.stdin(Stdio::null()),
        };
        let mut child = command.spawn().with_context(|| format!("{} cannot be started", spec.name))?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let (sender, exit) = tokio::sync::oneshot::channel();
        std::thread::Builder::new().name(format!("wait {}", spec.name)).spawn(move || {
            let last_words = forward_stderr(&mut child);
            if let Ok(status) = child.wait() {
                // Nobody waits for it any more when the supervisor itself has ended.
                let _ = sender.send((status, last_words));
            }
        })?;
        Ok(Self { pid, exit })
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid
            && let Err(error) = kill_process(pid, signal)
            && error != rustix::io::Errno::SRCH
        {
            warn!(?signal, %error, "a child cannot be signalled");
        }
    }
}

/// Passes the child's log lines on and keeps the last one.
fn forward_stderr(child: &mut Child) -> String {
    let mut last = String::new();
    if let Some(stderr) = child.stderr.take() {
        for line in BufReader::new(stderr).lines() {
            let Ok(line) = line else { break };
            eprintln!("{line}");
            if !line.trim().is_empty() {
                last = line;
            }
        }
    }
    last
}

async fn watch(
    spec: ChildSpec,
    mut running: Running,
    mut orders: mpsc::Receiver<Stop>,
    events: mpsc::Sender<ChildEvent>,
) {
    let mut crashes: VecDeque<Instant> = VecDeque::new();
    loop {
        let ended = tokio::select! {
            ended = &mut running.exit => ended,
            order = orders.recv() => return end(running, order.unwrap_or(Stop::Ask), orders).await,
        };
        let Ok((status, last_words)) = ended else { return };
        let now = Instant::now();
        crashes.retain(|at| now.duration_since(*at) < CRASH_WINDOW);
        crashes.push_back(now);
        let refused = status.code() == Some(EXIT_REFUSED.into());
        if refused || crashes.len() > MAX_CRASHES {
            let _ = events.send(ChildEvent::Gone { name: spec.name, status, last_words }).await;
            return;
        }
        let backoff = (FIRST_BACKOFF * (1 << (crashes.len() - 1))).min(LONGEST_BACKOFF);
        tokio::select! {
            () = tokio::time::sleep(backoff) => {}
            _ = orders.recv() => return,
        }
        match Running::spawn(&spec) {
            Ok(next) => running = next,
            Err(error) => {
                warn!(child = spec.name, %error, "a child cannot be started again");
                let _ = events.send(ChildEvent::Gone { name: spec.name, status, last_words: error.to_string() }).await;
                return;
            }
        }
        let _ = events.send(ChildEvent::Restarted { name: spec.name.clone(), status }).await;
    }
}

async fn end(mut running: Running, first: Stop, mut orders: mpsc::Receiver<Stop>) {
    let signal = |stop| match stop {
        Stop::Ask => Signal::TERM,
        Stop::Kill => Signal::KILL,
    };
    running.signal(signal(first));
    loop {
        tokio::select! {
            _ = &mut running.exit => return,
            Some(order) = orders.recv() => running.signal(signal(order)),
        }
    }
}

/// Binds this process's life to its parent's, if a supervisor started it.
///
/// # Errors
/// When the parent is gone already, or the kernel refuses.
pub(crate) fn die_with_parent() -> Result<()> {
    let Ok(parent) = std::env::var(SUPERVISED_ENV) else { return Ok(()) };
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).context("parent-death signal")?;
    let current = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().to_string());
    anyhow::ensure!(current.as_deref() == Some(parent.as_str()), "the supervisor (process {parent}) is gone");
    Ok(())
}
