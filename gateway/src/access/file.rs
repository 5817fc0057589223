//! The key file: one entry a key, checked before any of it counts.
//!
//! ```yaml
//! keys:
//!   - name: alice             # shown in metrics; 1 to 64 letters, digits, '_', '-' or '.'
//!     sha256: 9f86d081…       # of the key; or `env: NAME`, a variable that holds the key itself
//!     requests_per_minute: 60 # absent limits do not limit
//!     tokens_per_minute: 100000
//!     max_concurrency: 8
//!     weight: 2               # share of the tokens while several keys wait, 1 to 1000; 1 if absent
//!     models: [gpt-oss-20b]   # absent: all
//! ```

use std::{collections::BTreeSet, path::PathBuf};

use serde::Deserialize;

use super::{digest::Digest, quota::KeyLimits};

/// Most keys.
const MAX_KEYS: usize = 10_000;
/// Longest name of a key, in bytes; the coordinator takes no longer one.
const MAX_NAME: usize = 64;
/// Largest weight; the coordinator takes no larger one.
const MAX_WEIGHT: u32 = 1000;

/// Why keys cannot be used. No message holds a key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("key file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what a key file is.
    #[error("key file {path}: {source}; expected `keys:` with a list of entries such as `phalanx key` prints")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_yaml_ng::Error,
    },
    /// Entries are wrong; all of them are named.
    #[error("key file {path}: {problems}")]
    Entries {
        /// The file.
        path: PathBuf,
        /// What is wrong, entry by entry.
        problems: String,
    },
}

/// One key and what it may do.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) digest: Digest,
    pub(super) limits: KeyLimits,
    pub(super) weight: u32,
    /// `None`: all.
    pub(super) models: Option<Vec<String>>,
}

impl Entry {
    /// A key without any limit.
    pub(super) fn unlimited(name: String, digest: Digest) -> Self {
        Self { name, digest, limits: KeyLimits::default(), weight: 1, models: None }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyFile {
    keys: Vec<RawEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    name: String,
    sha256: Option<String>,
    env: Option<String>,
    requests_per_minute: Option<u32>,
    tokens_per_minute: Option<u32>,
    max_concurrency: Option<u32>,
    weight: Option<u32>,
    models: Option<Vec<String>>,
}

/// Reads the entries of a key file. `variable` looks up a variable of the environment.
///
/// # Errors
/// Names the file and everything that is wrong in it.
pub(super) fn parse(
    path: PathBuf,
    text: &str,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Vec<Entry>, KeyError> {
    let file: KeyFile = match serde_yaml_ng::from_str(text) {
        Ok(file) => file,
        Err(source) => return Err(KeyError::Parse { path, source }),
    };
    let mut problems = Vec::new();
    if file.keys.is_empty() || file.keys.len() > MAX_KEYS {
        problems.push(format!("it has {} keys, expected 1 to {MAX_KEYS}", file.keys.len()));
    }
    let mut entries = Vec::with_capacity(file.keys.len());
    for raw in file.keys {
        let name = raw.name.clone();
        match raw.check(&variable) {
            Ok(entry) => entries.push(entry),
            Err(problem) => problems.push(format!("key {name:?}: {problem}")),
        }
    }
    let (mut names, mut digests) = (BTreeSet::new(), BTreeSet::new());
    for entry in &entries {
        if !names.insert(&entry.name) {
            problems.push(format!("key {:?}: an earlier entry has the same name", entry.name));
        }
        if !digests.insert(&entry.digest) {
            problems.push(format!("key {:?}: an earlier entry has the same key", entry.name));
        }
    }
    if problems.is_empty() { Ok(entries) } else { Err(KeyError::Entries { path, problems: problems.join("; ") }) }
}

impl RawEntry {
    fn check(self, variable: &impl Fn(&str) -> Option<String>) -> Result<Entry, String> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if self.name.is_empty() || self.name.len() > MAX_NAME || !self.name.chars().all(plain) {
            return Err(format!("its name is not 1 to {MAX_NAME} letters, digits, '_', '-' or '.'"));
        }
        let limits = [
            ("requests_per_minute", self.requests_per_minute),
            ("tokens_per_minute", self.tokens_per_minute),
            ("max_concurrency", self.max_concurrency),
        ];
        if let Some((limit, _)) = limits.iter().find(|(_, value)| *value == Some(0)) {
            return Err(format!("{limit} is 0; remove the entry to lock a key out"));
        }
        let weight = self.weight.unwrap_or(1);
        if !(1..=MAX_WEIGHT).contains(&weight) {
            return Err(format!("weight is {weight}, expected 1 to {MAX_WEIGHT}"));
        }
        if self.models.as_ref().is_some_and(Vec::is_empty) {
            return Err("models is empty; leave it out to allow all".to_owned());
        }
        let digest = match (self.sha256, self.env) {
            (Some(hex), None) => Digest::from_hex(&hex).ok_or("sha256 is not 64 hexadecimal digits")?,
            (None, Some(name)) => {
                let key = variable(&name).ok_or_else(|| format!("variable {name} of the environment is not set"))?;
                Digest::of_key(&key).map_err(|error| format!("variable {name}: {error}"))?
            }
            _ => return Err("expected either sha256 or env".to_owned()),
        };
        let limits = KeyLimits {
            requests_per_minute: self.requests_per_minute,
            tokens_per_minute: self.tokens_per_minute,
            max_concurrency: self.max_concurrency,
        };
        Ok(Entry { name: self.name, digest, limits, weight, models: self.models })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Vec<Entry>, String> {
        let variable = |name: &str| (name == "CI_KEY").then(|| "sk-ci".to_owned());
        parse("keys.yaml".into(), text, variable).map_err(|error| error.to_string())
    }

    #[test]
    fn every_field_of_an_entry_counts() {
        // echo -n sk-alice | sha256sum
        let text = "
keys:
  - name: alice
    sha256: 099295A3784E1BD368DC348843A7398C1931B6B8EC2504C73E91ED2040BDC46C
    requests_per_minute: 60
    tokens_per_minute: 1000
    max_concurrency: 8
    weight: 2
    models: [nano]
  - {name: ci, env: CI_KEY}
";
        let entries = parsed(text).unwrap();
        let limits =
            KeyLimits { requests_per_minute: Some(60), tokens_per_minute: Some(1000), max_concurrency: Some(8) };
        assert_eq!((entries[0].limits, entries[0].weight), (limits, 2));
        assert_eq!(entries[0].digest, Digest::of_key("sk-alice").unwrap());
        assert_eq!(entries[0].models, Some(vec!["nano".to_owned()]));
        assert_eq!(entries[1], Entry::unlimited("ci".into(), Digest::of_key("sk-ci").unwrap()));
    }

    #[test]
    fn everything_that_is_wrong_is_named_at_once() {
        let one = "00".repeat(32);
        let text = format!(
            "keys: [{{name: a b, sha256: '{one}'}}, {{name: b, sha256: '12'}}, {{name: c}}, {{name: d, env: NO_SUCH}}, \
             {{name: e, sha256: '{one}', weight: 0}}, {{name: f, sha256: '{one}', max_concurrency: 0}}, \
             {{name: g, sha256: '{one}'}}, {{name: g, sha256: '{one}'}}]"
        );
        let error = parsed(&text).unwrap_err();
        for part in [
            "keys.yaml",
            "\"a b\": its name",
            "\"b\": sha256 is not",
            "\"c\": expected either",
            "variable NO_SUCH",
            "weight is 0",
            "max_concurrency is 0",
            "\"g\": an earlier entry has the same name",
            "\"g\": an earlier entry has the same key",
        ] {
            assert!(error.contains(part), "{part}: {error}");
        }
        assert!(parsed("keys: []").is_err() && parsed("- alice").is_err());
        assert!(parsed("keys: [{name: a, sha256: x, rpm: 5}]").unwrap_err().contains("rpm"));
    }
}
