//! HTTPS: the certificate of the HTTP door, exchanged while connections run.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, RootCertStore, ServerConfig,
        crypto::ring,
        pki_types::{
            CertificateDer, PrivateKeyDer,
            pem::{self, PemObject},
        },
        server::{VerifierBuilderError, WebPkiClientVerifier},
    },
};
use tracing::{info, warn};

/// What clients may speak, the better one first.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// Files in PEM form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate, followed by those that lead to a known authority.
    pub certificates: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
    /// Authorities. With them, only clients that show a certificate of one of them are let in.
    pub client_authorities: Option<PathBuf>,
}

/// Why files cannot be used for HTTPS.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    /// A file cannot be read, or holds nothing of what it should.
    #[error("{path}: expected {expected} in PEM form: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What should stand there.
        expected: &'static str,
        /// Why it cannot be had.
        source: pem::Error,
    },
    /// Certificate and key cannot be used together.
    #[error("{certificates} and {key}: {source}")]
    Pair {
        /// The certificate's file.
        certificates: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// Why.
        source: rustls::Error,
    },
    /// The authorities cannot be used.
    #[error("{path}: {problem}")]
    Authorities {
        /// Their file.
        path: PathBuf,
        /// Why.
        problem: String,
    },
}

/// The certificate of the moment.
pub(crate) struct Tls {
    files: TlsFiles,
    config: RwLock<Arc<ServerConfig>>,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// Names the file that cannot be used.
    pub(crate) fn load(files: TlsFiles) -> Result<Self, TlsError> {
        let config = RwLock::new(Arc::new(server_config(&files)?));
        Ok(Self { files, config })
    }

    /// Reads the files again, for new connections; what was there stays when they cannot be used.
    pub(crate) fn reload(&self) {
        match server_config(&self.files) {
            Ok(config) => {
                *self.config.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
                info!("certificate read again");
            }
            Err(error) => warn!(%error, "the new certificate cannot be used, the old one stays"),
        }
    }

    /// What a new connection is greeted with.
    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        Arc::clone(&self.config.read().unwrap_or_else(PoisonError::into_inner)).into()
    }
}

fn server_config(files: &TlsFiles) -> Result<ServerConfig, TlsError> {
    let TlsFiles { certificates, key, client_authorities } = files;
    let pair = |source| TlsError::Pair { certificates: certificates.clone(), key: key.clone(), source };
    let chain = read_certificates(certificates)?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(wrong(key, "a private key"))?;
    // Named, since a process with two providers in it has no default.
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider));
    let builder = builder.with_safe_default_protocol_versions().map_err(pair)?;
    let builder = match client_authorities {
        Some(path) => {
            let roots = Arc::new(read_authorities(path)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
            let problem = |error: VerifierBuilderError| authorities(path, error);
            builder.with_client_cert_verifier(verifier.map_err(problem)?)
        }
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_single_cert(chain, private).map_err(pair)?;
    config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
    Ok(config)
}

fn wrong(path: &Path, expected: &'static str) -> impl Fn(pem::Error) -> TlsError {
    move |source| TlsError::File { path: path.to_owned(), expected, source }
}

fn authorities(path: &Path, problem: impl ToString) -> TlsError {
    TlsError::Authorities { path: path.to_owned(), problem: problem.to_string() }
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let wrong = wrong(path, "a certificate");
    let found = CertificateDer::pem_file_iter(path).map_err(&wrong)?.collect::<Result<Vec<_>, _>>().map_err(&wrong)?;
    if found.is_empty() { Err(wrong(pem::Error::NoItemsFound)) } else { Ok(found) }
}

fn read_authorities(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in read_certificates(path)? {
        roots.add(certificate).map_err(|error| authorities(path, error))?;
    }
    Ok(roots)
}
