//! Sampling settings, valid by construction.

use crate::{fault::Fault, ids::TokenId, v1};

/// Most entries of a logit bias.
pub const MAX_LOGIT_BIAS: usize = 1024;
/// Most alternatives that are reported beside a sampled token.
pub const MAX_LOGPROBS: u32 = 20;
/// Most stop tokens of one request.
pub const MAX_STOP_TOKENS: usize = 64;

/// How the next token of one sequence is chosen. Made only by [`SamplingSettings::check`], so every value is in range.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct SamplingSettings {
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus mass in (0, 1].
    pub top_p: f32,
    /// 0 is no limit.
    pub top_k: u32,
    /// Least probability relative to the most probable token, in [0, 1].
    pub min_p: f32,
    /// Subtracted once from the logits of tokens generated so far.
    pub presence_penalty: f32,
    /// Subtracted from the logits of tokens generated so far, once per occurrence.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output.
    pub repetition_penalty: f32,
    /// Added to the logits; sorted by token.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Stop tokens cannot be sampled before this many output tokens.
    pub min_tokens: u32,
    /// Generation does not end at a stop token.
    pub ignore_eos: bool,
    /// Key of the counter-based generator.
    pub seed: u64,
    /// Index among the choices of one request; part of the generator's key.
    pub choice: u32,
    /// Number of alternatives to report beside each sampled token.
    pub logprobs: Option<u32>,
    /// The same for the prompt's tokens.
    pub prompt_logprobs: Option<u32>,
}

fn in_range(field: &str, value: f32, least: f32, most: f32) -> Result<f32, Fault> {
    if value.is_finite() && (least..=most).contains(&value) {
        return Ok(value);
    }
    Err(Fault::invalid(field, format!("{field} is {value}, expected {least} to {most}")))
}

fn above_zero(field: &str, value: f32, most: f32) -> Result<f32, Fault> {
    if value > 0.0 && value <= most {
        return Ok(value);
    }
    Err(Fault::invalid(field, format!("{field} is {value}, expected more than 0 and at most {most}")))
}

fn logprob_count(field: &str, count: Option<u32>) -> Result<Option<u32>, Fault> {
    match count {
        Some(count) if count > MAX_LOGPROBS => {
            Err(Fault::invalid(field, format!("{field} is {count}, expected 0 to {MAX_LOGPROBS}")))
        }
        count => Ok(count),
    }
}

impl SamplingSettings {
    /// Checks a message against the documented ranges and a vocabulary of `vocab_size` tokens.
    /// An absent seed becomes `default_seed`.
    ///
    /// # Errors
    /// Names the first field that is out of range.
    pub fn check(message: &v1::Sampling, vocab_size: usize, default_seed: u64) -> Result<Self, Fault> {
        if message.logit_bias.len() > MAX_LOGIT_BIAS {
            let found = message.logit_bias.len();
            let text = format!("logit_bias has {found} entries, expected at most {MAX_LOGIT_BIAS}");
            return Err(Fault::invalid("logit_bias", text));
        }
        let mut logit_bias = Vec::with_capacity(message.logit_bias.len());
        for (&token, &bias) in &message.logit_bias {
            if token as usize >= vocab_size {
                let text = format!("logit_bias names token {token}, expected less than the vocabulary's {vocab_size}");
                return Err(Fault::invalid("logit_bias", text));
            }
            logit_bias.push((TokenId(token), in_range("logit_bias", bias, -100.0, 100.0)?));
        }
        Ok(Self {
            temperature: in_range("temperature", message.temperature.unwrap_or(1.0), 0.0, 2.0)?,
            top_p: above_zero("top_p", message.top_p.unwrap_or(1.0), 1.0)?,
            top_k: message.top_k,
            min_p: in_range("min_p", message.min_p, 0.0, 1.0)?,
            presence_penalty: in_range("presence_penalty", message.presence_penalty, -2.0, 2.0)?,
            frequency_penalty: in_range("frequency_penalty", message.frequency_penalty, -2.0, 2.0)?,
            repetition_penalty: above_zero("repetition_penalty", message.repetition_penalty.unwrap_or(1.0), 2.0)?,
            logit_bias,
            min_tokens: message.min_tokens,
            ignore_eos: message.ignore_eos,
            seed: message.seed.unwrap_or(default_seed),
            choice: message.choice,
            logprobs: logprob_count("logprobs", message.logprobs)?,
            prompt_logprobs: logprob_count("prompt_logprobs", message.prompt_logprobs)?,
        })
    }

    /// Whether the most probable token is always taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether the choice depends on tokens that came before.
    pub fn has_penalties(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0 || self.repetition_penalty != 1.0
    }
}

impl From<&SamplingSettings> for v1::Sampling {
    fn from(s: &SamplingSettings) -> Self {
        Self {
            temperature: Some(s.temperature),
            top_p: Some(s.top_p),
            top_k: s.top_k,
            min_p: s.min_p,
            presence_penalty: s.presence_penalty,
            frequency_penalty: s.frequency_penalty,
            repetition_penalty: Some(s.repetition_penalty),
            logit_bias: s.logit_bias.iter().map(|&(token, bias)| (token.0, bias)).collect(),
            min_tokens: s.min_tokens,
            ignore_eos: s.ignore_eos,
            seed: Some(s.seed),
            choice: s.choice,
            logprobs: s.logprobs,
            prompt_logprobs: s.prompt_logprobs,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_message_means_the_model_cards_defaults() {
        let settings = SamplingSettings::check(&v1::Sampling::default(), 10, 7).unwrap();
        assert_eq!((settings.temperature, settings.top_p, settings.top_k, settings.seed), (1.0, 1.0, 0, 7));
        assert_eq!(SamplingSettings::check(&v1::Sampling::from(&settings), 10, 0).unwrap(), settings);
    }

    #[test]
    fn values_out_of_range_name_their_field() {
        let cases = [
            ("temperature", v1::Sampling { temperature: Some(2.5), ..Default::default() }),
            ("temperature", v1::Sampling { temperature: Some(f32::NAN), ..Default::default() }),
            ("top_p", v1::Sampling { top_p: Some(0.0), ..Default::default() }),
            ("min_p", v1::Sampling { min_p: -0.1, ..Default::default() }),
            ("repetition_penalty", v1::Sampling { repetition_penalty: Some(0.0), ..Default::default() }),
            ("logit_bias", v1::Sampling { logit_bias: [(10, 0.0)].into(), ..Default::default() }),
            ("logprobs", v1::Sampling { logprobs: Some(21), ..Default::default() }),
        ];
        for (field, message) in cases {
            assert_eq!(SamplingSettings::check(&message, 10, 0).unwrap_err().field, field);
        }
    }
}
