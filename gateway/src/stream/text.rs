//! Tokens of a bare text, for `/v1/completions`.

use std::sync::Arc;

use phalanx_proto::v1;

use super::{
    Assembler,
    logprobs::{Pending, token_text},
    stop::StopStrings,
};
use crate::{
    openai::reply::{FinishReason, TextLogprobs, TopLogprobs},
    tokenizer::{Tokenizer, Utf8Stream},
};

/// More text; the log-probabilities are of the tokens that end in it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct TextPiece {
    pub(crate) text: String,
    pub(crate) logprobs: Option<TextLogprobs>,
}

/// What the text of one choice depends on.
#[derive(Clone, Debug, Default)]
pub(crate) struct TextSettings {
    /// The prompt, if it is to be repeated: its text and its tokens.
    pub(crate) echo: Option<(String, Vec<u32>)>,
    /// Stop strings.
    pub(crate) stop: Vec<String>,
    /// Tokens that end the text and are not part of it.
    pub(crate) stop_tokens: Vec<u32>,
    pub(crate) skip_special_tokens: bool,
    pub(crate) logprobs: bool,
    /// Nothing was asked for beyond the prompt: what is generated is dropped.
    pub(crate) prompt_only: bool,
}

/// Assembles one choice of a text completion.
pub(crate) struct TextAssembler {
    tokenizer: Arc<Tokenizer>,
    settings: TextSettings,
    utf8: Utf8Stream,
    stop: StopStrings,
    pending: Pending<TextLogprobs>,
    /// Characters that began before the next token.
    offset: usize,
    stopped: bool,
    opening: Option<TextPiece>,
    /// The first token of an echoed prompt, until it is known whether the coordinator reports on it.
    first: Option<u32>,
}

impl TextAssembler {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, mut settings: TextSettings) -> Self {
        let (text, tokens) = settings.echo.take().unwrap_or_default();
        let first = tokens.first().copied().filter(|_| settings.logprobs);
        Self {
            tokenizer,
            utf8: Utf8Stream::default(),
            stop: StopStrings::new(std::mem::take(&mut settings.stop)),
            pending: Pending::default(),
            offset: if first.is_some() { 0 } else { text.chars().count() },
            stopped: false,
            opening: (!text.is_empty()).then_some(TextPiece { text, logprobs: None }),
            first,
            settings,
        }
    }

    /// One token's place in the four lists.
    fn entry(&mut self, token: &v1::Token, shown: usize) -> TextLogprobs {
        let text_of = |id| token_text(self.tokenizer.token_bytes(id).unwrap_or_default());
        let text = text_of(token.id);
        let top = token.logprob.map(|logprob| {
            // The sampled token is always among them. An object has each text once; the likelier token keeps it.
            let mut top: Vec<(String, f32)> = Vec::with_capacity(token.top.len() + 1);
            let all = token.top.iter().map(|top| (text_of(top.id), top.logprob)).chain([(text.clone(), logprob)]);
            for (text, logprob) in all {
                if !top.iter().any(|(earlier, _)| *earlier == text) {
                    top.push((text, logprob));
                }
            }
            TopLogprobs(top)
        });
        let entry = TextLogprobs {
            tokens: vec![text],
            token_logprobs: vec![token.logprob],
            top_logprobs: vec![top],
            text_offset: vec![self.offset],
        };
        self.offset += shown;
        entry
    }

    /// Characters that begin in a token.
    fn characters(&self, id: u32) -> usize {
        let begins = |byte: &&u8| **byte & 0b1100_0000 != 0b1000_0000;
        self.tokenizer.token_bytes(id).unwrap_or_default().iter().filter(begins).count()
    }

    fn piece(&self, text: String, entries: Vec<TextLogprobs>, out: &mut Vec<TextPiece>) {
        if text.is_empty() && entries.is_empty() {
            return;
        }
        let merge = |mut all: TextLogprobs, one| {
            all.extend(one);
            all
        };
        let logprobs = self.settings.logprobs.then(|| entries.into_iter().fold(TextLogprobs::default(), merge));
        match out.last_mut() {
            Some(last) if last.logprobs.is_some() == logprobs.is_some() => {
                last.text.push_str(&text);
                if let (Some(all), Some(more)) = (&mut last.logprobs, logprobs) {
                    all.extend(more);
                }
            }
            _ => out.push(TextPiece { text, logprobs }),
        }
    }

    fn give(&mut self, text: String, out: &mut Vec<TextPiece>) {
        let text = self.stop.push(text);
        let mut entries = self.pending.give(text.len());
        if self.stop.has_matched() {
            self.stopped = true;
            entries.extend(self.pending.cut());
        }
        self.piece(text, entries, out);
    }
}

impl Assembler for TextAssembler {
    type Piece = TextPiece;

    fn push_prompt(&mut self, tokens: &[v1::Token], out: &mut Vec<TextPiece>) {
        out.extend(self.opening.take());
        let mut entries = Vec::with_capacity(tokens.len() + 1);
        if let Some(id) = self.first.take()
            && tokens.first().is_some_and(|token| token.logprob.is_some())
        {
            let shown = self.characters(id);
            entries.push(self.entry(&v1::Token { id, logprob: None, top: Vec::new() }, shown));
        }
        for token in tokens {
            let shown = self.characters(token.id);
            entries.push(self.entry(token, shown));
        }
        self.piece(String::new(), entries, out);
    }

    fn push(&mut self, token: &v1::Token, out: &mut Vec<TextPiece>) {
        out.extend(self.opening.take());
        if let Some(id) = self.first.take() {
            // A prompt of one token has nothing to report on.
            let shown = self.characters(id);
            let entry = self.entry(&v1::Token { id, logprob: None, top: Vec::new() }, shown);
            self.piece(String::new(), vec![entry], out);
        }
        if self.stopped || self.settings.prompt_only {
            return;
        }
        let hidden = self.settings.skip_special_tokens && self.tokenizer.is_special(token.id);
        if self.settings.stop_tokens.contains(&token.id) {
            self.stopped = true;
            return;
        }
        let shown = if hidden { 0 } else { self.characters(token.id) };
        let entry = self.settings.logprobs.then(|| self.entry(token, shown));
        let tokenizer = Arc::clone(&self.tokenizer);
        let bytes = if hidden { &[] } else { tokenizer.token_bytes(token.id).unwrap_or("\u{FFFD}".as_bytes()) };
        self.pending.receive(bytes.len(), entry);
        let text = self.utf8.push(bytes);
        self.give(text, out);
    }

    fn finish(&mut self, out: &mut Vec<TextPiece>) {
        out.extend(self.opening.take());
        if self.stop.has_matched() {
            return;
        }
        let held = self.utf8.finish();
        self.give(held, out);
        if !self.stop.has_matched() {
            let text = self.stop.flush();
            let entries = self.pending.flush();
            self.piece(text, entries, out);
        }
        self.stopped = true;
    }

    fn has_stopped(&self) -> bool {
        self.stopped
    }

    fn finish_reason(&self, length: bool) -> FinishReason {
        if length { FinishReason::Length } else { FinishReason::Stop }
    }

    fn reasoning_tokens(&self) -> u64 {
        0
    }
}
