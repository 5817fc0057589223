//! The one binary. `phalanx serve` starts and supervises a whole cluster; `coordinator`, `worker` and `gateway` start one
//! process each, on any host; `plan`, `doctor`, `bench`, `chat` and `harmony` are tools.
//!
//! | module | holds |
//! | --- | --- |
//! | [`cli`], [`foreign`] | the command line as typed |
//! | [`config_file`] | `--config FILE`: flags from a file, and profiles |
//! | [`models`] | where a model's directory is found |
//! | [`serve`], [`supervisor`], [`progress`] | the cluster as child processes |
//! | [`components`] | one coordinator, worker or gateway |
//! | [`etcd`] | how several coordinators meet |
//! | [`access`] | keys and certificate of the HTTP door |
//! | [`telemetry`] | logs and traces |
//! | [`tls`], [`ca`] | certificates between components, and who makes them |
//! | [`plan`], [`doctor`], [`bench`](mod@bench), [`chat`], [`harmony`] | the tools |

mod access;
mod bench;
mod ca;
mod chat;
mod cli;
mod components;
mod config_file;
mod doctor;
mod etcd;
mod foreign;
mod harmony;
mod models;
mod plan;
mod progress;
mod serve;
mod supervisor;
mod telemetry;
mod tls;

use std::process::ExitCode;

use clap::Parser;
use phalanx_coordinator::membership::Deposed;
use phalanx_proto::fault::{Fault, FaultKind};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::cli::{Cli, Command};

/// Exit status of a process whose configuration, model or machine cannot work: starting it again would not help.
pub(crate) const EXIT_REFUSED: u8 = 78;
/// Exit status of a process that broke down: another start may mend it. Both as in `sysexits.h`.
pub(crate) const EXIT_BROKEN: u8 = 70;
/// Exit status of a process whose supervisor is gone.
pub(crate) const EXIT_ORPHANED: u8 = 75;

fn main() -> ExitCode {
    let args = match config_file::expand(std::env::args_os().map(cli::spell_out).collect()) {
        Ok(args) => args,
        Err(error) => return refuse(&error),
    };
    let cli = Cli::parse_from(args);
    raise_descriptor_limit();
    // What blocks here computes (templates, tokenizing) or reads a file at start: more threads than processors would
    // only each keep memory of their own.
    let blocking = std::thread::available_parallelism().map_or(4, usize::from).max(4);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().max_blocking_threads(blocking).build()
    {
        Ok(runtime) => runtime,
        Err(error) => return refuse(&anyhow::anyhow!("the async runtime cannot start: {error}")),
    };
    let outcome = runtime.block_on(run(cli.command));
    // Loading threads and the like must not hold up the end of the process.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    match outcome {
        Ok(code) => code,
        Err(error) => refuse(&error),
    }
}

/// Every connection takes a descriptor, and shells allow only 1024 unless asked for more. Where the system refuses,
/// connections beyond the limit wait.
fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

fn refuse(error: &anyhow::Error) -> ExitCode {
    eprintln!("phalanx: {error:#}");
    let broken = |fault: &Fault| matches!(fault.kind, FaultKind::Internal | FaultKind::Diverged);
    let broken = error.downcast_ref::<Fault>().is_some_and(broken) || error.is::<Deposed>();
    ExitCode::from(if broken { EXIT_BROKEN } else { EXIT_REFUSED })
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Serve(args) => serve::run(*args).await,
        Command::Coordinator(args) => components::coordinator(*args).await.map(|()| ExitCode::SUCCESS),
        Command::Worker(args) => components::worker(*args).await.map(|()| ExitCode::SUCCESS),
        Command::Gateway(args) => components::gateway(*args).await.map(|()| ExitCode::SUCCESS),
        Command::Plan(args) => plan::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Doctor(args) => doctor::run(&args),
        Command::Bench(args) => bench::run(*args).await.map(|()| ExitCode::SUCCESS),
        Command::Chat(args) => chat::run(args).await.map(|()| ExitCode::SUCCESS),
        Command::Harmony(args) => harmony::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Key(args) => access::make_key(&args).map(|()| ExitCode::SUCCESS),
        Command::Ca(args) => ca::run(&args).map(|()| ExitCode::SUCCESS),
    }
}
