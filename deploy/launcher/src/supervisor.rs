//! Child processes: started by role and rank, watched, started again, ended in order.
//!
//! A worker gives a sign of life every second over a socket that is its standard input. One that is silent hangs as a
//! whole (it was stopped, say) and is killed, so that another can take its rank: the coordinator, which may be on another
//! host, can only let it go. The same socket tells a worker that its supervisor is gone.

use std::{
    io::{BufRead, BufReader},
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::mpsc,
    task::JoinHandle,
    time::{MissedTickBehavior, interval, timeout},
};
use tracing::warn;

use crate::{EXIT_ORPHANED, EXIT_REFUSED};

/// A child that never lived for [`SOUND_LIFE`] is not started again after more crashes than this.
const MAX_CRASHES: u32 = 5;
/// A child that lived for so long does not keep a processor busy with starting; it is started again as if for the first
/// time.
const SOUND_LIFE: Duration = Duration::from_secs(1);
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);

/// Between two signs of life.
const PULSE: Duration = Duration::from_secs(1);
const PATIENCE: Patience =
    Patience { first: Duration::from_secs(30), later: Duration::from_secs(5), grace: Duration::from_millis(200) };

/// Tells a child that its life is bound to its parent's.
pub(crate) const SUPERVISED_ENV: &str = "PHALANX_SUPERVISED_BY";
/// Tells a child that its standard input takes signs of life.
const PULSE_ENV: &str = "PHALANX_PULSE";

/// How to start one child, again and again.
pub(crate) struct ChildSpec {
    /// For people: `worker 1`.
    pub name: String,
    /// Arguments after the program's own path.
    pub args: Vec<String>,
    /// Listening socket handed over as standard input. A child without one gives signs of life there.
    pub listener: Option<std::net::TcpListener>,
}

/// Something a child did.
#[derive(Debug)]
pub(crate) enum ChildEvent {
    /// The process ended and is being started again.
    Restarted { name: String, status: ExitStatus },
    /// The process ended and stays away: refused, or crashed whenever it was started. `last_words` is its last line on stderr.
    Gone { name: String, status: ExitStatus, last_words: String },
}

/// How long a child may be silent.
struct Patience {
    /// Until its first sign of life, and between two later ones.
    first: Duration,
    later: Duration,
    /// On top of both, in case it was the whole machine that stood still.
    grace: Duration,
}

/// One supervised child.
pub(crate) struct Supervised {
    task: JoinHandle<()>,
    orders: mpsc::Sender<Order>,
}

#[derive(Clone, Copy)]
enum Order {
    Ask,
    Kill,
    /// Go on, and read files again.
    Reload,
}

impl Supervised {
    /// Starts the child and watches over it.
    ///
    /// # Errors
    /// When the process cannot be started at all.
    pub(crate) fn start(spec: ChildSpec, events: mpsc::Sender<ChildEvent>) -> Result<Self> {
        let first = Running::spawn(&spec)?;
        let (orders, taken) = mpsc::channel(4);
        Ok(Self { task: tokio::spawn(watch(spec, first, taken, events)), orders })
    }

    /// Asks the child to read its files again.
    pub(crate) async fn reload(&self) {
        // A closed channel means that the child is gone already.
        let _ = self.orders.send(Order::Reload).await;
    }

    /// Asks the child to end, waits up to `grace`, then ends it.
    pub(crate) async fn stop(mut self, grace: Duration) {
        // A closed channel means that the child is gone already.
        let _ = self.orders.send(Order::Ask).await;
        if tokio::time::timeout(grace, &mut self.task).await.is_err() {
            let _ = self.orders.send(Order::Kill).await;
            let _ = self.task.await;
        }
    }
}

struct Running {
    pid: Option<Pid>,
    since: Instant,
    pulse: Option<UnixStream>,
    exit: tokio::sync::oneshot::Receiver<(ExitStatus, String)>,
}

impl Running {
    fn spawn(spec: &ChildSpec) -> Result<Self> {
        let mut command = Command::new(own_program()?);
        command.args(&spec.args).env(SUPERVISED_ENV, std::process::id().to_string()).process_group(0);
        // The file's flags have been handed on one by one.
        command.env_remove("PHALANX_CONFIG").env_remove(PULSE_ENV).stderr(Stdio::piped());
        let (input, pulse) = match &spec.listener {
            Some(listener) => (OwnedFd::from(listener.try_clone()?), None),
            None => {
                let (ours, theirs) = std::os::unix::net::UnixStream::pair().context("a socket pair")?;
                ours.set_nonblocking(true)?;
                command.env(PULSE_ENV, "1");
                (OwnedFd::from(theirs), Some(UnixStream::from_std(ours)?))
            }
        };
        command.stdin(Stdio::from(input));
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
        Ok(Self { pid, since: Instant::now(), pulse, exit })
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

/// This very program, also when its file has been replaced meanwhile: all processes of a cluster are of one version.
fn own_program() -> Result<PathBuf> {
    const RUNNING: &str = "/proc/self/exe";
    let path = std::env::current_exe().context("the path of this program")?;
    // The kernel marks the path of a file that is no more.
    Ok(if path.exists() { path } else { RUNNING.into() })
}

/// Returns when a child that gives signs of life has stopped giving them. What came while this process itself stood still
/// lies in the socket and counts.
async fn silent(pulse: &mut Option<UnixStream>, patience: &Patience) {
    let mut longest = patience.first;
    while let Some(socket) = pulse {
        let mut signs = [0; 64];
        let mut heard = timeout(longest, socket.read(&mut signs)).await;
        if heard.is_err() {
            heard = timeout(patience.grace, socket.read(&mut signs)).await;
        }
        match heard {
            Ok(Ok(1..)) => longest = patience.later,
            // The process is ending, and its end says more.
            Ok(_) => *pulse = None,
            Err(_) => return,
        }
    }
    std::future::pending().await
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
    mut orders: mpsc::Receiver<Order>,
    events: mpsc::Sender<ChildEvent>,
) {
    let mut lives = Lives::default();
    loop {
        let ended = tokio::select! {
            ended = &mut running.exit => ended,
            () = silent(&mut running.pulse, &PATIENCE) => {
                warn!(child = spec.name, "no sign of life, ending it");
                running.signal(Signal::KILL);
                (&mut running.exit).await
            }
            order = orders.recv() => match order {
                Some(Order::Reload) => {
                    running.signal(Signal::HUP);
                    continue;
                }
                order => return end(running, order.unwrap_or(Order::Ask), orders).await,
            },
        };
        let Ok((status, last_words)) = ended else { return };
        let refused = status.code() == Some(EXIT_REFUSED.into());
        let mut backoff = lives.ended(running.since.elapsed()).filter(|_| !refused);
        running = loop {
            let Some(wait) = backoff else {
                let _ = events.send(ChildEvent::Gone { name: spec.name, status, last_words }).await;
                return;
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                // A new process reads every file by itself.
                order = orders.recv() => if !matches!(order, Some(Order::Reload)) { return },
            }
            match Running::spawn(&spec) {
                Ok(next) => break next,
                // For want of processes or memory, say; the next try may find some.
                Err(error) => warn!(child = spec.name, error = format!("{error:#}"), "a child cannot be started again"),
            }
            backoff = lives.ended(Duration::ZERO);
        };
        let _ = events.send(ChildEvent::Restarted { name: spec.name.clone(), status }).await;
    }
}

/// How a child's lives went.
#[derive(Default)]
struct Lives {
    /// Crashes since the last sound life.
    crashes: u32,
    /// Whether one was sound.
    worked: bool,
}

impl Lives {
    /// Takes note of a crash after a life of `length`. Gives the wait before the next life; nothing if there should be
    /// none, because the child has never worked. One that did is tried for ever: its requests wait only as long as the
    /// coordinator lets them, and `/readyz` tells that the group is degraded.
    fn ended(&mut self, length: Duration) -> Option<Duration> {
        if length >= SOUND_LIFE {
            (self.crashes, self.worked) = (0, true);
        }
        self.crashes += 1;
        let backoff = FIRST_BACKOFF.saturating_mul(1 << (self.crashes - 1).min(16)).min(LONGEST_BACKOFF);
        (self.worked || self.crashes <= MAX_CRASHES).then_some(backoff)
    }
}

async fn end(mut running: Running, first: Order, mut orders: mpsc::Receiver<Order>) {
    let signal = |order| match order {
        Order::Ask => Signal::TERM,
        Order::Kill => Signal::KILL,
        Order::Reload => Signal::HUP,
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

/// Gives signs of life to the supervisor, if one started this process and asks for them; ends the process when the
/// supervisor is gone. From a task of the runtime: a runtime that does not get to it does not get to anything.
///
/// # Errors
/// When the socket cannot be used.
pub(crate) fn give_signs_of_life() -> Result<()> {
    if std::env::var_os(PULSE_ENV).is_none() {
        return Ok(());
    }
    let socket = std::io::stdin().as_fd().try_clone_to_owned().context("the supervisor's socket on standard input")?;
    let socket = std::os::unix::net::UnixStream::from(socket);
    socket.set_nonblocking(true)?;
    let mut socket = UnixStream::from_std(socket)?;
    tokio::spawn(async move {
        let mut ticks = interval(PULSE);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if socket.write_all(&[1]).await.is_err() {
                warn!("the supervisor is gone");
                std::process::exit(EXIT_ORPHANED.into());
            }
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(50);

    #[test]
    fn a_child_that_never_worked_is_given_up_after_five_more_tries() {
        let mut lives = Lives::default();
        let waits: Vec<_> = (0..7).map(|_| lives.ended(SHORT).map(|wait| wait.as_millis())).collect();
        assert_eq!(waits, [Some(100), Some(200), Some(400), Some(800), Some(1600), None, None]);
    }

    #[test]
    fn a_child_that_worked_is_started_again_for_ever_and_at_once_after_each_sound_life() {
        let mut lives = Lives::default();
        assert_eq!(lives.ended(SOUND_LIFE), Some(FIRST_BACKOFF));
        let last = (0..20).map(|_| lives.ended(SHORT)).last();
        assert_eq!(last, Some(Some(LONGEST_BACKOFF)));
        assert_eq!(lives.ended(SOUND_LIFE), Some(FIRST_BACKOFF));
    }

    const QUICK: Patience = Patience { first: Duration::from_secs(5), later: Duration::from_millis(200), grace: SHORT };

    #[tokio::test]
    async fn a_child_is_silent_when_its_signs_stop_and_not_before() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (started, mut pulse) = (Instant::now(), Some(ours));
        let child = async {
            for _ in 0..10 {
                theirs.write_all(&[1]).await.unwrap();
                tokio::time::sleep(SHORT).await;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = silent(&mut pulse, &QUICK) => {}
            () = child => {}
        }
        // From the last of ten signs on.
        assert!(started.elapsed() >= 9 * SHORT + QUICK.later + QUICK.grace, "{:?}", started.elapsed());
    }

    #[tokio::test]
    async fn a_child_that_closes_its_socket_is_ending_and_not_silent() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(timeout(3 * QUICK.later, silent(&mut Some(ours), &QUICK)).await.is_err());
    }
}
