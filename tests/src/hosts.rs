//! Hosts as network namespaces on one wire, which a test can cut.

use std::{
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use crate::cluster::{binary, output_of};

/// Distinguishes the hosts of one test process.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// Two hosts, 10.0.0.1 and 10.0.0.2. They are gone when this is dropped; their processes must end before.
pub struct TwoHosts {
    names: [String; 2],
    wires: [String; 2],
}

impl Default for TwoHosts {
    fn default() -> Self {
        Self::new()
    }
}

impl TwoHosts {
    /// Lays the wire. Needs root.
    ///
    /// # Panics
    /// When a namespace or the wire cannot be made.
    pub fn new() -> Self {
        // Names of interfaces have at most 15 characters.
        let id = format!("{}{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let hosts = Self {
            names: ["a", "b"].map(|end| format!("phx{id}{end}")),
            wires: ["a", "b"].map(|end| format!("vx{id}{end}")),
        };
        let ([a, b], [wire_a, wire_b]) = (&hosts.names, &hosts.wires);
        ip(&format!("netns add {a}"));
        ip(&format!("netns add {b}"));
        ip(&format!("link add {wire_a} netns {a} type veth peer name {wire_b} netns {b}"));
        for (index, (name, wire)) in hosts.names.iter().zip(&hosts.wires).enumerate() {
            ip(&format!("-n {name} addr add 10.0.0.{}/24 dev {wire}", index + 1));
            ip(&format!("-n {name} link set {wire} up"));
            ip(&format!("-n {name} link set lo up"));
        }
        hosts
    }

    /// A command that runs the binary under test on a host, with arguments separated by blanks.
    pub fn phalanx(&self, host: usize, args: &str) -> Command {
        let mut command = self.command(host, &binary().display().to_string());
        command.args(args.split_whitespace());
        command
    }

    /// A command that runs `program` on a host.
    pub fn command(&self, host: usize, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[host], program]);
        command
    }

    /// Pulls the plug of the second host: nothing passes, and nobody is told.
    pub fn cut(&self) {
        ip(&format!("-n {} link set {} down", self.names[1], self.wires[1]));
    }

    /// Plugs it in again.
    pub fn mend(&self) {
        ip(&format!("-n {} link set {} up", self.names[1], self.wires[1]));
    }
}

impl Drop for TwoHosts {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

#[track_caller]
fn ip(arguments: &str) {
    let (code, _, stderr) = output_of(Command::new("ip").args(arguments.split_whitespace()));
    assert_eq!(code, Some(0), "ip {arguments} (network namespaces need root): {stderr}");
}
