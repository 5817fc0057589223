//! Tokens of a Harmony turn to pieces of an OpenAI message.

use phalanx_proto::v1;

use super::{
    Assembler,
    logprobs::{Pending, chat_logprob},
    stop::StopStrings,
};
use crate::{
    harmony::{Author, Channel, Ending, Event, Harmony, Header, Parser},
    openai::reply::{FinishReason, TokenLogprob},
};

/// A piece of a message. Pieces of one kind are concatenated.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum ChatPiece {
    /// More reasoning.
    Reasoning(String),
    /// More of the answer; the log-probabilities are of the tokens that end in it.
    Content { text: String, logprobs: Vec<TokenLogprob> },
    /// The call with this index begins.
    Call { index: u32, id: String, name: String },
    /// More arguments of the call with this index.
    Arguments { index: u32, text: String },
}

/// What the pieces of one choice depend on.
#[derive(Clone, Debug, Default)]
pub(crate) struct ChatSettings {
    /// Names of the functions that the model was offered. With none, what looks like a call is content.
    pub(crate) functions: Vec<String>,
    /// Whether more than one call may come.
    pub(crate) parallel_calls: bool,
    /// Tokens of the prompt that already belong to the model's turn.
    pub(crate) prefill: Vec<u32>,
    /// Beginning of the calls' ids.
    pub(crate) call_id: String,
    /// Stop strings.
    pub(crate) stop: Vec<String>,
    /// Tokens that end the answer and are not part of it.
    pub(crate) stop_tokens: Vec<u32>,
    pub(crate) include_reasoning: bool,
    pub(crate) logprobs: bool,
}

/// What a message is for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Reasoning,
    /// Said to the user before or between calls. Stop strings do not apply.
    Preamble,
    Answer,
    Call,
}

/// Assembles one choice of a chat completion.
pub(crate) struct ChatAssembler {
    harmony: Harmony,
    parser: Parser,
    settings: ChatSettings,
    /// The message that is open.
    kind: Option<Kind>,
    calls: u32,
    stop: StopStrings,
    pending: Pending<TokenLogprob>,
    reasoning_tokens: u64,
    stopped: bool,
    /// Pieces that the prefill made.
    opening: Vec<ChatPiece>,
}

impl ChatAssembler {
    pub(crate) fn new(harmony: Harmony, mut settings: ChatSettings) -> Self {
        let mut assembler = Self {
            parser: harmony.parser(settings.functions.clone()),
            harmony,
            stop: StopStrings::new(std::mem::take(&mut settings.stop)),
            settings,
            kind: None,
            calls: 0,
            pending: Pending::default(),
            reasoning_tokens: 0,
            stopped: false,
            opening: Vec::new(),
        };
        let mut opening = Vec::new();
        for id in std::mem::take(&mut assembler.settings.prefill) {
            let events = assembler.parser.push(id);
            assembler.take_events(events, &mut opening);
        }
        assembler.opening = opening;
        assembler
    }

    fn kind_of(&self, header: &Header) -> Kind {
        let is_call = header.called_function().is_some() && !self.settings.functions.is_empty();
        match (&header.author, header.channel) {
            // Turns of others that the model makes up are no answer, but they are not lost either.
            (Author::System | Author::Developer | Author::User(_) | Author::Tool(_), _) => Kind::Reasoning,
            (Author::Assistant(_), _) if is_call => Kind::Call,
            (Author::Assistant(_), Some(Channel::Analysis)) => Kind::Reasoning,
            (Author::Assistant(_), Some(Channel::Commentary)) => Kind::Preamble,
            (Author::Assistant(_), Some(Channel::Final) | None) => Kind::Answer,
        }
    }

    fn take_events(&mut self, events: Vec<Event>, out: &mut Vec<ChatPiece>) {
        let mut just_begun = false;
        for event in events {
            match event {
                Event::Start(header) => {
                    self.begin(&header, out);
                    just_begun = true;
                }
                Event::Text(text) => {
                    if just_begun && matches!(self.kind, Some(Kind::Preamble | Kind::Answer)) {
                        // A header that turned out to be content: its tokens were not counted as such.
                        self.pending.receive(text.len(), None);
                    }
                    self.take_text(text, out);
                }
                Event::End(ending) => self.end(ending, out),
            }
            if self.stopped {
                return;
            }
        }
    }

    fn begin(&mut self, header: &Header, out: &mut Vec<ChatPiece>) {
        let kind = self.kind_of(header);
        self.kind = Some(kind);
        if kind == Kind::Call {
            let index = self.calls;
            self.calls += 1;
            let name = header.called_function().unwrap_or_default().to_owned();
            out.push(ChatPiece::Call { index, id: format!("{}{index:02}", self.settings.call_id), name });
        }
    }

    fn take_text(&mut self, text: String, out: &mut Vec<ChatPiece>) {
        match self.kind {
            Some(Kind::Reasoning) if self.settings.include_reasoning => emit(ChatPiece::Reasoning(text), out),
            Some(Kind::Reasoning) | None => {}
            Some(Kind::Preamble) => self.give_content(text, out),
            Some(Kind::Answer) => {
                let text = self.stop.push(text);
                self.give_content(text, out);
                if self.stop.has_matched() {
                    self.stopped = true;
                    let logprobs = self.pending.cut();
                    push_content(String::new(), logprobs, out);
                }
            }
            Some(Kind::Call) => emit(ChatPiece::Arguments { index: self.calls.saturating_sub(1), text }, out),
        }
    }

    fn give_content(&mut self, text: String, out: &mut Vec<ChatPiece>) {
        let logprobs = self.pending.give(text.len());
        push_content(text, logprobs, out);
    }

    fn end(&mut self, ending: Ending, out: &mut Vec<ChatPiece>) {
        match self.kind.take() {
            Some(Kind::Answer) => {
                let held = self.stop.flush();
                self.give_content(held, out);
            }
            // One call was asked for, and it is whole.
            Some(Kind::Call) if !self.settings.parallel_calls => self.stopped = ending.is_complete(),
            _ => {}
        }
    }

    /// Counts a token of the open message before the parser sees it.
    fn count(&mut self, token: &v1::Token) {
        if self.harmony.control(token.id).is_some() {
            return;
        }
        match self.kind {
            Some(Kind::Reasoning) => self.reasoning_tokens += 1,
            Some(Kind::Preamble | Kind::Answer) => {
                let tokenizer = self.harmony.tokenizer();
                let entry = self.settings.logprobs.then(|| chat_logprob(tokenizer, token));
                self.pending.receive(tokenizer.token_bytes(token.id).unwrap_or_default().len(), entry);
            }
            Some(Kind::Call) | None => {}
        }
    }
}

fn push_content(text: String, logprobs: Vec<TokenLogprob>, out: &mut Vec<ChatPiece>) {
    if !text.is_empty() || !logprobs.is_empty() {
        emit(ChatPiece::Content { text, logprobs }, out);
    }
}

/// Appends a piece, or lengthens the last one if it is of the same kind.
fn emit(piece: ChatPiece, out: &mut Vec<ChatPiece>) {
    match (piece, out.last_mut()) {
        (ChatPiece::Reasoning(more), Some(ChatPiece::Reasoning(text))) => text.push_str(&more),
        (ChatPiece::Content { text: more, logprobs: added }, Some(ChatPiece::Content { text, logprobs })) => {
            text.push_str(&more);
            logprobs.extend(added);
        }
        (ChatPiece::Arguments { index, text: more }, Some(ChatPiece::Arguments { index: last, text }))
            if index == *last =>
        {
            text.push_str(&more);
        }
        (piece, _) => out.push(piece),
    }
}

impl Assembler for ChatAssembler {
    type Piece = ChatPiece;

    fn push_prompt(&mut self, _tokens: &[v1::Token], _out: &mut Vec<ChatPiece>) {
        // The chat API does not report on the prompt, and nobody asks the coordinator for it.
    }

    fn push(&mut self, token: &v1::Token, out: &mut Vec<ChatPiece>) {
        out.append(&mut self.opening);
        if self.stopped {
            return;
        }
        if self.settings.stop_tokens.contains(&token.id) && self.harmony.control(token.id).is_none() {
            self.stopped = true;
            return;
        }
        self.count(token);
        let events = self.parser.push(token.id);
        self.take_events(events, out);
    }

    fn finish(&mut self, out: &mut Vec<ChatPiece>) {
        out.append(&mut self.opening);
        // What a stop string or the one wanted call left behind is cut; what a stop token left behind is not.
        let is_cut = self.stop.has_matched() || (self.stopped && self.kind.is_none());
        if is_cut {
            return;
        }
        self.stopped = false;
        let events = self.parser.finish();
        self.take_events(events, out);
        push_content(String::new(), self.pending.flush(), out);
        self.stopped = true;
    }

    fn has_stopped(&self) -> bool {
        self.stopped
    }

    fn finish_reason(&self, length: bool) -> FinishReason {
        match (length, self.calls) {
            (true, _) => FinishReason::Length,
            (false, 0) => FinishReason::Stop,
            (false, _) if self.stop.has_matched() => FinishReason::Stop,
            (false, _) => FinishReason::ToolCalls,
        }
    }

    fn reasoning_tokens(&self) -> u64 {
        self.reasoning_tokens
    }
}
