//! `phalanx doctor`: what this machine has for serving, and what is in the way.

use std::{fmt, process::ExitCode};

use anyhow::Result;
use phalanx_proto::checkpoint::Checkpoint;
use phalanx_worker::backend::cuda::inventory::{self, FoundLibrary, Inventory, Presence};
use rustix::{
    fs::statvfs,
    process::{Resource, getrlimit},
};
use serde::Serialize;

use crate::{cli::DoctorArgs, models};

/// Exit status when something is in the way of serving.
const EXIT_PROBLEMS: u8 = 1;
/// Exit status when there is no GPU, and CPUs can serve.
const EXIT_NO_GPU: u8 = 3;
/// Where the ranks of a host share memory.
const SHARED_MEMORY: &str = "/dev/shm";
/// Less shared memory than this is too little for the ranks of one host: containers have 64 MiB when nothing is said.
const LEAST_SHARED_BYTES: u64 = 64 << 20;
/// What NCCL's documentation asks of containers.
const NCCL_SHARED_BYTES: u64 = 1 << 30;
/// Less lockable memory than this does not suffice where NCCL uses InfiniBand.
const LEAST_LOCKED_BYTES: u64 = 64 << 20;
/// Bytes of a GiB.
const GIB: f64 = (1_u64 << 30) as f64;

/// What can serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    /// A GPU.
    Gpu,
    /// There is no GPU; CPUs can.
    Cpu,
    /// Something is in the way.
    Problems,
}

/// Limits of this process and its host.
#[derive(Debug, Serialize)]
struct Host {
    processors: usize,
    /// Memory that may be locked, bytes; none is no limit.
    locked_bytes: Option<u64>,
    /// All of `/dev/shm`, bytes.
    shared_bytes: Option<u64>,
    /// What is free of it.
    shared_free_bytes: Option<u64>,
}

/// A checkpoint that was looked at.
#[derive(Debug, Serialize)]
struct Model {
    directory: String,
    layers: usize,
    experts: usize,
}

/// Everything that was found.
#[derive(Debug, Serialize)]
struct Report {
    verdict: Verdict,
    #[serde(flatten)]
    inventory: Inventory,
    host: Host,
    model: Option<Model>,
    /// What is in the way of serving.
    problems: Vec<String>,
    /// What may slow it down.
    notes: Vec<String>,
}

pub(crate) fn run(args: &DoctorArgs) -> Result<ExitCode> {
    let model = args.model.as_ref().map(|model| examine(model, args)).transpose();
    let report = judge(inventory::take(), look_at_host(), model);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{report}");
    }
    Ok(match report.verdict {
        Verdict::Gpu => ExitCode::SUCCESS,
        Verdict::Cpu => ExitCode::from(EXIT_NO_GPU),
        Verdict::Problems => ExitCode::from(EXIT_PROBLEMS),
    })
}

/// Reads a checkpoint's headers, as every worker does first.
fn examine(model: &str, args: &DoctorArgs) -> Result<Model> {
    let directory = models::resolve(model, args.model_dir.as_deref())?;
    let checkpoint = Checkpoint::open(&directory)?;
    checkpoint.check_complete()?;
    let (layers, experts) = (checkpoint.geometry.num_hidden_layers(), checkpoint.geometry.num_local_experts);
    Ok(Model { directory: directory.display().to_string(), layers, experts })
}

fn look_at_host() -> Host {
    let shared = statvfs(SHARED_MEMORY).ok();
    let bytes = |blocks: fn(&rustix::fs::StatVfs) -> u64| shared.as_ref().map(|fs| blocks(fs) * fs.f_frsize);
    Host {
        processors: std::thread::available_parallelism().map_or(1, usize::from),
        locked_bytes: getrlimit(Resource::Memlock).current,
        shared_bytes: bytes(|fs| fs.f_blocks),
        shared_free_bytes: bytes(|fs| fs.f_bavail),
    }
}

/// Tells what is in the way from what only slows down.
fn judge(inventory: Inventory, host: Host, model: Result<Option<Model>>) -> Report {
    let (mut problems, mut notes) = (Vec::new(), Vec::new());
    let several = inventory.devices.len() > 1;
    if inventory.gpu == Presence::Broken {
        problems.extend(inventory.driver.problem.clone());
    }
    if inventory.gpu == Presence::Present {
        problems.extend(inventory.nvrtc.problem.clone());
        for device in &inventory.devices {
            problems.extend(device.problem.iter().map(|problem| format!("GPU {}: {problem}", device.index)));
        }
    }
    if several {
        notes.push("sums over several GPUs go through the host's memory in this version".to_owned());
        problems.extend(inventory.nccl.problem.clone());
        let apart = inventory.links.iter().filter(|link| !link.direct && link.from < link.to);
        notes.extend(
            apart.map(|link| {
                format!("GPUs {} and {} reach each other through the host's memory only", link.from, link.to)
            }),
        );
        if host.locked_bytes.is_some_and(|bytes| bytes < LEAST_LOCKED_BYTES) {
            notes.push("RLIMIT_MEMLOCK is low: NCCL over InfiniBand needs `ulimit -l unlimited`".to_owned());
        }
    }
    match host.shared_free_bytes {
        Some(free) if free < LEAST_SHARED_BYTES => problems.push(format!(
            "{SHARED_MEMORY} has {} MiB free: the ranks of a host meet there; start the container with --shm-size=1g",
            free >> 20
        )),
        Some(free) if several && free < NCCL_SHARED_BYTES => notes.push(format!(
            "{SHARED_MEMORY} has {} MiB free: NCCL may want more; start the container with --shm-size=1g",
            free >> 20
        )),
        Some(_) => {}
        None => problems.push(format!("{SHARED_MEMORY} cannot be read: the ranks of a host meet there")),
    }
    let model = model.unwrap_or_else(|error| {
        problems.push(format!("{error:#}"));
        None
    });
    let verdict = match (problems.is_empty(), inventory.gpu) {
        (false, _) => Verdict::Problems,
        (true, Presence::Present) => Verdict::Gpu,
        (true, Presence::Absent | Presence::Broken) => Verdict::Cpu,
    };
    Report { verdict, inventory, host, model, problems, notes }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = &self.inventory;
        library(f, "driver", "CUDA ", &found.driver)?;
        library(f, "NVRTC", "", &found.nvrtc)?;
        library(f, "NCCL", "", &found.nccl)?;
        for device in &found.devices {
            let free = device.free_bytes.map_or_else(|| "unknown".to_owned(), gib);
            let (index, name, bus, architecture) = (device.index, &device.name, &device.bus, &device.architecture);
            writeln!(
                f,
                "GPU {index}     {name} at {bus}, {architecture}, {free} free of {}",
                gib(device.memory_bytes)
            )?;
        }
        for link in found.links.iter().filter(|link| link.from < link.to) {
            let how = if link.direct { "directly" } else { "through the host" };
            let atomics = if link.atomics { ", with atomics" } else { "" };
            writeln!(f, "GPUs {}-{}  {how}{atomics}, rank {}", link.from, link.to, link.performance_rank)?;
        }
        let host = &self.host;
        let shared = |bytes: Option<u64>| bytes.map_or_else(|| "unknown".to_owned(), gib);
        let locked =
            host.locked_bytes.map_or_else(|| "without limit".to_owned(), |bytes| format!("{} MiB", bytes >> 20));
        let (free, all) = (shared(host.shared_free_bytes), shared(host.shared_bytes));
        writeln!(
            f,
            "host      {} processors, lockable memory {locked}, {SHARED_MEMORY} {free} free of {all}",
            host.processors
        )?;
        if let Some(Model { directory, layers, experts }) = &self.model {
            writeln!(f, "model     {directory}: complete, {layers} layers of {experts} experts")?;
        }
        self.notes.iter().try_for_each(|note| writeln!(f, "note      {note}"))?;
        self.problems.iter().try_for_each(|problem| writeln!(f, "problem   {problem}"))?;
        f.write_str(match self.verdict {
            Verdict::Gpu => "ready to serve with --backend cuda",
            Verdict::Cpu => "no GPU; ready to serve with --backend cpu",
            Verdict::Problems => "not ready: see the problems above",
        })
    }
}

fn library(f: &mut fmt::Formatter<'_>, name: &str, what: &str, found: &FoundLibrary) -> fmt::Result {
    match (&found.version, &found.path, &found.problem) {
        (Some(version), Some(path), _) => writeln!(f, "{name:<9} {what}{version} at {path}"),
        (_, _, Some(problem)) => writeln!(f, "{name:<9} {problem}"),
        _ => writeln!(f, "{name:<9} unknown"),
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / GIB)
}

#[cfg(test)]
mod tests {
    use phalanx_worker::backend::cuda::inventory::{FoundDevice, Link};

    use super::*;

    fn there() -> FoundLibrary {
        FoundLibrary { path: Some("/lib/x.so".into()), version: Some("12.9".into()), problem: None }
    }

    fn missing(problem: &str) -> FoundLibrary {
        FoundLibrary { path: None, version: None, problem: Some(problem.into()) }
    }

    fn with_gpus(count: u32) -> Inventory {
        let device = |index| FoundDevice {
            index,
            name: "A100".into(),
            bus: format!("0000:{index:02x}:00.0"),
            architecture: "sm_80".into(),
            memory_bytes: 80 << 30,
            free_bytes: Some(79 << 30),
            problem: None,
        };
        let gpu = if count > 0 { Presence::Present } else { Presence::Absent };
        let devices = (0..count).map(device).collect();
        Inventory { gpu, driver: there(), nvrtc: there(), nccl: there(), devices, links: Vec::new() }
    }

    fn host(shared_free_bytes: u64) -> Host {
        let (shared_bytes, shared_free_bytes) = (Some(8 << 30), Some(shared_free_bytes));
        Host { processors: 8, locked_bytes: None, shared_bytes, shared_free_bytes }
    }

    #[test]
    fn a_machine_without_gpu_serves_on_cpus_whatever_else_it_lacks_of_cuda() {
        let inventory = Inventory { driver: missing("no driver"), nccl: missing("no NCCL"), ..with_gpus(0) };
        let report = judge(inventory, host(4 << 30), Ok(None));
        assert_eq!((report.verdict, report.problems.len()), (Verdict::Cpu, 0), "{report}");
        assert!(report.to_string().contains("no driver"), "{report}");
    }

    #[test]
    fn what_several_gpus_lack_is_named() {
        let link = Link { from: 0, to: 1, direct: false, performance_rank: 0, atomics: false };
        let inventory = Inventory { nccl: missing("no NCCL"), links: vec![link], ..with_gpus(2) };
        let report = judge(inventory, host(512 << 20), Ok(None));
        assert_eq!(report.verdict, Verdict::Problems);
        assert!(report.problems.contains(&"no NCCL".to_owned()), "{report}");
        assert!(report.notes.iter().any(|note| note.contains("GPUs 0 and 1")), "{report}");
        assert!(report.notes.iter().any(|note| note.contains("--shm-size")), "{report}");
        let alone = judge(Inventory { nccl: missing("no NCCL"), ..with_gpus(1) }, host(4 << 30), Ok(None));
        assert!(!alone.to_string().contains("problem   no NCCL"), "one GPU needs no NCCL: {alone}");
    }

    #[test]
    fn a_broken_driver_checkpoint_or_shared_memory_is_a_problem() {
        let inventory = Inventory { gpu: Presence::Broken, driver: missing("a stub"), ..with_gpus(0) };
        let model = Err(anyhow::anyhow!("tensor x is missing"));
        let report = judge(inventory, host(1 << 20), model);
        assert_eq!((report.verdict, report.problems.len()), (Verdict::Problems, 3), "{report}");
    }
}
