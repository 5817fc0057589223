//! `phalanx ca`: a private authority for TLS between components.
//!
//! The directory it makes is what `--tls` takes, on this host or, copied, on another:
//!
//! | file | holds |
//! | --- | --- |
//! | `ca.pem`, `ca-key.pem` | the authority; the key stays where certificates are issued and is needed nowhere else |
//! | `ROLE.pem`, `ROLE-key.pem` | certificate and key of `coordinator`, `worker`, `gateway` and `client` |
//!
//! All are PEM; keys are PKCS#8 (ECDSA P-256) that only the owner may read. What is in a certificate is described in
//! `phalanx_proto::tls`.

use std::{
    fs::{DirBuilder, OpenOptions},
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use phalanx_proto::tls::{AUTHORITY_FILE, Identity, Role, files_of};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType, date_time_ymd,
};

/// The authority's key.
const AUTHORITY_KEY_FILE: &str = "ca-key.pem";
/// How long the authority is valid: longer than anything it signs.
const AUTHORITY_DAYS: u32 = 3650;
/// Certificates are valid from a little earlier on, for hosts whose clocks are behind.
const CLOCK_SKEW: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);
/// Where every coordinator can be reached from its own host.
const LOCAL_NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];
/// Modes of what others may read, and of what they may not.
const PUBLIC: u32 = 0o644;
const PRIVATE: u32 = 0o600;

/// What to make, and where.
#[derive(Clone, Debug, Args)]
pub(crate) struct CaArgs {
    /// Directory of the authority; made if it is not there.
    pub directory: PathBuf,
    /// Names and addresses at which the coordinator is reached, beside localhost.
    #[arg(long, num_args = 1.., value_delimiter = ',', value_name = "NAME_OR_IP")]
    pub host: Vec<String>,
    /// Issue one more certificate with the authority that is there: coordinator, worker, gateway or client.
    #[arg(long, value_parser = str::parse::<Role>, value_name = "ROLE", requires = "out")]
    pub issue: Option<Role>,
    /// Directory for --issue: it gets everything that --tls needs on another host.
    #[arg(long, value_name = "DIR", requires = "issue")]
    pub out: Option<PathBuf>,
    /// Days that a certificate is valid.
    #[arg(long, default_value = "730", value_parser = clap::value_parser!(u32).range(1..=i64::from(AUTHORITY_DAYS)))]
    pub days: u32,
}

/// Makes an authority with a certificate for each role, or issues one more certificate.
pub(crate) fn run(args: &CaArgs) -> Result<()> {
    for host in &args.host {
        ensure!(is_name(host), "--host {host:?} is neither a DNS name nor an IP address");
    }
    match (args.issue, &args.out) {
        (Some(role), Some(out)) => issue_one(args, role, out),
        _ => make_all(args),
    }
}

fn is_name(host: &str) -> bool {
    let label = |label: &str| {
        let inner = label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
        inner && (1..=63).contains(&label.len()) && !label.starts_with('-') && !label.ends_with('-')
    };
    host.parse::<std::net::IpAddr>().is_ok() || (host.len() <= 253 && host.split('.').all(label))
}

fn make_all(args: &CaArgs) -> Result<()> {
    let directory = &args.directory;
    let mut names = vec![AUTHORITY_FILE.to_owned(), AUTHORITY_KEY_FILE.to_owned()];
    names.extend(Role::ALL.iter().flat_map(|role| files_of(*role).into_iter().skip(1)));
    refuse_existing(directory, &names)?;
    let authority = Authority::generate()?;
    make_directory(directory)?;
    authority.write(directory)?;
    for role in Role::ALL {
        authority.issue(role, &args.host, args.days)?.write(directory)?;
        check(directory, role)?;
    }
    let (shown, hosts) = (directory.display(), names_of(&args.host).join(", "));
    println!(
        "{shown}: an authority, and certificates for coordinator, worker, gateway and client, valid {} days",
        args.days
    );
    println!("the coordinator's certificate names {hosts}");
    println!("try: phalanx serve --tls {shown}");
    println!(
        "keep {shown}/{AUTHORITY_KEY_FILE} where it is; copy to other hosts only {AUTHORITY_FILE} and their roles' files"
    );
    Ok(())
}

fn issue_one(args: &CaArgs, role: Role, out: &Path) -> Result<()> {
    let authority = Authority::open(&args.directory)?;
    refuse_existing(out, &files_of(role))?;
    make_directory(out)?;
    let pem = std::fs::read(args.directory.join(AUTHORITY_FILE)).context("the authority's certificate")?;
    write_new(&out.join(AUTHORITY_FILE), &pem, PUBLIC)?;
    authority.issue(role, &args.host, args.days)?.write(out)?;
    check(out, role)?;
    println!("{}: a {role}'s certificate, valid {} days; give the directory to --tls", out.display(), args.days);
    Ok(())
}

/// Reads the files as a component will, which also verifies the signature with the authority's certificate.
fn check(directory: &Path, role: Role) -> Result<()> {
    Identity::load(directory, role).map(drop).context("the new certificate cannot be used")
}

fn refuse_existing(directory: &Path, names: &[String]) -> Result<()> {
    let existing: Vec<_> = names.iter().filter(|name| directory.join(name).exists()).map(String::as_str).collect();
    ensure!(
        existing.is_empty(),
        "{} has {} already and nothing is overwritten; choose another directory, or add to this authority with --issue",
        directory.display(),
        existing.join(", ")
    );
    Ok(())
}

fn make_directory(directory: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
    made.with_context(|| format!("{} cannot be made", directory.display()))
}

fn write_new(path: &Path, contents: &[u8], mode: u32) -> Result<()> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(contents)?;
        file.sync_all()
    };
    write().with_context(|| format!("{} cannot be written", path.display()))
}

fn names_of(hosts: &[String]) -> Vec<String> {
    LOCAL_NAMES.iter().map(ToString::to_string).chain(hosts.iter().cloned()).collect()
}

/// Whoever signs.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    params: CertificateParams,
}

impl Authority {
    fn generate() -> Result<Self> {
        Ok(Self::with_key(KeyPair::generate()?))
    }

    fn open(directory: &Path) -> Result<Self> {
        let path = directory.join(AUTHORITY_KEY_FILE);
        let read = std::fs::read_to_string(&path);
        let pem =
            read.with_context(|| format!("{}: an authority is made by `phalanx ca DIR` first", path.display()))?;
        Ok(Self::with_key(KeyPair::from_pem(&pem).with_context(|| path.display().to_string())?))
    }

    /// The name follows from the key, so that authorities differ by name and the key alone is enough to go on.
    fn with_key(key: KeyPair) -> Self {
        // After the byte that says how the point is written, the point itself is as good as random.
        let id: String = key.public_key_raw().iter().skip(1).take(8).map(|byte| format!("{byte:02x}")).collect();
        let mut params = CertificateParams::default();
        params.distinguished_name.remove(DnType::CommonName);
        params.distinguished_name.push(DnType::CommonName, format!("phalanx authority {id}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        set_validity(&mut params, AUTHORITY_DAYS);
        Self { issuer: Issuer::new(params.clone(), key), params }
    }

    fn write(&self, directory: &Path) -> Result<()> {
        let key = self.issuer.key();
        write_new(&directory.join(AUTHORITY_KEY_FILE), key.serialize_pem().as_bytes(), PRIVATE)?;
        write_new(&directory.join(AUTHORITY_FILE), self.params.self_signed(key)?.pem().as_bytes(), PUBLIC)
    }

    /// Only a coordinator's certificate names hosts and may be shown by a server.
    fn issue(&self, role: Role, hosts: &[String], days: u32) -> Result<Issued> {
        let names = if role == Role::Coordinator { names_of(hosts) } else { Vec::new() };
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.remove(DnType::CommonName);
        params.distinguished_name.push(DnType::CommonName, format!("phalanx {role}"));
        params.subject_alt_names.push(SanType::URI(role.uri().as_str().try_into()?));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let usage = match role {
            Role::Coordinator => ExtendedKeyUsagePurpose::ServerAuth,
            Role::Worker | Role::Gateway | Role::Client => ExtendedKeyUsagePurpose::ClientAuth,
        };
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, days);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Issued { role, certificate, key: key.serialize_pem() })
    }
}

fn set_validity(params: &mut CertificateParams, days: u32) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let start = date_time_ymd(1970, 1, 1) + now.saturating_sub(CLOCK_SKEW);
    params.not_before = start;
    params.not_after = start + DAY * days;
}

/// A new certificate with its key.
struct Issued {
    role: Role,
    certificate: String,
    key: String,
}

impl Issued {
    fn write(&self, directory: &Path) -> Result<()> {
        let [_, certificate, key] = files_of(self.role).map(|name| directory.join(name));
        write_new(&key, self.key.as_bytes(), PRIVATE)?;
        write_new(&certificate, self.certificate.as_bytes(), PUBLIC)
    }
}
