//! Reads the words of headers, the way the model wrote them.
//!
//! A well-formed header is `{role}[ to={recipient}]<|channel|>{channel}[ to={recipient}][ <|constrain|>{type}]`. What
//! else was written is read for what it most likely means; no word is lost: it is content, text of its own, or it stands
//! in a repair.

use super::{
    Author, Channel, ContentType, RepairKind,
    header::{Draft, Header, Mark, Opening, Part, Reading, function_name, words},
};

/// The words that stand for a content type without `<|constrain|>`.
const CONTENT_TYPES: [&str; 4] = ["json", "code", "text", "python"];
/// Names that models have given to what `analysis` is.
const REASONING_NAMES: [&str; 6] = ["thought", "thoughts", "thinking", "think", "reasoning", "reason"];

/// How far a header's text is known to be a header's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// `<|message|>` ended it: all of it is header.
    Closed,
    /// Its message ended: the first word that is no header's begins the content.
    Open,
    /// As open, and its last word may go on.
    Growing,
}

/// Reads a draft; `functions` are the names that the model was offered, if they are known.
pub(super) fn read(draft: &Draft, extent: Extent, functions: &[String]) -> Reading {
    let mut reader = Reader::new(draft, extent);
    reader.read();
    reader.settle_recipient(functions);
    match extent {
        Extent::Closed => reader.settle_closed(functions),
        Extent::Open | Extent::Growing => reader.settle_open(),
    }
}

/// How much of a word was understood.
enum Taken {
    All,
    /// Its first bytes; the rest is glued to them.
    Prefix(usize),
    Nothing,
}

/// A word that is none of a header's: where it lies.
#[derive(Clone, Copy)]
struct Loose {
    part: usize,
    start: usize,
    end: usize,
}

struct Reader<'d> {
    draft: &'d Draft,
    extent: Extent,
    author: Option<Author>,
    unknown_role: Option<String>,
    channel: Option<Channel>,
    unknown_channel: bool,
    recipient: Option<String>,
    awaits_recipient: bool,
    content_type: Option<ContentType>,
    loose: Vec<Loose>,
    repairs: Vec<(RepairKind, String)>,
}

impl<'d> Reader<'d> {
    fn new(draft: &'d Draft, extent: Extent) -> Self {
        Self {
            draft,
            extent,
            author: None,
            unknown_role: None,
            channel: None,
            unknown_channel: false,
            recipient: None,
            awaits_recipient: false,
            content_type: None,
            loose: Vec::new(),
            repairs: Vec::new(),
        }
    }

    fn is_closed(&self) -> bool {
        self.extent == Extent::Closed
    }

    fn repair(&mut self, kind: RepairKind, text: &str) {
        self.repairs.push((kind, text.to_owned()));
    }

    fn read(&mut self) {
        for part in 0..self.draft.parts.len() {
            self.read_part(part);
        }
        if self.draft.opening == Opening::Marked && self.author.is_none() {
            let role = self.unknown_role.clone().unwrap_or_default();
            // Whoever speaks to the assistant under a name of its own is a tool.
            if self.is_closed() && self.recipient.as_deref() == Some("assistant") && !role.is_empty() {
                self.author = Some(Author::Tool(role));
            } else {
                self.repair(RepairKind::Role, &role);
            }
        }
    }

    fn read_part(&mut self, at: usize) {
        let draft = self.draft;
        let Part { mark, text } = &draft.parts[at];
        let mut first = true;
        for (start, end) in words(text) {
            let word = String::from_utf8_lossy(&text[start..end]);
            let last = end == text.len();
            let taken = match mark {
                _ if last && self.may_go_on(at) => Taken::Nothing,
                None if first => self.take_role(&word, last),
                Some(Mark::Channel) if first => self.take_channel(&word, last),
                Some(Mark::Constrain) if first => self.take_constraint(&word),
                _ => self.take_word(&word, last),
            };
            first = false;
            let rest = match taken {
                Taken::All => continue,
                Taken::Prefix(len) if self.is_closed() => match self.take_word(&word[len..], false) {
                    Taken::Nothing => start + len,
                    _ => continue,
                },
                Taken::Prefix(len) => start + len,
                Taken::Nothing => start,
            };
            if !self.is_closed() {
                // Content has begun: nothing after it is header.
                self.loose.push(Loose { part: at, start: rest, end: text.len() });
                return;
            }
            self.loose.push(Loose { part: at, start: rest, end });
        }
        match mark {
            Some(Mark::Channel) if first => self.repair(RepairKind::Channel, ""),
            Some(Mark::Constrain) if first => self.set_constraint(""),
            _ => {}
        }
    }

    /// Whether the last word of this part may be the beginning of a longer one.
    fn may_go_on(&self, part: usize) -> bool {
        self.extent == Extent::Growing && part + 1 == self.draft.parts.len()
    }

    fn take_role(&mut self, word: &str, last: bool) -> Taken {
        if word.starts_with("to=") {
            return self.take_word(word, last);
        }
        if word == "assistant" {
            self.author = Some(Author::Assistant(None));
            return Taken::All;
        }
        if let Some(glued) = word.strip_prefix("assistant")
            && (Channel::named(glued).is_some() || glued.starts_with("to="))
        {
            self.author = Some(Author::Assistant(None));
            return Taken::Prefix("assistant".len());
        }
        if self.draft.opening != Opening::Marked {
            return self.take_word(word, last);
        }
        self.author = explicit_author(word, self.is_closed());
        if self.author.is_some() {
            return Taken::All;
        }
        // An unknown role without `<|message|>` is the first word of the content, unless the header was cut inside it.
        if self.is_closed() || (last && "assistant".starts_with(word)) {
            self.unknown_role = Some(word.to_owned());
            return Taken::All;
        }
        Taken::Nothing
    }

    fn take_channel(&mut self, word: &str, last: bool) -> Taken {
        if word.starts_with("to=") {
            self.repair(RepairKind::Channel, "");
            return self.take_word(word, last);
        }
        let lower = word.to_ascii_lowercase();
        let Some(channel) = Channel::ALL.into_iter().find(|channel| lower.starts_with(channel.name())) else {
            return self.take_unknown_channel(word, &lower, last);
        };
        self.set_channel(channel);
        let len = channel.name().len();
        if word == channel.name() {
            return Taken::All;
        }
        self.repair(RepairKind::Channel, word);
        if word[len..].chars().any(char::is_alphanumeric) { Taken::Prefix(len) } else { Taken::All }
    }

    fn take_unknown_channel(&mut self, word: &str, lower: &str, last: bool) -> Taken {
        if REASONING_NAMES.contains(&lower) {
            self.set_channel(Channel::Analysis);
        } else if self.is_closed() {
            self.unknown_channel = true;
        } else if !last || !Channel::ALL.iter().any(|channel| channel.name().starts_with(lower)) {
            // With no `<|message|>` in sight it is content, unless the header was cut inside a channel's name.
            self.repair(RepairKind::Channel, "");
            return Taken::Nothing;
        }
        self.repair(RepairKind::Channel, word);
        Taken::All
    }

    fn set_channel(&mut self, channel: Channel) {
        if let Some(earlier) = self.channel.replace(channel) {
            self.repair(RepairKind::DoubledHeader, earlier.name());
        }
    }

    fn take_constraint(&mut self, word: &str) -> Taken {
        let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '/' | '+' | '.');
        let len = if word.starts_with("to=") { 0 } else { word.find(|c| !is_name(c)).unwrap_or(word.len()) };
        self.set_constraint(&word[..len]);
        if len == word.len() { Taken::All } else { Taken::Prefix(len) }
    }

    fn set_constraint(&mut self, name: &str) {
        let of = ContentType { constrained: true, name: name.to_owned() };
        if let Some(earlier) = self.content_type.replace(of) {
            self.repair(RepairKind::DoubledHeader, &earlier.to_string());
        }
    }

    fn take_word(&mut self, word: &str, last: bool) -> Taken {
        if self.awaits_recipient {
            self.awaits_recipient = false;
            self.set_recipient(word);
            return Taken::All;
        }
        if let Some(recipient) = word.strip_prefix("to=") {
            if recipient.is_empty() {
                self.awaits_recipient = true;
                self.repair(RepairKind::Recipient, word);
            } else {
                self.set_recipient(recipient);
            }
            return Taken::All;
        }
        let may_have_type = self.recipient.is_some() || (self.is_closed() && self.channel.is_some());
        if may_have_type && self.content_type.is_none() && CONTENT_TYPES.contains(&word) {
            self.content_type = Some(ContentType { constrained: false, name: word.to_owned() });
            return Taken::All;
        }
        if self.is_closed() { self.take_misplaced(word) } else { self.take_cut_recipient(word, last) }
    }

    fn set_recipient(&mut self, recipient: &str) {
        if let Some(earlier) = self.recipient.replace(recipient.to_owned()).filter(|earlier| earlier != recipient) {
            self.repair(RepairKind::DoubledHeader, &earlier);
        }
    }

    /// Words of a header in places that are not theirs.
    fn take_misplaced(&mut self, word: &str) -> Taken {
        match Channel::named(word) {
            Some(channel) if self.channel.is_none() => {
                self.channel = Some(channel);
                self.repair(RepairKind::Channel, word);
            }
            _ if word == "assistant" => self.repair(RepairKind::DoubledHeader, word),
            _ => return Taken::Nothing,
        }
        Taken::All
    }

    /// A header that the end of the stream cut inside ` to=`.
    fn take_cut_recipient(&mut self, word: &str, last: bool) -> Taken {
        if word != "to" || !last {
            return Taken::Nothing;
        }
        self.repair(RepairKind::HeaderText, word);
        Taken::All
    }

    /// Takes what is glued to the name of a function away from it.
    fn settle_recipient(&mut self, functions: &[String]) {
        let Some(recipient) = self.recipient.clone() else { return };
        let name = function_name(&recipient);
        let is_function = |name: &str| functions.iter().any(|function| function == name);
        if is_function(name) {
            return;
        }
        let suffixes = CONTENT_TYPES.into_iter().chain(Channel::ALL.map(Channel::name));
        let glued = suffixes.filter(|suffix| {
            let Some(stem) = name.strip_suffix(suffix) else { return false };
            // Without a list of functions only `json` is certain enough, and only where it is no word of the name's.
            let likely =
                functions.is_empty() && *suffix == "json" && stem.ends_with(|c: char| c.is_ascii_alphanumeric());
            is_function(stem) || likely
        });
        let Some(suffix) = glued.max_by_key(|suffix| suffix.len()) else { return };
        self.repair(RepairKind::Recipient, &recipient);
        self.recipient = recipient.strip_suffix(suffix).map(str::to_owned);
        match Channel::named(suffix) {
            Some(channel) => self.channel = self.channel.or(Some(channel)),
            None if self.content_type.is_none() => {
                self.content_type = Some(ContentType { constrained: false, name: suffix.to_owned() });
            }
            None => {}
        }
    }

    fn settle_closed(mut self, functions: &[String]) -> Reading {
        let (in_role, after): (Vec<Loose>, Vec<Loose>) = self.loose.iter().partition(|loose| loose.part == 0);
        let mut before = Vec::new();
        let mut content = Vec::new();
        // After an explicit role one stray word is noise; prose never is.
        if self.draft.opening == Opening::Marked && in_role.len() == 1 {
            self.repair(RepairKind::HeaderText, &String::from_utf8_lossy(&self.text_of(&in_role)));
        } else {
            before = self.text_of(&in_role);
        }
        match after.as_slice() {
            [] => {}
            [word] if self.take_last_word(*word, functions) => {}
            [.., word] if self.recipient.is_some() => {
                self.take_last_word(*word, functions);
                for &word in &after[..after.len() - 1] {
                    self.repair(RepairKind::HeaderText, &self.word(word));
                }
            }
            prose => content = self.text_of(prose),
        }
        self.into_reading(before, content)
    }

    /// Reads a lone word behind the channel as the content type or, by its look, as the recipient.
    fn take_last_word(&mut self, loose: Loose, functions: &[String]) -> bool {
        let word = self.word(loose);
        let namespaced = ["functions.", "browser.", "python"].iter().any(|namespace| word.starts_with(namespace));
        if self.recipient.is_none() && (namespaced || functions.contains(&word)) {
            self.repair(RepairKind::Recipient, &word);
            self.recipient = Some(word);
            return true;
        }
        let is_type = word.len() <= 32 && word.chars().all(|c| c.is_ascii_alphanumeric() || "_-./+".contains(c));
        if is_type && self.content_type.is_none() {
            self.content_type = Some(ContentType { constrained: false, name: word });
            return true;
        }
        if self.recipient.is_some() {
            self.repair(RepairKind::HeaderText, &word);
        }
        self.recipient.is_some()
    }

    fn settle_open(mut self) -> Reading {
        let mut before = Vec::new();
        let mut content = Vec::new();
        for &loose in &self.loose {
            let text = &self.draft.parts[loose.part].text;
            // Between messages the space before a text belongs to it; behind a header it only parts the two.
            let is_first = loose.part == 0 && text[..loose.start].trim_ascii().is_empty();
            let keeps_space = is_first && self.draft.opening == Opening::Implied;
            let text = if keeps_space { text.as_slice() } else { &text[loose.start..] };
            let alone = self.draft.parts.len() == 1;
            if loose.part == 0 && !alone { &mut before } else { &mut content }.extend_from_slice(text);
        }
        if self.channel.is_none() {
            self.unknown_channel = true;
        }
        self.into_reading(before, content)
    }

    fn into_reading(mut self, before: Vec<u8>, content: Vec<u8>) -> Reading {
        if self.unknown_channel && self.channel.is_none() {
            let calls = self.recipient.is_some();
            self.channel = Some(if calls { Channel::Commentary } else { Channel::Final });
        }
        let constrained = self.content_type.as_ref().filter(|of| of.constrained && self.recipient.is_none());
        if let Some(constrained) = constrained.map(ToString::to_string) {
            self.repair(RepairKind::ContentType, &constrained);
        }
        let header = Header {
            author: self.author.unwrap_or(Author::Assistant(None)),
            channel: self.channel,
            recipient: self.recipient,
            content_type: self.content_type,
        };
        Reading { header, before, content, repairs: self.repairs }
    }

    fn word(&self, loose: Loose) -> String {
        String::from_utf8_lossy(&self.draft.parts[loose.part].text[loose.start..loose.end]).into_owned()
    }

    /// Loose words as text, with the space between and behind them.
    fn text_of(&self, words: &[Loose]) -> Vec<u8> {
        let mut out = Vec::new();
        for (at, word) in words.iter().enumerate() {
            let text = &self.draft.parts[word.part].text;
            let behind = &text[word.end..];
            let space = behind.iter().position(|byte| !byte.is_ascii_whitespace()).unwrap_or(behind.len());
            out.extend_from_slice(&text[word.start..word.end + space]);
            // Words of different parts had a control token between them.
            if space == 0 && at + 1 < words.len() {
                out.push(b' ');
            }
        }
        out
    }
}

/// The author that a word after `<|start|>` names. In an unfinished header only the four roles are certain.
fn explicit_author(word: &str, closed: bool) -> Option<Author> {
    let (role, name) = match word.split_once(':') {
        Some((role, name)) => (role, Some(name.to_owned())),
        None => (word, None),
    };
    let dotted = |word: &str| {
        let is_name =
            |part: &str| !part.is_empty() && part.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '-'));
        word.contains('.') && word.split('.').all(is_name)
    };
    match (role, name) {
        ("system", None) => Some(Author::System),
        ("developer", None) => Some(Author::Developer),
        ("user", name) => Some(Author::User(name)),
        ("assistant", name) => Some(Author::Assistant(name)),
        _ if closed && dotted(word) => Some(Author::Tool(word.to_owned())),
        _ => None,
    }
}
