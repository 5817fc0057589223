//! Measures the collective of CPU ranks on this machine, each rank a process of its own.
//!
//! `cargo run --release -p phalanx-worker --example allreduce`

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use phalanx_worker::collective::Collective;
use phalanx_worker::collective::host::{HostCollective, Preparation, host_identity};

const TIMEOUT: Duration = Duration::from_secs(10);
const WARM_UP: usize = 200;
/// The hidden state of one token of the released models, and a megabyte: 91 tokens.
const SIZES: [(usize, usize); 2] = [(2880, 5000), (1 << 18, 500)];

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [rank, host] = &arguments[..] {
        return be_rank(rank.parse()?, host);
    }
    println!("world  link           floats   min us   p50 us   p99 us");
    for world_size in [2, 4] {
        for shared in [true, false] {
            measure(world_size, shared)?;
        }
    }
    Ok(())
}

/// Starts the ranks, tells each of all, and lets rank 0 print.
fn measure(world_size: usize, shared: bool) -> Result<()> {
    let here = host_identity()?;
    let mut ranks: Vec<Child> = Vec::new();
    for rank in 0..world_size {
        let host = if shared { here.clone() } else { format!("{here} {rank}") };
        let mut command = Command::new(std::env::current_exe()?);
        command.args([&rank.to_string(), &host]).stdin(Stdio::piped()).stdout(Stdio::piped());
        ranks.push(command.spawn()?);
    }
    let mut outputs = Vec::new();
    let mut all = String::new();
    for rank in &mut ranks {
        let mut output = BufReader::new(rank.stdout.take().context("a rank has no output")?).lines();
        all += &output.next().context("a rank has ended")??;
        all.push(' ');
        outputs.push(output);
    }
    for rank in &mut ranks {
        let mut input = rank.stdin.take().context("a rank has no input")?;
        writeln!(input, "{}", all.trim())?;
    }
    for line in outputs.swap_remove(0) {
        println!("{}", line?);
    }
    for mut rank in ranks {
        ensure!(rank.wait()?.success(), "a rank has failed");
    }
    Ok(())
}

fn be_rank(rank: usize, host: &str) -> Result<()> {
    let preparation = Preparation::new(1, rank as u64, host, IpAddr::V4(Ipv4Addr::LOCALHOST))?;
    let own: Vec<String> = preparation.rendezvous().iter().map(|byte| format!("{byte:02x}")).collect();
    println!("{}", own.concat());
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    let all = line.split_whitespace().map(unhex).collect::<Result<Vec<_>>>()?;
    let mut collective = preparation.form(rank, &all, TIMEOUT)?;
    for (floats, rounds) in SIZES {
        let mut times = time(&mut collective, floats, rounds)?;
        times.sort_unstable();
        let at = |share: usize| times[(times.len() - 1) * share / 100].as_secs_f64() * 1e6;
        if rank == 0 {
            let link = format!("{:?}", collective.link());
            let world_size = collective.world_size();
            println!("{world_size:>5}  {link:<12} {floats:>8} {:>8.1} {:>8.1} {:>8.1}", at(0), at(50), at(99));
        }
    }
    Ok(())
}

fn time(collective: &mut HostCollective, floats: usize, rounds: usize) -> Result<Vec<Duration>> {
    let mut values = vec![0.0; floats];
    let mut times = Vec::with_capacity(rounds);
    for round in 0..WARM_UP + rounds {
        values.fill(1.0);
        let start = Instant::now();
        collective.all_reduce_sum(&mut values)?;
        if round >= WARM_UP {
            times.push(start.elapsed());
        }
        ensure!(values.iter().all(|&value| value == collective.world_size() as f32), "a wrong sum");
    }
    Ok(times)
}

fn unhex(text: &str) -> Result<Vec<u8>> {
    let digits = |at: usize| text.get(at..at + 2).context("half a byte");
    (0..text.len()).step_by(2).map(|at| Ok(u8::from_str_radix(digits(at)?, 16)?)).collect()
}
