//! Who may use the HTTP door: keys, its certificate, and `phalanx key`, which makes a key.

use std::{
    fmt::Write as _,
    io::IsTerminal,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use phalanx_gateway::config::{Digest, KeySource, TlsFiles, new_key};
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};

/// Holds keys, separated by commas: for a gateway those that it takes, for a client the one that it sends.
const KEYS_ENV: &str = "PHALANX_API_KEY";

/// Keys and certificate of the HTTP door.
#[derive(Clone, Debug, Args)]
pub(crate) struct AccessArgs {
    /// YAML file of keys with their limits, as `phalanx key` prints them. Keys without limits may stand in the environment
    /// instead: PHALANX_API_KEY, separated by commas. With either, every route but /livez asks for one.
    #[arg(long, env = "PHALANX_API_KEY_FILE", value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Known from vLLM, and refused.
    #[arg(long, hide = true, num_args = 0..)]
    pub api_key: Option<Vec<String>>,
    /// Certificate for HTTPS, in PEM form, followed by intermediate ones.
    #[arg(long, env = "PHALANX_SSL_CERTFILE", value_name = "FILE")]
    pub ssl_certfile: Option<PathBuf>,
    /// Private key of the certificate. Default: in the certificate's file.
    #[arg(long, env = "PHALANX_SSL_KEYFILE", value_name = "FILE")]
    pub ssl_keyfile: Option<PathBuf>,
    /// Authorities: let in only clients that show a certificate of one of them.
    #[arg(long, env = "PHALANX_SSL_CA_CERTS", value_name = "FILE")]
    pub ssl_ca_certs: Option<PathBuf>,
}

impl AccessArgs {
    /// Where keys come from.
    ///
    /// # Errors
    /// When a key stands on the command line, or the environment holds something that is none.
    pub(crate) fn keys(&self) -> Result<KeySource> {
        ensure!(
            self.api_key.is_none(),
            "--api-key: a command line can be read by everybody on this host; set {KEYS_ENV}, or give the SHA-256 of \
             the key in --api-key-file (`phalanx key NAME` makes both)"
        );
        let keys = env_keys();
        let unlimited = keys.iter().map(|key| Digest::of_key(key)).collect::<Result<_, _>>().context(KEYS_ENV)?;
        Ok(KeySource { file: self.api_key_file.clone(), unlimited })
    }

    /// The certificate, if HTTPS is asked for.
    ///
    /// # Errors
    /// When only a part of it is given.
    pub(crate) fn tls_files(&self) -> Result<Option<TlsFiles>> {
        let Some(certificates) = self.ssl_certfile.clone() else {
            let rest = self.ssl_keyfile.is_none() && self.ssl_ca_certs.is_none();
            ensure!(rest, "--ssl-keyfile and --ssl-ca-certs need --ssl-certfile");
            return Ok(None);
        };
        let key = self.ssl_keyfile.clone().unwrap_or_else(|| certificates.clone());
        Ok(Some(TlsFiles { certificates, key, client_authorities: self.ssl_ca_certs.clone() }))
    }

    /// Refuses to stand open to a network by accident.
    ///
    /// # Errors
    /// When `host` is not loopback and nothing guards the API.
    pub(crate) fn check_bind(&self, host: IpAddr, insecure: bool) -> Result<()> {
        ensure!(
            host.is_loopback() || insecure || !self.keys()?.is_empty(),
            "listening on {host} would let anyone on the network in; set keys with --api-key-file or {KEYS_ENV}, or pass \
             --insecure-bind if that is meant"
        );
        Ok(())
    }

    /// The same as flags, for a child. What the environment says, the child inherits.
    pub(crate) fn flags(&self) -> Vec<String> {
        let files = [
            ("--api-key-file", &self.api_key_file),
            ("--ssl-certfile", &self.ssl_certfile),
            ("--ssl-keyfile", &self.ssl_keyfile),
            ("--ssl-ca-certs", &self.ssl_ca_certs),
        ];
        let flag = |(name, file): (&str, &Option<PathBuf>)| Some(format!("{name}={}", file.as_ref()?.display()));
        files.into_iter().filter_map(flag).collect()
    }

    /// What the first request needs beside its address: the scheme, and a header for the key.
    pub(crate) fn to_try(&self) -> (&'static str, &'static str) {
        let scheme = if self.ssl_certfile.is_some() { "https" } else { "http" };
        let keyed = self.api_key_file.is_some() || !env_keys().is_empty();
        (scheme, if keyed { " -H \"Authorization: Bearer $PHALANX_API_KEY\"" } else { "" })
    }
}

fn env_keys() -> Vec<String> {
    let keys = std::env::var(KEYS_ENV).unwrap_or_default();
    keys.split(',').map(str::trim).filter(|key| !key.is_empty()).map(str::to_owned).collect()
}

/// A client that shows the key of the environment, if there is one.
///
/// # Errors
/// When the environment holds something that is no key.
pub(crate) fn http_client() -> Result<reqwest::Client> {
    let mut headers = HeaderMap::new();
    if let Some(key) = env_keys().first() {
        let mut value = HeaderValue::try_from(format!("Bearer {key}")).context(KEYS_ENV)?;
        value.set_sensitive(true);
        headers.insert(AUTHORIZATION, value);
    }
    reqwest::Client::builder().default_headers(headers).build().context("HTTP client")
}

/// Whether SIGHUP says that the terminal is gone, in which this process was started, rather than that files changed.
pub(crate) struct Terminal {
    was_there: bool,
}

impl Terminal {
    pub(crate) fn now() -> Self {
        Self { was_there: std::io::stdin().is_terminal() }
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.was_there && !std::io::stdin().is_terminal()
    }
}

/// What a new key may do.
#[derive(Clone, Debug, Args)]
pub(crate) struct KeyArgs {
    /// Whose key it is: shown in metrics; letters, digits, '_', '-' and '.'.
    pub name: String,
    /// Requests that it may begin a minute. Default: no limit.
    #[arg(long)]
    pub requests_per_minute: Option<u32>,
    /// Tokens that it may use a minute, prompts and answers together. Default: no limit.
    #[arg(long)]
    pub tokens_per_minute: Option<u32>,
    /// Requests that may run at a time. Default: no limit.
    #[arg(long)]
    pub max_concurrency: Option<u32>,
    /// Share of the tokens while several keys wait. Default: 1.
    #[arg(long)]
    pub weight: Option<u32>,
    /// Models that it may use. Default: all.
    #[arg(long, value_delimiter = ',')]
    pub models: Vec<String>,
}

/// Prints a new key, which nobody can show again, for the person (standard error), and its entry for the key file
/// (standard output, so that it can be appended to the file).
///
/// # Errors
/// When the entry would be refused.
pub(crate) fn make_key(args: &KeyArgs) -> Result<()> {
    let key = new_key();
    let entry = entry(args, &Digest::of_key(&key)?)?;
    KeySource::check(Path::new("phalanx key"), &format!("keys:\n{entry}"))?;
    eprintln!("key of {}, shown this once: {key}", args.name);
    eprintln!("its entry, for the list `keys:` in the file of --api-key-file:");
    print!("{entry}");
    Ok(())
}

fn entry(args: &KeyArgs, digest: &Digest) -> Result<String> {
    let mut text = format!("  - name: '{}'\n    sha256: '{digest}'\n", args.name);
    let numbers = [
        ("requests_per_minute", args.requests_per_minute),
        ("tokens_per_minute", args.tokens_per_minute),
        ("max_concurrency", args.max_concurrency),
        ("weight", args.weight),
    ];
    for (name, value) in numbers {
        if let Some(value) = value {
            writeln!(text, "    {name}: {value}")?;
        }
    }
    if !args.models.is_empty() {
        writeln!(text, "    models: {}", serde_json::to_string(&args.models)?)?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_what_the_key_file_takes() {
        let args = KeyArgs {
            name: "alice".into(),
            requests_per_minute: Some(60),
            tokens_per_minute: None,
            max_concurrency: Some(4),
            weight: Some(2),
            models: vec!["nano".into(), "openai/gpt-oss-20b".into()],
        };
        let text = entry(&args, &Digest::of_key("sk-alice").unwrap()).unwrap();
        assert!(text.contains("requests_per_minute: 60") && !text.contains("tokens_per_minute"), "{text}");
        KeySource::check(Path::new("test"), &format!("keys:\n{text}")).unwrap();
        let bad = KeyArgs { name: "a b".into(), ..args };
        let text = entry(&bad, &Digest::of_key("sk-alice").unwrap()).unwrap();
        assert!(KeySource::check(Path::new("test"), &format!("keys:\n{text}")).is_err());
    }

    #[test]
    fn a_key_on_the_command_line_is_refused_without_being_repeated() {
        let none = AccessArgs {
            api_key_file: None,
            api_key: Some(vec!["sk-secret".into()]),
            ssl_certfile: None,
            ssl_keyfile: None,
            ssl_ca_certs: None,
        };
        let error = none.keys().unwrap_err().to_string();
        assert!(error.contains("PHALANX_API_KEY") && !error.contains("sk-secret"), "{error}");
        let half = AccessArgs { api_key: None, ssl_keyfile: Some("key.pem".into()), ..none };
        assert!(half.tls_files().is_err());
    }
}
