//! Real clients against a real cluster of two ranks.

use std::{net::TcpListener, process::Command};

use phalanx_tests::{
    cluster::{Cluster, output_of},
    python, root,
};

fn script(name: &str, args: &[&str]) {
    let path = root().join("tests/python").join(name);
    let (code, stdout, stderr) = output_of(Command::new(python()).arg(path).args(args));
    println!("{stdout}");
    assert_eq!(code, Some(0), "{stdout}\n{stderr}");
}

#[test]
fn the_official_openai_client_is_served() {
    let cluster = Cluster::start(&["-tp", "2", "--current-date", "2026-01-15"]);
    script("openai_client.py", &[&cluster.url, "nano"]);
}

#[test]
fn a_grpc_client_that_knows_only_the_address_generates_and_aborts() {
    // Asked for and given back at once; another process could take the port in between.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let _cluster = Cluster::start(&["-tp", "2", "--grpc-port", &port]);
    script("grpc_client.py", &[&format!("127.0.0.1:{port}"), "3059,304,3061,779,510"]);
}
