//! Tokens of the model to messages, one token at a time.
//!
//! The parser is total: every row of tokens has a reading, and all its text is in it. What is malformed is read for what
//! it most likely means and noted as a repair. Since it works token by token, what it gives out does not depend on how
//! tokens were grouped on their way.

use std::{mem, sync::Arc};

use super::{
    Control, Harmony, Header, Repair, RepairKind,
    header::{Draft, Mark, Opening, Reading, Verdict},
};
use crate::tokenizer::Utf8Stream;

/// What a token brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A message begins.
    Start(Header),
    /// More content of the current message.
    Text(String),
    /// The current message is over.
    End(Ending),
}

/// What ended a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// `<|end|>`: another message follows.
    End,
    /// `<|return|>`: the turn is over.
    Return,
    /// `<|call|>`: a tool's result is awaited.
    Call,
    /// Nothing of the message's own: the next message, or the end of the tokens.
    Cut,
}

impl Ending {
    /// Whether the message was brought to its end.
    pub fn is_complete(self) -> bool {
        self != Self::Cut
    }
}

/// A whole message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParsedMessage {
    /// What its header says.
    pub header: Header,
    /// Its text.
    pub content: String,
    /// What ended it.
    pub ending: Ending,
}

/// Everything that a row of tokens says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parsed {
    /// The messages in order.
    pub messages: Vec<ParsedMessage>,
    /// What was malformed.
    pub repairs: Vec<Repair>,
}

impl Parsed {
    pub(super) fn extend(&mut self, events: Vec<Event>) {
        for event in events {
            match (event, self.messages.last_mut()) {
                (Event::Start(header), _) => {
                    self.messages.push(ParsedMessage { header, content: String::new(), ending: Ending::Cut });
                }
                (Event::Text(text), Some(message)) => message.content.push_str(&text),
                (Event::End(ending), Some(message)) => message.ending = ending,
                // The parser gives out nothing before a start.
                (Event::Text(_) | Event::End(_), None) => {}
            }
        }
    }
}

#[derive(Debug)]
enum State {
    /// After the end of a message.
    Outside,
    Header(Draft),
    Content,
    /// In content, behind a `<|channel|>` that may begin the next header.
    Mark(Draft),
}

/// What becomes of a header that no `<|message|>` ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unclosed {
    /// Its message ended.
    Ended(Ending),
    /// The next message began.
    Interrupted,
    /// It is too long to be one: its message goes on.
    TooLong,
    /// The tokens ended.
    OutOfTokens,
}

/// Parses one completion.
#[derive(Debug)]
pub struct Parser {
    harmony: Harmony,
    functions: Vec<String>,
    state: State,
    utf8: Utf8Stream,
    position: usize,
    repairs: Vec<Repair>,
}

impl Parser {
    pub(super) fn new(harmony: Harmony, functions: Vec<String>) -> Self {
        Self {
            harmony,
            functions,
            state: State::Header(Draft::new(Opening::Turn)),
            utf8: Utf8Stream::default(),
            position: 0,
            repairs: Vec::new(),
        }
    }

    /// Takes the next token.
    pub fn push(&mut self, id: u32) -> Vec<Event> {
        let mut events = Vec::new();
        match self.harmony.control(id) {
            Some(control) => self.take_control(control, &mut events),
            None => self.take_other(id, &mut events),
        }
        self.position += 1;
        events
    }

    /// Takes the end of the tokens. What was held back comes out, and a message that is still open is cut.
    pub fn finish(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        self.decide_mark(&mut events);
        match mem::replace(&mut self.state, State::Outside) {
            State::Header(draft) if draft.is_blank() => self.note_space(&draft),
            State::Header(draft) => self.read_unclosed(&draft, Unclosed::OutOfTokens, &mut events),
            State::Content => self.end_message(Ending::Cut, &mut events),
            State::Outside | State::Mark(_) => {}
        }
        events
    }

    /// What was malformed so far.
    pub fn repairs(&self) -> &[Repair] {
        &self.repairs
    }

    pub(super) fn into_repairs(self) -> Vec<Repair> {
        self.repairs
    }

    fn repair(&mut self, kind: RepairKind, text: impl Into<String>) {
        self.repairs.push(Repair { at: self.position, kind, text: text.into() });
    }

    fn take_other(&mut self, id: u32, events: &mut Vec<Event>) {
        let tokenizer = Arc::clone(self.harmony.tokenizer());
        let Some(bytes) = tokenizer.token_bytes(id) else {
            self.repair(RepairKind::UnknownToken, id.to_string());
            return self.take_text("\u{FFFD}".as_bytes(), events);
        };
        if tokenizer.is_special(id) {
            let name = String::from_utf8_lossy(bytes).into_owned();
            let has_meaning = matches!(name.as_str(), "<|endoftext|>" | "<|startoftext|>" | "<|endofprompt|>");
            self.repair(RepairKind::StrayControl, name);
            // A token that no text and no format gives a meaning has only its name to show.
            if has_meaning || !matches!(self.state, State::Content) {
                return;
            }
        }
        self.take_text(bytes, events);
    }

    fn take_text(&mut self, bytes: &[u8], events: &mut Vec<Event>) {
        match mem::replace(&mut self.state, State::Content) {
            State::Outside => {
                let mut draft = Draft::new(Opening::Implied);
                draft.push_text(bytes);
                self.state = State::Header(draft);
            }
            State::Header(mut draft) => {
                draft.push_text(bytes);
                if draft.is_too_long() {
                    self.read_unclosed(&draft, Unclosed::TooLong, events);
                } else {
                    self.state = State::Header(draft);
                }
            }
            State::Content => push_text(events, self.utf8.push(bytes)),
            State::Mark(mut draft) => {
                draft.push_text(bytes);
                let verdict = draft.verdict(false);
                self.follow(verdict, draft, events);
            }
        }
    }

    fn take_control(&mut self, control: Control, events: &mut Vec<Event>) {
        self.decide_mark(events);
        match mem::replace(&mut self.state, State::Outside) {
            State::Outside => self.control_outside(control, events),
            State::Header(draft) => self.control_in_header(draft, control, events),
            State::Content | State::Mark(_) => self.control_in_content(control, events),
        }
    }

    fn control_outside(&mut self, control: Control, events: &mut Vec<Event>) {
        match control {
            Control::Start => self.state = State::Header(Draft::new(Opening::Marked)),
            Control::Message | Control::Channel | Control::Constrain => {
                self.control_in_header(Draft::new(Opening::Implied), control, events);
            }
            Control::End | Control::Return | Control::Call => self.repair(RepairKind::StrayControl, control.name()),
        }
    }

    fn control_in_header(&mut self, mut draft: Draft, control: Control, events: &mut Vec<Event>) {
        match control {
            Control::Message => self.close_header(&draft, events),
            Control::Constrain => {
                draft.push_mark(Mark::Constrain);
                self.state = State::Header(draft);
            }
            Control::Channel => {
                let mut draft = self.without_finished_message(draft, events);
                draft.push_mark(Mark::Channel);
                self.state = State::Header(draft);
            }
            Control::Start => {
                if !draft.is_blank() {
                    self.read_unclosed(&draft, Unclosed::Interrupted, events);
                } else if draft.opening == Opening::Marked {
                    self.repair(RepairKind::DoubledHeader, control.name());
                } else {
                    self.note_space(&draft);
                }
                self.state = State::Header(Draft::new(Opening::Marked));
            }
            Control::End | Control::Return | Control::Call => {
                if draft.is_blank() {
                    self.note_space(&draft);
                    self.repair(RepairKind::StrayControl, control.name());
                } else {
                    self.read_unclosed(&draft, Unclosed::Ended(ending(control)), events);
                }
                self.state = State::Outside;
            }
        }
    }

    /// A second `<|channel|>` behind prose begins a message of its own; the prose is the one before it.
    fn without_finished_message(&mut self, draft: Draft, events: &mut Vec<Event>) -> Draft {
        let prose = |reading: &Reading| reading.content.trim_ascii().contains(&b' ');
        if !draft.names_channel() || !prose(&draft.read_open(&self.functions)) {
            return draft;
        }
        self.read_unclosed(&draft, Unclosed::Interrupted, events);
        Draft::new(Opening::Implied)
    }

    fn control_in_content(&mut self, control: Control, events: &mut Vec<Event>) {
        match control {
            Control::End | Control::Return | Control::Call => self.end_message(ending(control), events),
            Control::Start => {
                self.repair(RepairKind::MissingEnd, control.name());
                self.end_message(Ending::Cut, events);
                self.state = State::Header(Draft::new(Opening::Marked));
            }
            Control::Channel => {
                let mut draft = Draft::new(Opening::Implied);
                draft.push_mark(Mark::Channel);
                self.state = State::Mark(draft);
            }
            Control::Message | Control::Constrain => {
                self.repair(RepairKind::StrayControl, control.name());
                self.state = State::Content;
            }
        }
    }

    /// Decides about a `<|channel|>` in content when no more text of it comes.
    fn decide_mark(&mut self, events: &mut Vec<Event>) {
        match mem::replace(&mut self.state, State::Outside) {
            State::Mark(draft) => {
                let verdict = draft.verdict(true);
                self.follow(verdict, draft, events);
            }
            state => self.state = state,
        }
    }

    fn follow(&mut self, verdict: Verdict, draft: Draft, events: &mut Vec<Event>) {
        match verdict {
            Verdict::NotYetKnown => self.state = State::Mark(draft),
            Verdict::Header => {
                self.repair(RepairKind::MissingEnd, Control::Channel.name());
                self.end_message(Ending::Cut, events);
                self.state = State::Header(draft);
            }
            Verdict::NoHeader => {
                self.repair(RepairKind::StrayControl, Control::Channel.name());
                push_text(events, self.utf8.push(&draft.text()));
                self.state = State::Content;
            }
        }
    }

    fn close_header(&mut self, draft: &Draft, events: &mut Vec<Event>) {
        if draft.opening == Opening::Implied {
            self.repair(RepairKind::MissingStart, Control::Message.name());
        }
        let reading = draft.read_closed(&self.functions);
        self.begin_message(reading, events);
    }

    fn read_unclosed(&mut self, draft: &Draft, how: Unclosed, events: &mut Vec<Event>) {
        let reading = match how {
            Unclosed::TooLong => draft.read_growing(&self.functions),
            _ => draft.read_open(&self.functions),
        };
        let no_content = reading.content.trim_ascii().is_empty() && reading.before.trim_ascii().is_empty();
        let says_nothing = !draft.names_channel() && reading.header.recipient.is_none();
        let is_message = !no_content || (matches!(how, Unclosed::Ended(_)) && !says_nothing);
        if !is_message {
            let kind = if how == Unclosed::Interrupted { RepairKind::DoubledHeader } else { RepairKind::HeaderText };
            self.state = State::Outside;
            return self.repair(kind, String::from_utf8_lossy(&draft.text()));
        }
        let missing =
            if draft.opening == Opening::Implied { RepairKind::MissingStart } else { RepairKind::MissingMessage };
        self.repair(missing, "");
        self.begin_message(reading, events);
        match how {
            Unclosed::Ended(ending) => self.end_message(ending, events),
            Unclosed::Interrupted | Unclosed::OutOfTokens => self.end_message(Ending::Cut, events),
            Unclosed::TooLong => {}
        }
    }

    fn begin_message(&mut self, reading: Reading, events: &mut Vec<Event>) {
        for (kind, text) in reading.repairs {
            self.repair(kind, text);
        }
        if !reading.before.is_empty() {
            self.repair(RepairKind::MissingMessage, "");
            events.push(Event::Start(Header::answer()));
            push_text(events, self.utf8.push(&reading.before));
            self.end_message(Ending::Cut, events);
        }
        events.push(Event::Start(reading.header));
        push_text(events, self.utf8.push(&reading.content));
        self.state = State::Content;
    }

    fn end_message(&mut self, ending: Ending, events: &mut Vec<Event>) {
        push_text(events, self.utf8.finish());
        events.push(Event::End(ending));
        self.state = State::Outside;
    }

    /// Space between messages is text of the model too, though of none of them.
    fn note_space(&mut self, draft: &Draft) {
        let text = draft.text();
        if !text.is_empty() {
            self.repair(RepairKind::HeaderText, String::from_utf8_lossy(&text));
        }
    }
}

fn ending(control: Control) -> Ending {
    match control {
        Control::Return => Ending::Return,
        Control::Call => Ending::Call,
        _ => Ending::End,
    }
}

fn push_text(events: &mut Vec<Event>, text: String) {
    if !text.is_empty() {
        events.push(Event::Text(text));
    }
}
