//! HTTPS: both protocols, certificates of clients, exchanged certificates, and clients that do not play along.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use axum::body::Body;
use hyper_util::rt::{TokioExecutor, TokioIo};
use phalanx_gateway::{Config, config::TlsFiles, run};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Notify,
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};

use super::harness::{Gateway, PATIENCE, nano, start_unready};

const CHAT: &str = r#"{"messages": [{"role": "user", "content": "Spell tree."}]}"#;

/// An authority, and the directory of what it signs.
struct Authority {
    directory: TempDir,
    issuer: Issuer<'static, KeyPair>,
    reload: Arc<Notify>,
}

impl Authority {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        std::fs::write(directory.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        let authority = Self { directory, issuer: Issuer::new(params, key), reload: Arc::default() };
        authority.issue("server");
        authority.issue("client");
        authority
    }

    fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }

    fn issue(&self, name: &str) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(self.path(&format!("{name}.pem")), certificate.pem()).unwrap();
        std::fs::write(self.path(&format!("{name}-key.pem")), key.serialize_pem()).unwrap();
    }

    fn files(&self) -> TlsFiles {
        TlsFiles { certificates: self.path("server.pem"), key: self.path("server-key.pem"), client_authorities: None }
    }

    async fn start(&self, configure: impl FnOnce(&mut Config)) -> Gateway {
        start_unready(|config| {
            config.tls = Some(self.files());
            config.reload = Arc::clone(&self.reload);
            configure(config);
        })
        .await
    }

    /// A client that trusts this authority. `shows`: who signed the certificate that it shows.
    fn client(&self, protocol: &[u8], shows: Option<&Self>) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.path("ca.pem")).unwrap()).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots);
        let mut config = match shows {
            Some(other) => {
                let chain = vec![CertificateDer::from_pem_file(other.path("client.pem")).unwrap()];
                let key = PrivateKeyDer::from_pem_file(other.path("client-key.pem")).unwrap();
                builder.with_client_auth_cert(chain, key).unwrap()
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![protocol.to_vec()];
        Arc::new(config).into()
    }
}

async fn connect(connector: &TlsConnector, address: SocketAddr) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    connector.connect("localhost".try_into().unwrap(), stream).await
}

/// What comes back for a request over HTTP/1.1; nothing when the connection is refused.
async fn over_http1(connector: &TlsConnector, address: SocketAddr, request: &str) -> String {
    let Ok(mut stream) = connect(connector, address).await else { return String::new() };
    let mut answer = Vec::new();
    // A refusal of the client's certificate comes only after the handshake is over for the client.
    let _ = stream.write_all(request.as_bytes()).await;
    let _ = timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("the connection ends");
    String::from_utf8(answer).unwrap()
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
}

async fn until_ready(connector: &TlsConnector, gateway: &Gateway) {
    let ready = async { while !over_http1(connector, gateway.client.0, &get("/readyz")).await.contains("200 OK") {} };
    timeout(PATIENCE, ready).await.expect("the gateway becomes ready");
}

#[tokio::test]
async fn both_protocols_are_spoken_and_the_better_one_is_chosen() {
    let authority = Authority::new();
    let gateway = authority.start(|_| {}).await;
    let plain = authority.client(b"http/1.1", None);
    until_ready(&plain, &gateway).await;
    let length = CHAT.len();
    let post = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {length}\r\n\r\n{CHAT}"
    );
    assert!(over_http1(&plain, gateway.client.0, &post).await.contains("t-r-e-e"));

    let stream = connect(&authority.client(b"h2", None), gateway.client.0).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (mut client, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::post("https://localhost/v1/chat/completions")
        .header("content-type", "application/json")
        .body(Body::from(CHAT))
        .unwrap();
    let response = client.send_request(request).await.unwrap();
    assert_eq!((response.status().as_u16(), response.version()), (200, http::Version::HTTP_2));
    let body = axum::body::to_bytes(Body::new(response.into_body()), 1 << 20).await.unwrap();
    assert!(std::str::from_utf8(&body).unwrap().contains("t-r-e-e"));
}

#[tokio::test]
async fn with_authorities_only_their_clients_are_let_in() {
    let (authority, other) = (Authority::new(), Authority::new());
    let with_authorities = |config: &mut Config| {
        let files = TlsFiles { client_authorities: Some(authority.path("ca.pem")), ..authority.files() };
        config.tls = Some(files);
    };
    let gateway = authority.start(with_authorities).await;
    let known = authority.client(b"http/1.1", Some(&authority));
    until_ready(&known, &gateway).await;
    for stranger in [authority.client(b"http/1.1", None), authority.client(b"http/1.1", Some(&other))] {
        assert_eq!(over_http1(&stranger, gateway.client.0, &get("/livez")).await, "");
    }
    assert!(over_http1(&known, gateway.client.0, &get("/livez")).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_new_certificate_is_shown_to_new_connections_and_a_bad_one_to_none() {
    let authority = Authority::new();
    let gateway = authority.start(|_| {}).await;
    let client = authority.client(b"http/1.1", None);
    let shown = async || {
        let stream = connect(&client, gateway.client.0).await.unwrap();
        stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
    };
    let first = shown().await;
    authority.issue("server");
    authority.reload.notify_one();
    let changed = async { while shown().await == first {} };
    timeout(PATIENCE, changed).await.expect("the certificate is read again");
    let second = shown().await;
    std::fs::write(authority.path("server-key.pem"), "no key").unwrap();
    authority.reload.notify_one();
    for _ in 0..20 {
        assert_eq!(shown().await, second);
    }
}

#[tokio::test]
async fn who_does_not_speak_tls_is_told_or_let_go() {
    let authority = Authority::new();
    let gateway = authority.start(|config| config.timeouts.header = Duration::from_millis(200)).await;
    let answer = gateway.client.get("/livez").await;
    assert_eq!(answer.error(), (400, serde_json::Value::Null, serde_json::json!("https_required")));
    // A handshake that does not go on, and one that never begins.
    for begun in [&[0x16, 3, 1][..], &[]] {
        let mut socket = TcpStream::connect(gateway.client.0).await.unwrap();
        socket.write_all(begun).await.unwrap();
        let mut rest = Vec::new();
        let _ = timeout(PATIENCE, socket.read_to_end(&mut rest)).await.expect("the connection ends");
        assert_eq!(rest, b"");
    }
}

#[tokio::test]
async fn files_that_cannot_be_used_are_named() {
    let authority = Authority::new();
    std::fs::write(authority.path("empty.pem"), "").unwrap();
    authority.issue("other");
    let files = |certificates: &str, key: &str, ca: Option<&str>| TlsFiles {
        certificates: authority.path(certificates),
        key: authority.path(key),
        client_authorities: ca.map(|file| authority.path(file)),
    };
    for (files, named) in [
        (files("missing.pem", "server-key.pem", None), "missing.pem"),
        (files("empty.pem", "server-key.pem", None), "empty.pem"),
        (files("server.pem", "server.pem", None), "server.pem"),
        (files("server.pem", "other-key.pem", None), "other-key.pem"),
        (files("server.pem", "server-key.pem", Some("empty.pem")), "empty.pem"),
    ] {
        let mut config = Config::new("http://127.0.0.1:1", nano());
        config.tls = Some(files);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let error = run(config, listener, Default::default()).await.unwrap_err();
        assert!(format!("{error:#}").contains(named), "{named}: {error:#}");
    }
}
