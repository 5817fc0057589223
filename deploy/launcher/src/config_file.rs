//! `--config FILE`: a YAML file whose keys are long flag names, and `profiles` for the gateway.
//!
//! Flags go over the environment, the environment over the file, the file over defaults. The file's flags are therefore
//! put in front of the typed ones (the last one counts), unless their environment variable is set.

use std::{ffi::OsString, path::PathBuf};

use anyhow::{Context, Result, bail};
use clap::CommandFactory;
use phalanx_gateway::profiles::{Profile, Profiles};
use serde_yaml_ng::Value;

use crate::cli::Cli;

/// The keys that are not flags.
const PROFILE_KEYS: [&str; 2] = ["profiles", "default_profile"];

/// Puts the flags of the file that `--config` names into the arguments, after the subcommand.
pub(crate) fn expand(mut args: Vec<OsString>) -> Result<Vec<OsString>> {
    // args[0] is the program, args[1] the subcommand.
    let (Some(path), Some(subcommand)) = (config_path(&args), args.get(1)) else { return Ok(args) };
    let flags = read_flags(&path, &subcommand.to_string_lossy())?;
    args.splice(2..2, flags);
    Ok(args)
}

fn config_path(args: &[OsString]) -> Option<PathBuf> {
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let text = arg.to_string_lossy();
        if text == "--config" {
            return args.next().map(PathBuf::from);
        }
        if let Some(path) = text.strip_prefix("--config=") {
            return Some(PathBuf::from(path));
        }
    }
    std::env::var_os("PHALANX_CONFIG").map(PathBuf::from)
}

/// Whether `subcommand` has the flag; one file may serve several processes, so a flag of another one is passed over.
fn takes(subcommand: &str, flag: &str) -> Option<bool> {
    let cli = Cli::command();
    let has = |command: &clap::Command| command.get_arguments().any(|arg| arg.get_long() == Some(flag));
    let known = cli.get_subcommands().any(has);
    known.then(|| cli.find_subcommand(subcommand).is_some_and(has))
}

fn read_flags(path: &PathBuf, subcommand: &str) -> Result<Vec<OsString>> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).with_context(|| format!("--config {shown}"))?;
    let value: Value = serde_yaml_ng::from_str(&text).with_context(|| format!("--config {shown}"))?;
    let Value::Mapping(map) = value else { bail!("--config {shown}: expected a mapping of flags to values") };
    let mut flags = Vec::new();
    for (key, value) in map {
        let Value::String(key) = key else { bail!("--config {shown}: key {key:?} is not a flag's name") };
        let flag = key.replace('_', "-");
        let env = format!("PHALANX_{}", flag.replace('-', "_").to_ascii_uppercase());
        if PROFILE_KEYS.contains(&key.as_str()) || std::env::var_os(env).is_some() {
            continue;
        }
        match takes(subcommand, &flag) {
            Some(true) => {}
            Some(false) => continue,
            None => bail!("--config {shown}: {key} is no flag of phalanx"),
        }
        flags.extend(flag_arguments(&flag, &value).with_context(|| format!("--config {shown}: {key}"))?);
    }
    Ok(flags)
}

fn flag_arguments(flag: &str, value: &Value) -> Result<Vec<OsString>> {
    let text = match value {
        Value::Bool(true) => return Ok(vec![format!("--{flag}").into()]),
        Value::Bool(false) | Value::Null => return Ok(Vec::new()),
        Value::Number(number) => number.to_string(),
        Value::String(text) => text.clone(),
        Value::Sequence(items) => {
            let texts = items.iter().map(|item| item.as_str().context("expected a list of strings"));
            texts.collect::<Result<Vec<_>>>()?.join(",")
        }
        other => bail!("expected a flag's value, found {other:?}"),
    };
    Ok(vec![format!("--{flag}={text}").into()])
}

/// What the file holds beside flags.
#[derive(Default, serde::Deserialize)]
#[serde(default)]
struct ProfileSection {
    profiles: std::collections::BTreeMap<String, Profile>,
    default_profile: Option<String>,
}

/// The built-in profiles and those of the file.
pub(crate) fn profiles(path: &std::path::Path) -> Result<Profiles> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).with_context(|| format!("--config {shown}"))?;
    let section: ProfileSection =
        serde_yaml_ng::from_str(&text).with_context(|| format!("--config {shown}: profiles"))?;
    Profiles::new(section.profiles, section.default_profile).with_context(|| format!("--config {shown}"))
}
