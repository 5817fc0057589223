//! TLS between components: the authority that `phalanx ca` makes, who is let in, what each role may call, and what both
//! sides are told when they do not fit.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use phalanx_proto::{
    fault::Fault,
    tls::{Identity, Role},
    v1::{
        GenerateRequest, Hello, ModelsRequest, WorkerEvent, cluster_client::ClusterClient,
        inference_client::InferenceClient, worker_event::Event,
    },
};
use phalanx_tests::{
    cluster::{Cluster, binary, output_of},
    parts::{Parts, generate, request, until_ready},
};
use tempfile::TempDir;
use tonic::{
    Code, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint},
};

/// Runs `phalanx ca` with arguments separated by blanks; exit code, standard output and error.
fn ca(arguments: &str) -> (Option<i32>, String, String) {
    output_of(Command::new(binary()).arg("ca").args(arguments.split_whitespace()))
}

/// A fresh authority.
fn authority(more: &str) -> (TempDir, PathBuf) {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("tls");
    let (code, stdout, stderr) = ca(&format!("{} {more}", directory.display()));
    assert_eq!(code, Some(0), "{stdout}{stderr}");
    (parent, directory)
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn an_authority_is_made_once_and_added_to_later() {
    let (parent, directory) = authority("--host gpu1.example 10.1.2.3");
    for name in ["ca", "coordinator", "worker", "gateway", "client"] {
        assert_eq!(mode(&directory.join(format!("{name}-key.pem"))), 0o600, "{name}: only its owner may read a key");
        assert_eq!(mode(&directory.join(format!("{name}.pem"))), 0o644);
    }
    let before = std::fs::read(directory.join("worker-key.pem")).unwrap();
    let (code, _, stderr) = ca(&directory.display().to_string());
    assert!(code != Some(0) && stderr.contains("nothing is overwritten") && stderr.contains("--issue"), "{stderr}");
    assert_eq!(std::fs::read(directory.join("worker-key.pem")).unwrap(), before);

    let other = parent.path().join("host2");
    let (code, _, stderr) = ca(&format!("{} --issue worker --out {}", directory.display(), other.display()));
    assert_eq!(code, Some(0), "{stderr}");
    let names: std::collections::BTreeSet<_> =
        std::fs::read_dir(&other).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(names.iter().collect::<Vec<_>>(), ["ca.pem", "worker-key.pem", "worker.pem"]);
    Identity::load(&other, Role::Worker).unwrap();
    let wrong = Identity::load(&other, Role::Gateway).unwrap_err().to_string();
    assert!(wrong.contains("gateway.pem"), "{wrong}");

    let (code, _, stderr) = ca(&format!("{} --host bad_host!", parent.path().join("x").display()));
    assert!(code != Some(0) && stderr.contains("bad_host!"), "{stderr}");
    let (code, _, stderr) =
        ca(&format!("{} --issue worker --out {}", other.display(), parent.path().join("y").display()));
    assert!(code != Some(0) && stderr.contains("ca-key.pem"), "{stderr}");
}

#[test]
fn files_that_do_not_belong_together_are_named() {
    let ((_one, ours), (_two, theirs)) = (authority(""), authority(""));
    std::fs::copy(theirs.join("worker-key.pem"), ours.join("worker-key.pem")).unwrap();
    let error = Identity::load(&ours, Role::Worker).unwrap_err().to_string();
    assert!(error.contains("worker-key.pem") && error.contains("not the key"), "{error}");
    std::fs::copy(theirs.join("gateway.pem"), ours.join("gateway.pem")).unwrap();
    let error = Identity::load(&ours, Role::Gateway).unwrap_err().to_string();
    assert!(error.contains("gateway.pem") && error.contains("not signed"), "{error}");
    std::fs::copy(ours.join("worker.pem"), ours.join("client.pem")).unwrap();
    let error = Identity::load(&ours, Role::Client).unwrap_err().to_string();
    assert!(error.contains("worker's certificate"), "{error}");
    std::fs::write(ours.join("coordinator.pem"), "not a certificate").unwrap();
    let error = Identity::load(&ours, Role::Coordinator).unwrap_err().to_string();
    assert!(error.contains("coordinator.pem"), "{error}");
    let shown = format!("{:?}", Identity::load(&theirs, Role::Client).unwrap());
    assert!(!shown.contains("PRIVATE KEY") && !shown.contains("45, 45, 45"), "{shown}");
}

#[test]
fn a_whole_cluster_speaks_tls_between_its_processes() {
    let (_parent, directory) = authority("");
    let mut cluster = Cluster::start(&["--tls", directory.to_str().unwrap()]);
    let curl = cluster.banner.split("\ntry: ").nth(1).unwrap().trim().to_owned();
    let (code, stdout, stderr) = output_of(Command::new("sh").args(["-c", &curl]));
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.contains("Paris"), "{stdout}");
    assert_eq!(cluster.stop(), Some(0));
}

async fn channel(address: &str, directory: &Path, role: Role) -> Channel {
    let endpoint = Endpoint::from_shared(format!("https://{address}")).unwrap();
    Identity::load(directory, role).unwrap().secure(endpoint).unwrap().connect_lazy()
}

async fn models(channel: Channel) -> Result<(), Status> {
    InferenceClient::new(channel).models(ModelsRequest {}).await.map(drop)
}

async fn attach(channel: Channel) -> Result<(), Status> {
    let hello = WorkerEvent { event: Some(Event::Hello(Hello::default())) };
    ClusterClient::new(channel).attach(tokio_stream::iter([hello])).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_role_may_call_its_own_service_and_strangers_none() {
    let ((_one, ours), (_two, theirs)) = (authority(""), authority(""));
    let mut parts = Parts::default();
    let address = parts.coordinator(&format!("--tls {}", ours.display())).to_string();
    for (role, inference, cluster) in [
        (Role::Client, Code::Ok, Code::PermissionDenied),
        (Role::Gateway, Code::Ok, Code::PermissionDenied),
        // An empty hello is let in and then found invalid.
        (Role::Worker, Code::PermissionDenied, Code::InvalidArgument),
        (Role::Coordinator, Code::PermissionDenied, Code::PermissionDenied),
    ] {
        let code = |outcome: Result<(), Status>| outcome.map_or_else(|status| status.code(), |()| Code::Ok);
        // A coordinator's certificate is for servers only: the connection itself fails.
        let refused = |code| role == Role::Coordinator && code != Code::Ok;
        let found = code(models(channel(&address, &ours, role).await).await);
        assert!(found == inference || refused(found), "{role} calls Inference: {found:?}");
        let found = code(attach(channel(&address, &ours, role).await).await);
        assert!(found == cluster || refused(found), "{role} calls Cluster: {found:?}");
    }
    let status = models(channel(&address, &theirs, Role::Client).await).await.unwrap_err();
    println!("a client of another authority: {status}");
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    parts.line("coordinator", "a worker's certificate does not open Inference");
    parts.line("coordinator", "a client's certificate does not open Cluster");

    let bare =
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(std::fs::read(ours.join("ca.pem")).unwrap()));
    let bare = Endpoint::from_shared(format!("https://{address}")).unwrap().tls_config(bare).unwrap().connect_lazy();
    let status = models(bare).await.unwrap_err();
    println!("a client without a certificate: {status}");
    parts.line("coordinator", "it shows no certificate: start it with --tls");
    // A call that is made only after the refusal has come finds the connection gone, and no words for it.
    let mut told = Vec::new();
    for _ in 0..5 {
        let plain = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
        told.push(Fault::from(&models(plain).await.unwrap_err()).message);
    }
    println!("clients without TLS: {told:?}");
    assert!(told.iter().any(|message| message.contains("--tls")), "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_does_not_fit_and_its_coordinator_both_say_why() {
    let ((_one, ours), (_two, theirs)) = (authority(""), authority(""));
    let mut parts = Parts::default();
    let (ours, theirs) = (ours.display().to_string(), theirs.display().to_string());
    let guarded = parts.coordinator(&format!("--tls {ours}"));
    parts.worker("foreign", 0, &format!("https://{guarded}"), &format!("--tls {theirs}"));
    parts.worker("plain", 0, &format!("http://{guarded}"), "");
    // The foreign worker already refuses the coordinator; so does the coordinator the plain one.
    let line = parts.line("foreign", "no coordinator");
    assert!(line.contains("another authority has signed its certificate"), "{line}");
    parts.line("plain", "it wants TLS: start this process with --tls");
    parts.line("coordinator", "it does not speak TLS; start the other side with --tls");
    parts.line("coordinator", "connection refused: it knows another authority");

    // A worker with TLS meets a coordinator without.
    let mut plain = Parts::default();
    let open = plain.coordinator("");
    plain.worker("worker", 0, &format!("https://{open}"), &format!("--tls {ours}"));
    let line = plain.line("worker", "no coordinator");
    assert!(line.contains("the other side does not speak TLS"), "{line}");

    // A coordinator at an address that its certificate does not name.
    let mut elsewhere = Parts::default();
    elsewhere.start(
        "coordinator",
        &format!("coordinator nano --listen 127.0.0.2:0 --tls {ours} --log warn,phalanx_coordinator=info"),
    );
    let line = elsewhere.line("coordinator", "coordinator listens");
    let address = line.split("address=").nth(1).and_then(|rest| rest.split_whitespace().next()).unwrap().to_owned();
    elsewhere.worker("worker", 0, &format!("https://{address}"), &format!("--tls {ours}"));
    let line = elsewhere.line("worker", "no coordinator");
    assert!(line.contains("does not name this host") && line.contains("127.0.0.2"), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_and_clients_with_certificates_generate() {
    let (_parent, directory) = authority("");
    let (mut parts, tls) = (Parts::default(), format!("--tls {}", directory.display()));
    let address = parts.coordinator(&tls);
    for rank in 0..2 {
        // Without a scheme it follows from --tls.
        parts.worker(&format!("worker {rank}"), rank, &address.to_string(), &tls);
    }
    let client = InferenceClient::new(channel(&address.to_string(), &directory, Role::Client).await);
    until_ready(&client).await;
    let tokens = generate(client.clone(), request(1, 16), |_| {}).await.unwrap();
    assert_eq!(tokens.len(), 16);
    let empty = client.clone().generate(GenerateRequest::default()).await.unwrap_err();
    assert_eq!(empty.code(), Code::InvalidArgument, "beyond the door the usual checks go on: {empty}");

    // What a process goes by stands in its log, without what is secret.
    let shown = parts.line("coordinator", "configuration");
    assert!(shown.contains("Identity") && shown.contains("max_num_seqs"), "{shown}");
    let key = std::fs::read_to_string(directory.join("coordinator-key.pem")).unwrap();
    let log = parts.log("coordinator");
    assert!(key.lines().filter(|line| !line.starts_with('-')).all(|line| !log.contains(line)), "{log}");
}

#[test]
fn what_cannot_be_meant_is_refused_with_the_flag_named() {
    let (_parent, directory) = authority("");
    let tls = directory.display().to_string();
    let cases = [
        ("coordinator nano --listen 0.0.0.0:0".to_owned(), "--tls DIR"),
        (format!("worker nano --coordinator http://127.0.0.1:1 --tls {tls}"), "https://"),
        ("worker nano --coordinator https://127.0.0.1:1".to_owned(), "--tls is not given"),
        (format!("gateway nano --port 0 --coordinator http://127.0.0.1:1 --tls {tls}"), "https://"),
        ("coordinator nano --listen 127.0.0.1:0 --tls /nonexistent".to_owned(), "/nonexistent/ca.pem"),
        ("serve --port 0 --tls /nonexistent".to_owned(), "/nonexistent/ca.pem"),
    ];
    for (arguments, sign) in cases {
        let mut command = Command::new("timeout");
        command.arg("30").arg(binary()).args(arguments.split_whitespace());
        let (code, _, stderr) = output_of(&mut command);
        assert_eq!(code, Some(78), "{arguments}: {stderr}");
        assert!(stderr.contains(sign), "{arguments}: {stderr}");
    }
}

/// The supervisor is killed without a chance to end its children; they end by themselves.
#[test]
fn no_child_outlives_a_supervisor_that_is_killed() {
    let cluster = Cluster::start(&[]);
    let children: Vec<u32> =
        [" coordinator ", " gateway ", "--rank=0", "--rank=1"].iter().flat_map(|role| cluster.children(role)).collect();
    assert_eq!(children.len(), 4);
    assert!(Command::new("kill").args(["-KILL", &cluster.pid().to_string()]).status().unwrap().success());
    let is_running = |pid: &&u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // A zombie that nobody has waited for yet has ended all the same.
        !stat.is_empty() && !stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z'))
    };
    let start = std::time::Instant::now();
    while let Some(pid) = children.iter().find(is_running) {
        assert!(start.elapsed() < Duration::from_secs(2), "process {pid} outlived its supervisor");
        std::thread::sleep(Duration::from_millis(10));
    }
    println!("4 children ended {:.0?} after their supervisor was killed", start.elapsed());
}
