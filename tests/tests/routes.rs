//! Who gets in: every route of the real gateway against every kind of credential, keys read again while it runs, and a
//! default start that nobody outside this host can reach.

use std::{
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use phalanx_tests::cluster::{Cluster, binary, output_of};
use serde_json::{Value, json};

const START_TIMEOUT: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(20);

/// Keys as an operator makes them, and the file with their entries.
struct Keys {
    directory: tempfile::TempDir,
    entries: Vec<String>,
}

impl Keys {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap(), entries: Vec::new() }
    }

    /// Makes a key with `phalanx key`, which says it to the person and its entry to the file.
    fn make(&mut self, args: &[&str]) -> String {
        let (code, entry, said) = output_of(Command::new(binary()).arg("key").args(args));
        assert_eq!(code, Some(0), "{said}");
        let key = said.split_whitespace().find(|word| word.starts_with("sk-")).unwrap().to_owned();
        assert!(!entry.contains(&key), "the file holds no key");
        self.entries.push(entry);
        self.write();
        key
    }

    fn write(&self) {
        std::fs::write(self.path(), format!("keys:\n{}", self.entries.concat())).unwrap();
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("keys.yaml")
    }

    fn start(&self) -> Cluster {
        let mut command = serve(&["--port", "0"]);
        command.arg("--api-key-file").arg(self.path());
        Cluster::launch(command, START_TIMEOUT)
    }
}

fn serve(args: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.arg("serve").args(args).env_remove("PHALANX_API_KEY").env_remove("PHALANX_API_KEY_FILE");
    command
}

/// Status, head and body of an answer.
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn code(&self) -> Value {
        serde_json::from_str::<Value>(&self.body).unwrap_or_default()["error"]["code"].clone()
    }
}

/// `headers` are whole lines.
fn ask(cluster: &Cluster, route: &str, headers: &str, body: &str) -> Answer {
    let mut stream = TcpStream::connect(cluster.url.trim_start_matches("http://")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = format!(
        "{route} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{headers}content-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{route}: {text:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head: head.to_lowercase(), body: body.to_owned() }
}

fn bearer(key: &str) -> String {
    format!("Authorization: Bearer {key}\r\n")
}

/// The router's own list: methods and paths, with a name in the place of a wildcard.
fn routes(cluster: &Cluster, key: &str) -> Vec<String> {
    let root: Value = serde_json::from_str(&ask(cluster, "GET /", &bearer(key), "").body).unwrap();
    let routes = root["endpoints"].as_array().unwrap().iter().map(|route| route.as_str().unwrap());
    routes.map(|route| route.replace("{*id}", "nano")).collect()
}

/// A body that the route accepts.
fn body_of(route: &str) -> String {
    let body = match route {
        "POST /v1/chat/completions" => json!({"messages": [{"role": "user", "content": "Hi."}], "max_tokens": 2}),
        "POST /v1/completions" | "POST /tokenize" => json!({"prompt": "Hi.", "max_tokens": 2}),
        "POST /detokenize" => json!({"tokens": [1, 2]}),
        route if route.starts_with("GET ") => return String::new(),
        other => panic!("no body is known for {other}"),
    };
    body.to_string()
}

#[test]
fn every_route_but_livez_asks_for_a_key() {
    let mut keys = Keys::new();
    let right = keys.make(&["alice"]);
    let other = keys.make(&["bob", "--models", "another-model"]);
    let cluster = keys.start();
    let routes = routes(&cluster, &right);
    assert!(routes.len() >= 13 && routes.contains(&"POST /v1/chat/completions".to_owned()), "{routes:?}");

    let wrong_case = right.to_uppercase();
    let half = &right[..right.len() - 1];
    let bad = [
        String::new(),
        "Authorization:\r\n".to_owned(),
        "Authorization: Bearer\r\n".to_owned(),
        "Authorization: Bearer \r\n".to_owned(),
        format!("Authorization: Bearer{right}\r\n"),
        format!("Authorization: {right}\r\n"),
        format!("Authorization: Basic {right}\r\n"),
        format!("Authorization: Token {right}\r\n"),
        format!("X-Api-Key: {right}\r\n"),
        bearer("sk-wrong"),
        bearer(&wrong_case),
        bearer(half),
        bearer(&format!("{right}0")),
        bearer(&format!("{right},{right}")),
        bearer("\u{ff}\u{fe}"),
    ];
    // Nobody without a key learns which paths there are.
    let unknown = ["GET /v1/nothing", "DELETE /v1/models", "GET /livez/", "PUT /livez/x", "OPTIONS /stats"];
    let mut refused = 0;
    for route in routes.iter().map(String::as_str).chain(unknown) {
        let body = if unknown.contains(&route) { String::new() } else { body_of(route) };
        for credential in &bad {
            let answer = ask(&cluster, route, credential, &body);
            if route == "GET /livez" {
                assert_eq!(answer.status, 200, "{route} {credential:?}");
                continue;
            }
            assert_eq!((answer.status, answer.code()), (401, json!("invalid_api_key")), "{route} {credential:?}");
            assert!(answer.head.contains("www-authenticate: bearer"), "{}", answer.head);
            assert!(!answer.body.contains(&right[..10]), "{}", answer.body);
            refused += 1;
        }
        let with_key = ask(&cluster, route, &bearer(&right), &body).status;
        assert!(if unknown.contains(&route) { [404, 405].contains(&with_key) } else { with_key == 200 }, "{route}");
        let is_about_a_model = route.starts_with("POST /") || route.starts_with("GET /v1/models/");
        let answer = ask(&cluster, route, &bearer(&other), &body);
        if is_about_a_model && !unknown.contains(&route) {
            assert_eq!((answer.status, answer.code()), (403, json!("model_not_allowed")), "{route}");
        } else {
            assert_eq!(answer.status, with_key, "{route}");
        }
    }
    // The scheme's name has no case.
    assert_eq!(ask(&cluster, "GET /version", &format!("authorization: bEaReR  {right}\r\n"), "").status, 200);
    println!(
        "{} routes and {} other paths, {} credentials: {refused} refusals",
        routes.len(),
        unknown.len(),
        bad.len()
    );
}

#[test]
fn keys_are_read_again_on_sighup_and_a_bad_file_changes_nothing() {
    let mut keys = Keys::new();
    let first = keys.make(&["alice"]);
    let mut cluster = keys.start();
    let hang_up = |cluster: &Cluster| {
        let pid = cluster.pid().to_string();
        assert!(Command::new("kill").args(["-HUP", &pid]).status().unwrap().success());
    };
    let until = |cluster: &Cluster, key: &str, status: u16| {
        let deadline = Instant::now() + PATIENCE;
        while ask(cluster, "GET /version", &bearer(key), "").status != status {
            assert!(Instant::now() < deadline, "the key file was not read again");
        }
    };
    std::fs::write(keys.path(), "keys: nonsense").unwrap();
    hang_up(&cluster);
    for _ in 0..20 {
        assert_eq!(ask(&cluster, "GET /version", &bearer(&first), "").status, 200);
    }
    let second = keys.make(&["bob"]);
    hang_up(&cluster);
    until(&cluster, &second, 200);
    keys.entries.remove(0);
    keys.write();
    hang_up(&cluster);
    until(&cluster, &first, 401);
    assert_eq!(ask(&cluster, "GET /version", &bearer(&second), "").status, 200);
    assert_eq!(cluster.stop(), Some(0));
}

#[test]
fn after_a_default_start_only_this_host_can_connect() {
    let cluster = Cluster::launch(serve(&["--port", "0"]), START_TIMEOUT);
    let mut pids = cluster.children("");
    pids.push(cluster.pid());
    let (code, text, errors) = output_of(Command::new("ss").args(["-Hltunp"]));
    assert_eq!(code, Some(0), "{errors}");
    let ours = |line: &&str| pids.iter().any(|pid| line.contains(&format!("pid={pid},")));
    let sockets: Vec<&str> = text.lines().filter(ours).collect();
    assert!(sockets.len() >= 2, "the HTTP and the gRPC door: {text}");
    for socket in sockets {
        let local = socket.split_whitespace().nth(4).unwrap();
        assert!(local.starts_with("127.0.0.1:") || local.starts_with("[::1]:"), "{socket}");
        println!("{local}");
    }
}

fn refused(command: &mut Command) -> String {
    let (code, _, errors) = output_of(command);
    assert_eq!(code, Some(78), "{command:?} was not refused: {errors}");
    errors
}

#[test]
fn what_would_stand_open_or_show_a_key_is_refused() {
    let open = ["--host", "0.0.0.0", "--port", "0"];
    let line = refused(&mut serve(&open));
    assert!(["--api-key-file", "PHALANX_API_KEY", "--insecure-bind"].iter().all(|way| line.contains(way)), "{line}");
    let line = refused(&mut serve(&["--api-key", "sk-secret", "--port", "0"]));
    assert!(line.contains("PHALANX_API_KEY") && !line.contains("sk-secret"), "{line}");
    let line = refused(serve(&["--port", "0"]).env("PHALANX_API_KEY", "two words"));
    assert!(line.contains("PHALANX_API_KEY") && !line.contains("two words"), "{line}");
    let line = refused(&mut serve(&["--port", "0", "--api-key-file", "no-such-file.yaml"]));
    assert!(line.contains("no-such-file.yaml"), "{line}");
    let line = refused(&mut serve(&["--port", "0", "--ssl-certfile", "no-such-certificate.pem"]));
    assert!(line.contains("no-such-certificate.pem"), "{line}");
    let line = refused(&mut serve(&["--port", "0", "--ssl-ca-certs", "ca.pem"]));
    assert!(line.contains("--ssl-certfile"), "{line}");

    let cluster = Cluster::launch(
        {
            let mut command = serve(&open);
            command.env("PHALANX_API_KEY", "sk-one, sk-two");
            command
        },
        START_TIMEOUT,
    );
    assert_eq!(ask(&cluster, "GET /readyz", "", "").status, 401);
    assert_eq!(ask(&cluster, "GET /readyz", &bearer("sk-two"), "").status, 200);
    for pid in cluster.children("").into_iter().chain([cluster.pid()]) {
        let arguments = std::fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")).unwrap();
        assert!(!String::from_utf8_lossy(&arguments).contains("sk-"), "a key on a command line");
    }
}
