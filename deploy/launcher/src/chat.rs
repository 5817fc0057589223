//! `phalanx chat`: a conversation in the terminal, streamed, with the reasoning dimmed.

use std::io::{BufRead, IsTerminal, Write};

use anyhow::{Context, Result, bail};
use futures::StreamExt;
use serde_json::{Value, json};

use crate::{access::http_client, bench::sse::SseLines, cli::ChatArgs};

const DIM: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[0m";

/// Says one thing, or talks line by line until the input ends.
pub(crate) async fn run(args: ChatArgs) -> Result<()> {
    let mut chat = Chat::new(args).await?;
    if let Some(message) = chat.args.message.clone() {
        return chat.say(&message).await;
    }
    let interactive = std::io::stdin().is_terminal();
    loop {
        if interactive {
            print!("> ");
            std::io::stdout().flush()?;
        }
        let mut line = String::new();
        // Nothing else runs in this process while a person types.
        if std::io::stdin().lock().read_line(&mut line)? == 0 {
            return Ok(());
        }
        if !line.trim().is_empty() {
            chat.say(line.trim()).await?;
        }
    }
}

struct Chat {
    args: ChatArgs,
    http: reqwest::Client,
    model: String,
    messages: Vec<Value>,
    colour: bool,
}

impl Chat {
    async fn new(args: ChatArgs) -> Result<Self> {
        let http = http_client()?;
        let url = format!("{}/v1/models", args.url);
        let models: Value = http.get(&url).send().await.with_context(|| url.clone())?.json().await.context(url)?;
        let first = models["data"][0]["id"].as_str().unwrap_or_default().to_owned();
        let system = args.system.iter().map(|text| json!({"role": "system", "content": text}));
        let messages = system.collect();
        let model = args.model.clone().unwrap_or(first);
        Ok(Self { http, model, messages, colour: std::io::stdout().is_terminal(), args })
    }

    fn body(&self) -> Value {
        let mut body = json!({"model": self.model, "messages": self.messages, "stream": true});
        let optional = [
            ("profile", self.args.profile.clone().map(Value::from)),
            ("reasoning_effort", self.args.reasoning_effort.clone().map(Value::from)),
            ("temperature", self.args.temperature.map(Value::from)),
        ];
        for (key, value) in optional {
            if let Some(value) = value {
                body[key] = value;
            }
        }
        body
    }

    async fn say(&mut self, text: &str) -> Result<()> {
        self.messages.push(json!({"role": "user", "content": text}));
        let request = self.http.post(format!("{}/v1/chat/completions", self.args.url)).json(&self.body());
        let response = request.send().await?;
        if !response.status().is_success() {
            bail!("{}", error_text(&response.text().await?));
        }
        let mut lines = SseLines::new(response.bytes_stream().boxed());
        let mut shown = Shown { colour: self.colour, dimmed: false, answer: String::new() };
        while let Some(data) = lines.next().await? {
            if data == "[DONE]" {
                break;
            }
            let chunk: Value = serde_json::from_str(&data).with_context(|| data.clone())?;
            if !chunk["error"].is_null() {
                bail!("{}", error_text(&data));
            }
            shown.delta(&chunk["choices"][0]["delta"])?;
        }
        shown.end()?;
        self.messages.push(json!({"role": "assistant", "content": shown.answer}));
        Ok(())
    }
}

fn error_text(body: &str) -> String {
    let value: Value = serde_json::from_str(body).unwrap_or_default();
    value["error"]["message"].as_str().unwrap_or(body).to_owned()
}

/// What stands on the screen, and the answer so far.
struct Shown {
    colour: bool,
    dimmed: bool,
    answer: String,
}

impl Shown {
    fn delta(&mut self, delta: &Value) -> Result<()> {
        if let Some(text) = delta["reasoning_content"].as_str().or(delta["reasoning"].as_str()) {
            self.print(text, true)?;
        }
        if let Some(text) = delta["content"].as_str().filter(|text| !text.is_empty()) {
            self.answer.push_str(text);
            self.print(text, false)?;
        }
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let function = &call["function"];
            for part in [&function["name"], &function["arguments"]] {
                self.print(part.as_str().unwrap_or_default(), false)?;
            }
        }
        Ok(())
    }

    fn print(&mut self, text: &str, dim: bool) -> Result<()> {
        let mut out = std::io::stdout().lock();
        if dim != self.dimmed {
            self.dimmed = dim;
            let code = if dim { DIM } else { PLAIN };
            // Reasoning and answer stand on lines of their own.
            let line_break = if dim { "" } else { "\n" };
            write!(out, "{}{line_break}", if self.colour { code } else { "" })?;
        }
        write!(out, "{text}")?;
        Ok(out.flush()?)
    }

    fn end(&mut self) -> Result<()> {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", if self.colour && self.dimmed { PLAIN } else { "" })?;
        Ok(())
    }
}
