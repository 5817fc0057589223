//! Profiles: named settings that a request may ask for. What the request says itself goes before its profile.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::openai::params::SamplingParams;

pub use crate::openai::chat::ReasoningEffort;

/// The settings of one profile. What is absent is left as it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Profile {
    /// The model to use, when the request names none.
    pub model: Option<String>,
    /// At most this many tokens; less when the context leaves less.
    pub max_tokens: Option<u32>,
    /// 0 to 2.
    pub temperature: Option<f32>,
    /// More than 0, at most 1.
    pub top_p: Option<f32>,
    /// 0: no limit.
    pub top_k: Option<u32>,
    /// 0 to 1.
    pub min_p: Option<f32>,
    /// -2 to 2.
    pub presence_penalty: Option<f32>,
    /// -2 to 2.
    pub frequency_penalty: Option<f32>,
    /// More than 0, at most 2.
    pub repetition_penalty: Option<f32>,
    /// How much the model thinks.
    pub reasoning_effort: Option<ReasoningEffort>,
    /// Higher goes first.
    pub priority: Option<i32>,
}

/// A profile that cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ProfileError {
    /// A value is out of range.
    #[error("profile {profile}: {field} is {value}, expected {expected}")]
    OutOfRange {
        /// The profile.
        profile: String,
        /// The setting.
        field: &'static str,
        /// Its value.
        value: f32,
        /// What it may be.
        expected: &'static str,
    },
    /// The default profile does not exist.
    #[error("the default profile {name} does not exist; there are: {known}")]
    UnknownDefault {
        /// Its name.
        name: String,
        /// The names that exist.
        known: String,
    },
    /// A name cannot stand in a header or a label.
    #[error("profile name {name:?} is not 1 to 64 letters, digits, '_', '-' or '.'")]
    Name {
        /// The name.
        name: String,
    },
}

/// Every profile by name.
#[derive(Clone, Debug, PartialEq)]
pub struct Profiles {
    profiles: BTreeMap<String, Profile>,
    default: Option<String>,
}

impl Default for Profiles {
    /// The built-in ones, none of which applies by itself.
    fn default() -> Self {
        Self { profiles: built_in(), default: None }
    }
}

/// Profiles that exist without configuration. They name no model, so they work with any.
fn built_in() -> BTreeMap<String, Profile> {
    // Effort and place in the queue are what moves latency; sampling stays the model card's in all of them.
    let latency_first = Profile {
        max_tokens: Some(2048),
        reasoning_effort: Some(ReasoningEffort::Low),
        priority: Some(10),
        ..Profile::default()
    };
    let balanced = Profile { reasoning_effort: Some(ReasoningEffort::Medium), ..Profile::default() };
    let quality_first = Profile { reasoning_effort: Some(ReasoningEffort::High), ..Profile::default() };
    let named = [("latency_first", latency_first), ("balanced", balanced), ("quality_first", quality_first)];
    named.into_iter().map(|(name, profile)| (name.to_owned(), profile)).collect()
}

impl Profiles {
    /// The built-in profiles and the given ones, which may take a built-in's place; `default` applies to requests that
    /// ask for none.
    ///
    /// # Errors
    /// Names the profile and the setting that is wrong.
    pub fn new(given: BTreeMap<String, Profile>, default: Option<String>) -> Result<Self, ProfileError> {
        for (name, profile) in &given {
            profile.check(name)?;
        }
        let mut profiles = built_in();
        profiles.extend(given);
        if let Some(name) = &default
            && !profiles.contains_key(name)
        {
            let known = profiles.into_keys().collect::<Vec<_>>().join(", ");
            return Err(ProfileError::UnknownDefault { name: name.clone(), known });
        }
        Ok(Self { profiles, default })
    }

    /// The profile of requests that ask for none.
    pub(crate) fn default_name(&self) -> Option<&str> {
        self.default.as_deref()
    }

    /// The profile that applies when `asked` is what the request says; an unknown name gives the known ones.
    pub(crate) fn select(&self, asked: Option<&str>) -> Result<Option<(&str, &Profile)>, Vec<&str>> {
        let Some(name) = asked.or(self.default.as_deref()) else { return Ok(None) };
        match self.profiles.get_key_value(name) {
            Some((name, profile)) => Ok(Some((name, profile))),
            None => Err(self.profiles.keys().map(String::as_str).collect()),
        }
    }
}

impl Profile {
    fn check(&self, profile: &str) -> Result<(), ProfileError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if profile.is_empty() || profile.len() > 64 || !profile.chars().all(plain) {
            return Err(ProfileError::Name { name: profile.to_owned() });
        }
        let penalty = |value: f32| (-2.0..=2.0).contains(&value);
        let checks: [(&'static str, Option<f32>, &'static str, bool); 6] = [
            ("temperature", self.temperature, "0 to 2", self.temperature.is_none_or(|v| (0.0..=2.0).contains(&v))),
            ("top_p", self.top_p, "more than 0 and at most 1", self.top_p.is_none_or(|v| v > 0.0 && v <= 1.0)),
            ("min_p", self.min_p, "0 to 1", self.min_p.is_none_or(|v| (0.0..=1.0).contains(&v))),
            ("presence_penalty", self.presence_penalty, "-2 to 2", self.presence_penalty.is_none_or(penalty)),
            ("frequency_penalty", self.frequency_penalty, "-2 to 2", self.frequency_penalty.is_none_or(penalty)),
            (
                "repetition_penalty",
                self.repetition_penalty,
                "more than 0 and at most 2",
                self.repetition_penalty.is_none_or(|v| v > 0.0 && v <= 2.0),
            ),
        ];
        for (field, value, expected, good) in checks {
            if let (Some(value), false) = (value, good) {
                return Err(ProfileError::OutOfRange { profile: profile.to_owned(), field, value, expected });
            }
        }
        Ok(())
    }

    /// Fills in what the request left open.
    pub(crate) fn fill(&self, sampling: &mut SamplingParams) {
        sampling.temperature = sampling.temperature.or(self.temperature);
        sampling.top_p = sampling.top_p.or(self.top_p);
        sampling.top_k = sampling.top_k.or(self.top_k);
        sampling.min_p = sampling.min_p.or(self.min_p);
        sampling.presence_penalty = sampling.presence_penalty.or(self.presence_penalty);
        sampling.frequency_penalty = sampling.frequency_penalty.or(self.frequency_penalty);
        sampling.repetition_penalty = sampling.repetition_penalty.or(self.repetition_penalty);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_profile_is_answered_with_the_known_ones() {
        let profiles = Profiles::new([("mine".to_owned(), Profile::default())].into(), None).unwrap();
        assert_eq!(profiles.select(Some("fast")).unwrap_err(), ["balanced", "latency_first", "mine", "quality_first"]);
        assert_eq!(profiles.select(None).unwrap(), None);
    }

    #[test]
    fn a_setting_out_of_range_names_profile_and_setting() {
        let profile = Profile { temperature: Some(f32::NAN), ..Profile::default() };
        let error = Profiles::new([("hot".to_owned(), profile)].into(), None).unwrap_err();
        assert!(error.to_string().starts_with("profile hot: temperature is NaN, expected 0 to 2"));
        assert!(Profiles::new(BTreeMap::new(), Some("fast".into())).is_err());
    }

    #[test]
    fn the_request_goes_before_its_profile() {
        let profile = Profile { temperature: Some(0.5), top_k: Some(7), ..Profile::default() };
        let mut sampling = SamplingParams { temperature: Some(0.0), ..SamplingParams::default() };
        profile.fill(&mut sampling);
        assert_eq!((sampling.temperature, sampling.top_k), (Some(0.0), Some(7)));
    }
}
