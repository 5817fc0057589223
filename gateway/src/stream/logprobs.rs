//! Log-probabilities of tokens, given out beside the text they belong to.

use std::{collections::VecDeque, fmt::Write};

use phalanx_proto::v1;

use crate::{
    openai::reply::{TokenLogprob, TopLogprob},
    tokenizer::Tokenizer,
};

/// A token's text; bytes that are no text by themselves are spelt out, as OpenAI does.
pub(super) fn token_text(bytes: &[u8]) -> String {
    if let Ok(text) = std::str::from_utf8(bytes) {
        return text.to_owned();
    }
    bytes.iter().fold("bytes:".to_owned(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "\\x{byte:02x}");
        text
    })
}

/// A token as the chat API shows it.
pub(super) fn chat_logprob(tokenizer: &Tokenizer, token: &v1::Token) -> TokenLogprob {
    let bytes_of = |id| tokenizer.token_bytes(id).unwrap_or_default();
    let top = token.top.iter().map(|top| {
        let bytes = bytes_of(top.id);
        TopLogprob { token: token_text(bytes), logprob: top.logprob, bytes: bytes.to_vec() }
    });
    let bytes = bytes_of(token.id);
    TokenLogprob {
        token: token_text(bytes),
        logprob: token.logprob.unwrap_or_default(),
        bytes: bytes.to_vec(),
        top_logprobs: top.collect(),
    }
}

/// Entries that wait until the text of their tokens has been given out.
#[derive(Debug)]
pub(super) struct Pending<T> {
    /// First byte, one past the last byte, entry.
    entries: VecDeque<(usize, usize, T)>,
    /// Bytes of text that tokens have brought.
    received: usize,
    /// Bytes of text that have been given out.
    given: usize,
}

impl<T> Default for Pending<T> {
    fn default() -> Self {
        Self { entries: VecDeque::new(), received: 0, given: 0 }
    }
}

impl<T> Pending<T> {
    /// Counts text that arrived; `entry` is its token's.
    pub(super) fn receive(&mut self, bytes: usize, entry: Option<T>) {
        let start = self.received;
        self.received += bytes;
        self.entries.extend(entry.map(|entry| (start, self.received, entry)));
    }

    /// Counts text that is given out, and returns the entries of the tokens that it ends.
    pub(super) fn give(&mut self, bytes: usize) -> Vec<T> {
        self.given += bytes;
        self.take_while(|_, end, given| end <= given)
    }

    /// The text was cut here: tokens that begin behind it have no entry.
    pub(super) fn cut(&mut self) -> Vec<T> {
        let rest = self.take_while(|start, _, given| start < given);
        self.entries.clear();
        rest
    }

    /// The text is over: every entry comes out.
    pub(super) fn flush(&mut self) -> Vec<T> {
        self.take_while(|_, _, _| true)
    }

    fn take_while(&mut self, wanted: impl Fn(usize, usize, usize) -> bool) -> Vec<T> {
        let mut taken = Vec::new();
        while let Some(&(start, end, _)) = self.entries.front()
            && wanted(start, end, self.given)
        {
            taken.extend(self.entries.pop_front().map(|(_, _, entry)| entry));
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_wait_for_the_last_byte_of_their_token() {
        let mut pending = Pending::default();
        pending.receive(2, Some('a'));
        pending.receive(1, Some('b'));
        assert_eq!(pending.give(1), []);
        assert_eq!(pending.give(2), ['a', 'b']);
    }

    #[test]
    fn tokens_behind_a_cut_have_no_entry() {
        let mut pending = Pending::default();
        for (bytes, entry) in [(2, 'a'), (2, 'b'), (2, 'c')] {
            pending.receive(bytes, Some(entry));
        }
        assert_eq!(pending.give(3), ['a']);
        assert_eq!(pending.cut(), ['b']);
        assert_eq!(pending.flush(), []);
    }

    #[test]
    fn bytes_that_are_no_text_are_spelt_out() {
        assert_eq!(token_text("서".as_bytes()), "서");
        assert_eq!(token_text(&"서".as_bytes()[..2]), "bytes:\\xec\\x84");
    }
}
