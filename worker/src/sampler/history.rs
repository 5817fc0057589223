//! What a choice depends on beside the logits: tokens that came before, and the edits they cause.

use phalanx_proto::{ids::TokenId, sampling::SamplingSettings};
use rustc_hash::FxHashMap;

/// Tokens of one sequence, counted for its penalties.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// How often each token was generated; 0 for those that stand in the prompt only.
    generated: FxHashMap<TokenId, u32>,
}

impl History {
    /// Counts a prompt and what was generated after it.
    pub fn new(prompt: &[TokenId], generated: &[TokenId]) -> Self {
        let mut history = Self { generated: prompt.iter().map(|&token| (token, 0)).collect() };
        generated.iter().for_each(|&token| history.push(token));
        history
    }

    /// Counts one more generated token.
    pub fn push(&mut self, token: TokenId) {
        *self.generated.entry(token).or_default() += 1;
    }
}

/// How the token after a sequence's last one is chosen.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'a> {
    /// The request's settings.
    pub settings: &'a SamplingSettings,
    /// Position in the sequence that the token will have; part of the generator's key.
    pub position: usize,
    /// Counts for penalties; may be empty when the settings have none.
    pub history: &'a History,
    /// Tokens that cannot be chosen this time: the stop tokens before `min_tokens`.
    pub forbidden: &'a [TokenId],
}

impl Choice<'_> {
    /// Whether [`Choice::edit`] would change anything.
    pub(super) fn edits(&self) -> bool {
        !self.settings.logit_bias.is_empty() || self.settings.has_penalties() || !self.forbidden.is_empty()
    }

    /// Edits the logits of tokens `first ..`, in the order of vLLM's sampler: bias, repetition penalty, frequency and
    /// presence penalties; then what is forbidden is out of reach.
    pub(super) fn edit(&self, logits: &mut [f32], first: usize) {
        let settings = self.settings;
        let held = logits.len();
        let slot = |token: TokenId| token.index().checked_sub(first).filter(|&slot| slot < held);
        for (token, bias) in &settings.logit_bias {
            if let Some(slot) = slot(*token) {
                logits[slot] += bias;
            }
        }
        if settings.has_penalties() {
            for (&token, &count) in &self.history.generated {
                if let Some(slot) = slot(token) {
                    logits[slot] = penalized(logits[slot], count, settings);
                }
            }
        }
        for &token in self.forbidden {
            if let Some(slot) = slot(token) {
                logits[slot] = f32::NEG_INFINITY;
            }
        }
    }
}

fn penalized(logit: f32, generated: u32, settings: &SamplingSettings) -> f32 {
    let repetition = settings.repetition_penalty;
    // A penalty close to nothing would make an infinite logit of any positive one, and of the distances to it no numbers.
    let logit = if logit > 0.0 { (logit / repetition).min(f32::MAX) } else { logit * repetition };
    let presence = if generated > 0 { settings.presence_penalty } else { 0.0 };
    logit - settings.frequency_penalty * generated as f32 - presence
}
