//! Tokens to pieces of an answer.
//!
//! Pure: no I/O, no clock, no task. Tokens are taken one by one, so that the concatenation of the pieces is the same
//! however tokens are grouped on their way here.
//!
//! - `chat`: pieces of a message: reasoning, content, calls;
//! - `text`: pieces of a bare text;
//! - `stop`: stop strings, held back while they may still match;
//! - `logprobs`: log-probabilities, given out beside the text they belong to.

mod chat;
mod logprobs;
mod stop;
mod text;

#[cfg(test)]
mod tests;

use phalanx_proto::v1;

use crate::openai::reply::FinishReason;

pub(crate) use chat::{ChatAssembler, ChatPiece, ChatSettings};
pub(crate) use text::{TextAssembler, TextPiece, TextSettings};

/// Makes pieces of one choice out of its tokens.
pub(crate) trait Assembler: Send + 'static {
    /// What comes out.
    type Piece: Send;

    /// Takes log-probabilities of the prompt.
    fn push_prompt(&mut self, tokens: &[v1::Token], out: &mut Vec<Self::Piece>);

    /// Takes the next token. After [`Assembler::has_stopped`] nothing more comes out.
    fn push(&mut self, token: &v1::Token, out: &mut Vec<Self::Piece>);

    /// Takes the end of the tokens; what was held back comes out.
    fn finish(&mut self, out: &mut Vec<Self::Piece>);

    /// Whether the answer is over although the coordinator would go on.
    fn has_stopped(&self) -> bool;

    /// Why the answer is over, when the coordinator says `length` or not.
    fn finish_reason(&self, length: bool) -> FinishReason;

    /// Tokens spent on reasoning so far.
    fn reasoning_tokens(&self) -> u64;
}
