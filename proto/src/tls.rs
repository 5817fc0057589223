//! TLS between components: one private authority, and a role in every certificate.
//!
//! A component is told one directory, as `phalanx ca` makes it, and takes from it:
//!
//! | file | holds |
//! | --- | --- |
//! | `ca.pem` | certificates of the authority: whom these have signed is let in |
//! | `ROLE.pem` | this component's certificate, followed by intermediates if there are any |
//! | `ROLE-key.pem` | its private key (PKCS#8) |
//!
//! The role stands in the certificate as a URI name, `phalanx://worker`, and says which doors open. Only a coordinator's
//! certificate may be shown by a server (extended key usage), so no other one can pass for a coordinator.
//!
//! This is the only module of the contract that reads files beside [`checkpoint`](crate::checkpoint): what a certificate
//! has to say is part of what the processes agree on, and all of them read it alike.

use std::{
    error::Error,
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::WebPkiClientVerifier,
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};
use thiserror::Error;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};
use webpki::{EndEntityCert, KeyUsage};

/// Name of the authority's certificate in a directory of TLS files.
pub const AUTHORITY_FILE: &str = "ca.pem";
/// Longest chain of intermediates that is read.
const MAX_CERTIFICATES: usize = 16;
/// Before the role's name in a certificate.
const ROLE_SCHEME: &str = "phalanx://";

/// What a certificate's holder is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Serves both doors.
    Coordinator,
    /// Holds a rank.
    Worker,
    /// Speaks HTTP to the world and `Inference` to a coordinator.
    Gateway,
    /// Any other client of `Inference`.
    Client,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Coordinator, Self::Worker, Self::Gateway, Self::Client];

    /// The name in certificates and of files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Worker => "worker",
            Self::Gateway => "gateway",
            Self::Client => "client",
        }
    }

    /// The URI name of its certificates.
    pub fn uri(self) -> String {
        format!("{ROLE_SCHEME}{}", self.name())
    }

    /// Whether this role may call the service.
    pub fn may_call(self, door: Door) -> bool {
        match door {
            Door::Inference => matches!(self, Self::Gateway | Self::Client),
            Door::Cluster => self == Self::Worker,
        }
    }

    /// The role that a certificate names.
    ///
    /// # Errors
    /// When it cannot be read, or names no role or more than one.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self, String> {
        let parsed = EndEntityCert::try_from(certificate).map_err(|error| format!("it cannot be read: {error}"))?;
        let mut roles = parsed.valid_uri_names().filter_map(|uri| uri.strip_prefix(ROLE_SCHEME));
        match (roles.next(), roles.next()) {
            (Some(role), None) => role.parse(),
            (None, _) => Err(format!("it names no role; expected a URI name such as {}", Self::Worker.uri())),
            (Some(_), Some(_)) => Err("it names more than one role".to_owned()),
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("role {text:?} is none of coordinator, worker, gateway, client");
        Self::ALL.into_iter().find(|role| role.name() == text).ok_or_else(expected)
    }
}

/// A coordinator's services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// Tokens in, tokens out.
    Inference,
    /// For workers.
    Cluster,
}

/// Why TLS files are refused.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{path}: {source}; `phalanx ca` makes this file")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path}: {reason}")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// One component's TLS files, read and checked. Shown without its key.
#[derive(Clone)]
pub struct Identity {
    role: Role,
    directory: PathBuf,
    authority_pem: Vec<u8>,
    certificate_pem: Vec<u8>,
    key_pem: Vec<u8>,
    roots: Vec<CertificateDer<'static>>,
    own: Arc<CertifiedKey>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { role, directory, .. } = self;
        f.debug_struct("Identity").field("role", role).field("directory", directory).finish_non_exhaustive()
    }
}

impl Identity {
    /// Reads the files of `role` in `directory` and checks that they belong together and are valid now.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn load(directory: &Path, role: Role) -> Result<Self, TlsError> {
        let [authority, certificate, key] = files_of(role).map(|name| directory.join(name));
        let (authority_pem, certificate_pem, key_pem) = (read(&authority)?, read(&certificate)?, read(&key)?);
        let roots = certificates(&authority, &authority_pem)?;
        let chain = certificates(&certificate, &certificate_pem)?;
        check_chain(&chain, &roots, role).map_err(|reason| unusable(&certificate, reason))?;
        let private = PrivateKeyDer::from_pem_slice(&key_pem).map_err(|error| unusable(&key, error))?;
        let provider = Arc::new(ring::default_provider());
        let own = CertifiedKey::from_der(chain, private, &provider)
            .map_err(|error| unusable(&key, format!("it is not the key of {}: {error}", certificate.display())))?;
        let directory = directory.to_owned();
        Ok(Self { role, directory, authority_pem, certificate_pem, key_pem, roots, own: Arc::new(own) })
    }

    /// Whose files these are.
    pub fn role(&self) -> Role {
        self.role
    }

    /// What a server needs to let in only clients that show a certificate of the authority, with HTTP/2 over TLS 1.3.
    ///
    /// # Errors
    /// When a certificate of the authority cannot be one.
    pub fn server_config(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let wrong = |reason: String| unusable(&self.directory.join(AUTHORITY_FILE), reason);
        let provider = Arc::new(ring::default_provider());
        let mut roots = RootCertStore::empty();
        for root in &self.roots {
            roots.add(root.clone()).map_err(|error| wrong(error.to_string()))?;
        }
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
        let clients = clients.build().map_err(|error| wrong(error.to_string()))?;
        let builder = ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&TLS13]);
        let builder = builder.map_err(|error| wrong(error.to_string()))?.with_client_cert_verifier(clients);
        let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&self.own))));
        config.alpn_protocols.push(b"h2".to_vec());
        Ok(Arc::new(config))
    }

    /// Makes `endpoint`, an `https://` address, show this certificate and accept only a coordinator of the authority whose
    /// certificate names the address's host.
    ///
    /// # Errors
    /// When the host is no name that a certificate could hold.
    pub fn secure(&self, endpoint: Endpoint) -> Result<Endpoint, tonic::transport::Error> {
        let own = tonic::transport::Identity::from_pem(&self.certificate_pem, &self.key_pem);
        let authority = Certificate::from_pem(&self.authority_pem);
        endpoint.tls_config(ClientTlsConfig::new().ca_certificate(authority).identity(own))
    }
}

/// Names of a role's files: authority, certificate, key.
pub fn files_of(role: Role) -> [String; 3] {
    [AUTHORITY_FILE.to_owned(), format!("{role}.pem"), format!("{role}-key.pem")]
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })
}

fn unusable(path: &Path, reason: impl ToString) -> TlsError {
    TlsError::Unusable { path: path.to_owned(), reason: reason.to_string() }
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let parsed = CertificateDer::pem_slice_iter(pem).take(MAX_CERTIFICATES).collect::<Result<Vec<_>, _>>();
    let found = parsed.map_err(|error| unusable(path, error))?;
    if found.is_empty() {
        return Err(unusable(path, "it holds no certificate in PEM form"));
    }
    Ok(found)
}

/// Whether the first certificate of `chain` is of `role` and one that the other side will accept.
fn check_chain(chain: &[CertificateDer<'_>], roots: &[CertificateDer<'_>], role: Role) -> Result<(), String> {
    let [leaf, intermediates @ ..] = chain else { return Err("it is empty".to_owned()) };
    let found = Role::of_certificate(leaf)?;
    if found != role {
        return Err(format!("it is a {found}'s certificate, expected a {role}'s"));
    }
    let anchors: Vec<_> = roots.iter().filter_map(|root| webpki::anchor_from_trusted_cert(root).ok()).collect();
    let usage = if role == Role::Coordinator { KeyUsage::server_auth() } else { KeyUsage::client_auth() };
    let algorithms = ring::default_provider().signature_verification_algorithms.all;
    let parsed = EndEntityCert::try_from(leaf).map_err(|error| error.to_string())?;
    let now = UnixTime::now();
    let verified = parsed.verify_for_usage(algorithms, &anchors, intermediates, now, usage, None, None);
    match verified {
        Ok(_) => Ok(()),
        Err(webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey) => {
            Err(format!("the authority in {AUTHORITY_FILE} has not signed it"))
        }
        Err(error) => Err(format!("the other components would refuse it: {error}")),
    }
}

/// What to do about a failed connection, as far as TLS is the reason.
pub fn advice(error: &dyn Error) -> Option<&'static str> {
    const ADVICE: [(&str, &str); 12] = [
        ("invalidcontenttype", "the other side does not speak TLS: start it with --tls, or this process without"),
        ("unknownissuer", "another authority has signed its certificate: use one `phalanx ca` directory"),
        ("badsignature", "another authority has signed its certificate: use one `phalanx ca` directory"),
        ("not valid for name", "its certificate does not name this host: issue one with --host"),
        ("notvalidforname", "its certificate does not name this host: issue one with --host"),
        ("expired", "issue a new certificate with `phalanx ca --issue`"),
        ("unknownca", "it knows another authority than the one that signed this certificate"),
        ("decrypterror", "it knows another authority than the one that signed this certificate"),
        ("certificaterequired", "it wants a certificate: start this process with --tls"),
        ("takes only tls", "it wants TLS: start this process with --tls"),
        ("sent no certificates", "it shows no certificate: start it with --tls"),
        ("extended key usage", "it shows a certificate that is not meant for this: use the one of its own role"),
    ];
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    // rustls names what happened by its own variant or in words, depending on how much it knows.
    text.make_ascii_lowercase();
    ADVICE.iter().find(|(sign, _)| text.contains(sign)).map(|(_, advice)| *advice)
}

#[cfg(test)]
mod tests {
    use rustls::{AlertDescription, CertificateError, Error as TlsFailure, InvalidMessage};

    use super::*;

    #[test]
    fn workers_attach_and_clients_generate_and_neither_the_other() {
        let allowed = |door| Role::ALL.into_iter().filter(move |role| role.may_call(door)).collect::<Vec<_>>();
        assert_eq!(allowed(Door::Cluster), [Role::Worker]);
        assert_eq!(allowed(Door::Inference), [Role::Gateway, Role::Client]);
    }

    /// The advice goes by what rustls says; a version that words it otherwise must not silence it.
    #[test]
    fn every_common_mistake_gets_advice() {
        let mistakes = [
            TlsFailure::InvalidMessage(InvalidMessage::InvalidContentType),
            CertificateError::UnknownIssuer.into(),
            CertificateError::NotValidForName.into(),
            CertificateError::Expired.into(),
            TlsFailure::AlertReceived(AlertDescription::UnknownCA),
            TlsFailure::AlertReceived(AlertDescription::DecryptError),
            TlsFailure::AlertReceived(AlertDescription::CertificateRequired),
            TlsFailure::NoCertificatesPresented,
        ];
        for mistake in mistakes {
            let wrapped = std::io::Error::new(std::io::ErrorKind::InvalidData, mistake);
            assert!(advice(&wrapped).is_some(), "{wrapped}");
        }
        assert_eq!(advice(&std::io::Error::from(std::io::ErrorKind::ConnectionRefused)), None);
    }
}
