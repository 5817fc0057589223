//! The flags with which coordinators meet in an etcd.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;
use phalanx_coordinator::membership::{
    MembershipConfig,
    etcd::{Credentials, EtcdConfig, EtcdTls},
};

/// Where the password comes from: an argument would be seen in the list of processes.
const PASSWORD_ENV: &str = "PHALANX_ETCD_PASSWORD";

/// Several coordinators, one of which leads.
#[derive(Clone, Debug, Args)]
pub(crate) struct EtcdArgs {
    /// Meet other coordinators in this etcd, such as http://127.0.0.1:2379; several addresses with commas. One of them
    /// leads, the others wait. Default: this is the only coordinator.
    #[arg(long, env = "PHALANX_ETCD", value_delimiter = ',', conflicts_with = "state_dir")]
    pub etcd: Vec<String>,
    /// What the keys of this cluster begin with.
    #[arg(long, default_value = "/phalanx", env = "PHALANX_ETCD_PREFIX")]
    pub etcd_prefix: String,
    /// Authority of etcd's certificate (PEM), for https addresses.
    #[arg(long, env = "PHALANX_ETCD_CA")]
    pub etcd_ca: Option<PathBuf>,
    /// Certificate to show to etcd (PEM).
    #[arg(long, env = "PHALANX_ETCD_CERT", requires = "etcd_key", requires = "etcd_ca")]
    pub etcd_cert: Option<PathBuf>,
    /// Its key (PEM).
    #[arg(long, env = "PHALANX_ETCD_KEY", requires = "etcd_cert")]
    pub etcd_key: Option<PathBuf>,
    /// User of an etcd that asks for one; its password is taken from PHALANX_ETCD_PASSWORD.
    #[arg(long, env = "PHALANX_ETCD_USER")]
    pub etcd_user: Option<String>,
}

impl EtcdArgs {
    /// Where epochs come from: etcd, else the directory, else memory.
    ///
    /// # Errors
    /// When a user is named and no password is given.
    pub(crate) fn membership(&self, state_dir: Option<PathBuf>) -> Result<MembershipConfig> {
        if self.etcd.is_empty() {
            return Ok(state_dir.map_or(MembershipConfig::Memory, MembershipConfig::Directory));
        }
        let identity = self.etcd_cert.clone().zip(self.etcd_key.clone());
        let credentials = match &self.etcd_user {
            Some(user) => {
                let password = std::env::var(PASSWORD_ENV).unwrap_or_default();
                ensure!(!password.is_empty(), "--etcd-user {user}: no password in the environment as {PASSWORD_ENV}");
                Some(Credentials { user: user.clone(), password })
            }
            None => None,
        };
        Ok(MembershipConfig::Etcd(EtcdConfig {
            endpoints: self.etcd.clone(),
            prefix: self.etcd_prefix.clone(),
            tls: self.etcd_ca.clone().map(|ca| EtcdTls { ca, identity }),
            credentials,
        }))
    }
}
