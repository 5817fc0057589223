//! `--tls DIR`: certificates for the connections between components.

use std::{net::IpAddr, path::PathBuf, sync::Arc};

use anyhow::{Context, Result, ensure};
use clap::Args;
use phalanx_proto::tls::{Identity, Role};

/// How a component shows who it is.
#[derive(Clone, Debug, Args)]
pub(crate) struct TlsArgs {
    /// Directory with ca.pem and this component's certificate and key, as `phalanx ca` makes it: the coordinator's gRPC
    /// door then takes only TLS, with a certificate of that authority.
    #[arg(long, env = "PHALANX_TLS", value_name = "DIR")]
    pub tls: Option<PathBuf>,
}

impl TlsArgs {
    /// The files of `role`, if TLS is asked for.
    ///
    /// # Errors
    /// When they cannot be used.
    pub(crate) fn identity(&self, role: Role) -> Result<Option<Arc<Identity>>> {
        let load = |directory| Identity::load(directory, role).map(Arc::new).context("--tls");
        self.tls.as_deref().map(load).transpose()
    }

    /// A coordinator's address with its scheme: `https` if TLS is asked for, else `http`.
    ///
    /// # Errors
    /// When the address says otherwise.
    pub(crate) fn address(&self, coordinator: &str) -> Result<String> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let Some((given, _)) = coordinator.split_once("://") else { return Ok(format!("{scheme}://{coordinator}")) };
        ensure!(
            given == scheme,
            "--coordinator {coordinator}: expected {scheme}://, since --tls is {}",
            if self.tls.is_some() { "given" } else { "not given" }
        );
        Ok(coordinator.to_owned())
    }

    /// Refuses to let a coordinator stand open to a network by accident.
    ///
    /// # Errors
    /// When `host` is not loopback and nothing guards the door.
    pub(crate) fn check_bind(&self, host: IpAddr, insecure: bool) -> Result<()> {
        ensure!(
            host.is_loopback() || self.tls.is_some() || insecure,
            "listening on {host} would let anyone on the network in; give --tls DIR with files that `phalanx ca` makes, \
             or --insecure-bind if that is meant"
        );
        Ok(())
    }
}
