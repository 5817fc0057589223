//! Conversations to token ids.
//!
//! A message is a row of pieces, control tokens and texts; each text is encoded by itself, which decides where tokens may
//! lie. Source of the format: `openai-harmony` 0.0.8 and the release's chat template.

use std::borrow::Cow;

use serde_json::Value;

use super::{
    Author, Channel, Content, Control, Conversation, DeveloperSettings, Harmony, Message, RecipientPlace,
    ResponseFormat, SystemSettings, ToolNamespace, typescript,
};

/// What a rendered conversation is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Purpose {
    /// The assistant speaks next: `<|start|>assistant` is appended.
    #[default]
    Completion,
    /// An example to learn from: a final answer at the end ends in `<|return|>`.
    Training,
    /// Just the messages.
    Plain,
}

/// How a conversation is rendered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RenderOptions {
    /// What it is for.
    pub purpose: Purpose,
    /// When the assistant spoke last on `final`, reasoning from before the first final answer is left out.
    pub drop_finished_analysis: bool,
}

impl Default for RenderOptions {
    fn default() -> Self {
        Self { purpose: Purpose::Completion, drop_finished_analysis: true }
    }
}

enum Piece<'c> {
    Control(Control),
    Text(Cow<'c, str>),
}

impl Harmony {
    /// Renders a conversation into token ids.
    pub fn render(&self, conversation: &Conversation, options: RenderOptions) -> Vec<u32> {
        let mut ids = Vec::new();
        for piece in pieces(conversation, options) {
            match piece {
                Piece::Control(control) => ids.push(self.id(control)),
                Piece::Text(text) => self.tokenizer.encode_ordinary_into(&text, &mut ids),
            }
        }
        ids
    }
}

impl Conversation {
    /// The text of what [`Harmony::render`] gives the ids of, for people to read.
    pub fn rendered_text(&self, options: RenderOptions) -> String {
        let mut out = String::new();
        for piece in pieces(self, options) {
            match piece {
                Piece::Control(control) => out.push_str(control.name()),
                Piece::Text(text) => out.push_str(&text),
            }
        }
        out
    }
}

fn pieces(conversation: &Conversation, options: RenderOptions) -> Vec<Piece<'_>> {
    let messages = &conversation.messages;
    let dropped = if options.drop_finished_analysis { finished_part(messages) } else { 0 };
    let has_functions = messages.iter().any(offers_functions);
    let mut out = Vec::new();
    for (at, message) in messages.iter().enumerate() {
        if at >= dropped || message.channel != Some(Channel::Analysis) {
            push_message(&mut out, message, has_functions);
        }
    }
    match options.purpose {
        Purpose::Plain => {}
        Purpose::Completion => {
            out.push(Piece::Control(Control::Start));
            out.push(Piece::Text("assistant".into()));
        }
        Purpose::Training => {
            if let (Some(last), Some(end)) = (messages.last(), out.last_mut())
                && is_final_answer(last)
            {
                *end = Piece::Control(Control::Return);
            }
        }
    }
    out
}

/// How many messages stand before the first final answer, if the assistant's last message is one.
fn finished_part(messages: &[Message]) -> usize {
    let mut from_the_last = messages.iter().rev();
    let last = from_the_last.find(|message| matches!(message.author, Author::Assistant(_)));
    if !last.is_some_and(is_final_answer) {
        return 0;
    }
    messages.iter().position(|message| message.channel == Some(Channel::Final)).unwrap_or(0)
}

fn is_final_answer(message: &Message) -> bool {
    matches!(message.author, Author::Assistant(_)) && message.channel == Some(Channel::Final)
}

fn offers_functions(message: &Message) -> bool {
    message.content.iter().any(|content| match content {
        Content::Developer(settings) => {
            settings.tools.iter().any(|tools| tools.name == ToolNamespace::FUNCTIONS && !tools.tools.is_empty())
        }
        _ => false,
    })
}

fn push_message<'c>(out: &mut Vec<Piece<'c>>, message: &'c Message, has_functions: bool) {
    out.push(Piece::Control(Control::Start));
    push_header(out, message);
    out.push(Piece::Control(Control::Message));
    for content in &message.content {
        out.push(Piece::Text(match content {
            Content::Text(text) => text.into(),
            Content::System(settings) => system_text(settings, has_functions).into(),
            Content::Developer(settings) => developer_text(settings).into(),
        }));
    }
    let calls = matches!(message.author, Author::Assistant(_)) && message.recipient.is_some();
    out.push(Piece::Control(if calls { Control::Call } else { Control::End }));
}

fn push_header<'c>(out: &mut Vec<Piece<'c>>, message: &'c Message) {
    match &message.author {
        Author::Tool(name) => out.push(Piece::Text(name.into())),
        author => {
            out.push(Piece::Text(author.role().into()));
            out.extend(author.name().map(|name| Piece::Text(format!(":{name}").into())));
        }
    }
    // `all` is who hears a message that names nobody.
    let recipient = message.recipient.as_deref().filter(|&recipient| recipient != "all");
    let recipient_at = |place| {
        let recipient = recipient.filter(|_| message.recipient_place == place);
        recipient.map(|recipient| Piece::Text(format!(" to={recipient}").into()))
    };
    out.extend(recipient_at(RecipientPlace::BehindRole));
    if let Some(channel) = message.channel {
        out.push(Piece::Control(Control::Channel));
        out.push(Piece::Text(channel.name().into()));
    }
    out.extend(recipient_at(RecipientPlace::BehindChannel));
    match &message.content_type {
        Some(of) if of.constrained => {
            out.push(Piece::Text(" ".into()));
            out.push(Piece::Control(Control::Constrain));
            out.push(Piece::Text(of.name.as_str().into()));
        }
        Some(of) => out.push(Piece::Text(format!(" {}", of.name).into())),
        None => {}
    }
}

fn system_text(settings: &SystemSettings, has_functions: bool) -> String {
    let mut top: Vec<Cow<'_, str>> = Vec::new();
    top.extend(settings.identity.as_deref().map(Cow::from));
    top.extend(settings.knowledge_cutoff.as_ref().map(|date| format!("Knowledge cutoff: {date}").into()));
    top.extend(settings.current_date.as_ref().map(|date| format!("Current date: {date}").into()));
    let mut sections = Vec::new();
    if !top.is_empty() {
        sections.push(top.join("\n"));
    }
    sections.extend(settings.reasoning_effort.map(|effort| format!("Reasoning: {}", effort.name())));
    sections.extend(tools_section(&settings.tools));
    if !settings.valid_channels.is_empty() {
        sections.push(channels_section(settings, has_functions));
    }
    sections.join("\n\n")
}

fn channels_section(settings: &SystemSettings, has_functions: bool) -> String {
    let names: Vec<_> = settings.valid_channels.iter().map(|channel| channel.name()).collect();
    let mut section = format!("# Valid channels: {}.", names.join(", "));
    if settings.channel_required {
        section.push_str(" Channel must be included for every message.");
    }
    if has_functions {
        section.push_str("\nCalls to these tools must go to the commentary channel: 'functions'.");
    }
    section
}

fn developer_text(settings: &DeveloperSettings) -> String {
    let mut sections = Vec::new();
    if let Some(instructions) = &settings.instructions {
        sections.push(format!("# Instructions\n\n{instructions}"));
    }
    sections.extend(tools_section(&settings.tools));
    sections.extend(settings.response_format.as_ref().map(response_format_section));
    sections.join("\n\n")
}

/// Source: "Structured output" in openai-harmony's `docs/format.md`.
fn response_format_section(format: &ResponseFormat) -> String {
    let description: String = format.description.iter().flat_map(|text| text.lines()).map(comment).collect();
    format!("# Response Formats\n\n## {}\n\n{description}{}", format.name, format.schema)
}

fn comment(line: &str) -> String {
    format!("// {line}\n")
}

fn tools_section(namespaces: &[ToolNamespace]) -> Option<String> {
    if namespaces.is_empty() {
        return None;
    }
    let mut sorted: Vec<_> = namespaces.iter().collect();
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    let sections = std::iter::once("# Tools".to_owned()).chain(sorted.into_iter().map(namespace_section));
    Some(sections.collect::<Vec<_>>().join("\n\n"))
}

fn namespace_section(namespace: &ToolNamespace) -> String {
    let name = &namespace.name;
    let mut out = format!("## {name}\n\n");
    let description = namespace.description.as_deref().unwrap_or_default();
    if namespace.tools.is_empty() {
        // Without functions the description is the section, and it is prose.
        out.push_str(&description.lines().collect::<Vec<_>>().join("\n"));
        return out;
    }
    out.extend(description.lines().map(comment));
    out.push_str(&format!("namespace {name} {{\n\n"));
    for tool in &namespace.tools {
        out.extend(tool.description.lines().map(comment));
        out.push_str(&format!("type {} = ({}) => any;\n\n", tool.name, parameter(tool.parameters.as_ref())));
    }
    out.push_str(&format!("}} // namespace {name}"));
    out
}

fn parameter(schema: Option<&Value>) -> String {
    schema.map(|schema| format!("_: {}", typescript::type_of(schema, ""))).unwrap_or_default()
}
