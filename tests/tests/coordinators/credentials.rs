//! An etcd that asks who is there: by certificate, and by user and password.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use phalanx_tests::{
    cluster::{binary, output_of},
    etcd::Etcd,
    parts::Parts,
};
use serde_json::json;

fn openssl(directory: &Path, args: &str) {
    let run =
        Command::new("openssl").args(args.split_whitespace()).current_dir(directory).stderr(Stdio::null()).status();
    assert!(run.unwrap().success(), "openssl {args}");
}

/// An authority, a certificate for etcd on loopback and one for a coordinator.
fn make_certificates(directory: &Path) {
    std::fs::write(directory.join("names"), "subjectAltName=IP:127.0.0.1,DNS:localhost\n").unwrap();
    let authority = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout ca.key -out ca.pem -days 2";
    openssl(directory, &format!("req {authority} -subj /CN=test-authority"));
    for name in ["etcd", "coordinator"] {
        let request =
            format!("-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {name}.key -out {name}.csr");
        openssl(directory, &format!("req {request} -subj /CN={name}"));
        let signing = format!("-in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names");
        openssl(directory, &format!("x509 -req {signing} -out {name}.pem"));
    }
}

fn coordinator_args(etcd: &Etcd) -> String {
    format!("coordinator nano -tp 2 --listen 127.0.0.1:0 --log warn,phalanx_coordinator=info --etcd {}", etcd.url())
}

#[test]
fn an_etcd_behind_tls_takes_a_coordinator_with_a_certificate_and_no_other() {
    let files = tempfile::tempdir().unwrap();
    make_certificates(files.path());
    let file = |name: &str| files.path().join(name).display().to_string();
    let more = ["--client-cert-auth".to_owned(), format!("--trusted-ca-file={}", file("ca.pem"))];
    let own = [format!("--cert-file={}", file("etcd.pem")), format!("--key-file={}", file("etcd.key"))];
    let etcd = Etcd::start_with("https", more.into_iter().chain(own).collect());

    let mut parts = Parts::default();
    let args = format!("{} --etcd-ca {}", coordinator_args(&etcd), file("ca.pem"));
    parts.start("stranger", &args);
    println!("{}", parts.line("stranger", "etcd is lost"));
    let identity = format!("--etcd-cert {} --etcd-key {}", file("coordinator.pem"), file("coordinator.key"));
    parts.start("member", &format!("{args} {identity}"));
    println!("{}", parts.line("member", "elected"));
    assert!(!parts.log("stranger").contains("elected"));

    let (code, _, said) = output_of(Command::new(binary()).args(coordinator_args(&etcd).split_whitespace()));
    assert!(code == Some(78) && said.contains("--etcd-ca"), "{code:?} {said}");
}

#[test]
fn an_etcd_with_users_takes_a_coordinator_with_the_password_and_no_other() {
    let etcd = Etcd::start();
    for (door, body) in [
        ("auth/user/add", json!({"name": "root", "password": "of-root"})),
        ("auth/user/grant", json!({"user": "root", "role": "root"})),
        ("auth/user/add", json!({"name": "phalanx", "password": "right"})),
        ("auth/role/add", json!({"name": "phalanx"})),
        // Keys from "/phalanx/" up to, not including, "/phalanx0".
        (
            "auth/role/grant",
            json!({"name": "phalanx", "perm": {"permType": 2, "key": "L3BoYWxhbngv", "range_end": "L3BoYWxhbngw"}}),
        ),
        ("auth/user/grant", json!({"user": "phalanx", "role": "phalanx"})),
        ("auth/enable", json!({})),
    ] {
        let answer = etcd.call(door, &body);
        assert!(answer.get("error").is_none(), "{door}: {answer}");
    }
    let command = |password: Option<&str>, more: &str| {
        let mut command = Command::new(binary());
        command.args(format!("{} {more}", coordinator_args(&etcd)).split_whitespace());
        if let Some(password) = password {
            command.env("PHALANX_ETCD_PASSWORD", password);
        }
        command
    };
    for (password, more, says) in [
        (Some("wrong"), "--etcd-user phalanx", "invalid user ID or password"),
        (None, "--etcd-user phalanx", "PHALANX_ETCD_PASSWORD"),
        (None, "", "user name is empty"),
        (Some("right"), "--etcd-user phalanx --etcd-prefix /elsewhere", "permission denied"),
    ] {
        let (code, _, said) = output_of(&mut command(password, more));
        assert!(code == Some(78) && said.contains(says), "{says}: {code:?} {said}");
        assert!(password.is_none_or(|password| !said.contains(password)), "{said}");
    }
    let mut parts = Parts::default();
    parts.launch("member", command(Some("right"), "--etcd-user phalanx"));
    println!("{}", parts.line("member", "elected"));
}
