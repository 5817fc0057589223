//! One live sequence: its tokens, its blocks, and what its next choice depends on.

use std::ops::Range;

use phalanx_proto::{
    fault::Fault,
    ids::{BlockId, SequenceId, Step, TokenId},
    plan::{Admission, Slice},
    sampling::SamplingSettings,
    trace,
};
use tracing::{Span, info_span};

use super::{Bounds, Purpose, broken};
use crate::sampler::{Choice, History};

pub(super) struct Sequence {
    id: SequenceId,
    /// Prompt, then everything sampled.
    tokens: Vec<TokenId>,
    prompt_tokens: usize,
    settings: SamplingSettings,
    stop_tokens: Vec<TokenId>,
    history: History,
    full_table: Vec<BlockId>,
    sliding_table: Vec<BlockId>,
    /// Position after the last computed one; unknown before the first slice, which may start behind cached blocks.
    computed: Option<usize>,
    /// The last step with a slice of it.
    last_step: Step,
    /// From admission to retirement, within the request's trace.
    _span: Span,
}

impl Sequence {
    pub(super) fn new(admission: &Admission, bounds: &Bounds) -> Self {
        let (prompt, generated) = admission.tokens.split_at(admission.prompt_tokens);
        let settings = admission.sampling.clone();
        let history = if settings.has_penalties() { History::new(prompt, generated) } else { History::default() };
        Self {
            id: admission.sequence,
            tokens: admission.tokens.clone(),
            prompt_tokens: admission.prompt_tokens,
            settings,
            stop_tokens: admission.stop_tokens.clone(),
            history,
            full_table: Vec::new(),
            sliding_table: Vec::new(),
            computed: None,
            last_step: Step(0),
            _span: span(admission, bounds),
        }
    }

    pub(super) fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    pub(super) fn full_table(&self) -> &[BlockId] {
        &self.full_table
    }

    pub(super) fn sliding_table(&self) -> &[BlockId] {
        &self.sliding_table
    }

    /// Appends a slice's blocks, once it is certain that its positions are the next ones. Whether the blocks suffice and
    /// exist is the model's to check, which knows the cache.
    pub(super) fn extend(&mut self, slice: &Slice, step: Step) -> Result<(), Fault> {
        let (first, end) = (slice.first_position, slice.first_position + slice.num_tokens);
        if self.last_step == step {
            return Err(broken(self.id, "has two slices"));
        }
        if let Some(computed) = self.computed
            && first != computed
        {
            return Err(broken(self.id, format!("a slice starts at position {first}, the next one is {computed}")));
        }
        let known = self.tokens.len();
        if end > known {
            return Err(broken(self.id, format!("a slice ends at position {end}, only {known} tokens are known")));
        }
        if slice.sample && end != known {
            return Err(broken(self.id, format!("samples after position {end}, but {known} tokens are known")));
        }
        self.full_table.extend(&slice.full_blocks);
        self.sliding_table.extend(&slice.sliding_blocks);
        self.computed = Some(end);
        self.last_step = step;
        Ok(())
    }

    /// Positions among `positions` whose logits tell how probable the prompt's next token was.
    pub(super) fn scored(&self, positions: Range<usize>) -> impl Iterator<Item = (usize, Purpose)> + '_ {
        let last = match self.settings.prompt_logprobs {
            Some(_) => positions.end.min(self.prompt_tokens - 1),
            None => positions.start,
        };
        let alternatives = self.settings.prompt_logprobs.unwrap_or_default() as usize;
        (positions.start..last)
            .map(move |position| (position, Purpose::Score { token: self.tokens[position + 1], alternatives }))
    }

    pub(super) fn choice(&self) -> Choice<'_> {
        let generated = self.tokens.len() - self.prompt_tokens;
        let too_early = generated < self.settings.min_tokens as usize;
        Choice {
            settings: &self.settings,
            position: self.tokens.len(),
            history: &self.history,
            forbidden: if too_early { &self.stop_tokens } else { &[] },
        }
    }

    pub(super) fn push(&mut self, token: TokenId) {
        self.tokens.push(token);
        if self.settings.has_penalties() {
            self.history.push(token);
        }
    }
}

fn span(admission: &Admission, bounds: &Bounds) -> Span {
    if admission.traceparent.is_empty() {
        return Span::none();
    }
    let span = info_span!(
        parent: None,
        "worker.sequence",
        rank = bounds.rank.0,
        epoch = bounds.epoch.0,
        sequence = admission.sequence.0,
        prompt_tokens = admission.prompt_tokens,
    );
    trace::set_parent(&span, &admission.traceparent);
    span
}
