//! The gateway: OpenAI's HTTP API in front, the coordinator's token streams behind.
//!
//! Text stops here. Requests are checked, rendered as Harmony and tokenized; tokens come back and are parsed into
//! reasoning, content and tool calls as they arrive.
//!
//! ```text
//! server → routes → handlers → { harmony, stream, upstream } → openai
//! ```
//! - [`server`](run), `connection`, `patience`, `tls`: connections, their limits and their end;
//! - `routes`, `frame`, `access`, `body`: one request before its handler: its id, its key and limits, its JSON;
//! - `handlers`: one file per endpoint, and what they share;
//! - [`harmony`], [`tokenizer`]: conversations to token ids and back;
//! - `stream`: tokens to pieces of an answer, without any I/O;
//! - `upstream`: the coordinator, and streams that outlive it;
//! - `openai`: the bodies that come and go;
//! - [`dry_run`](mod@dry_run): what the checks say about a body, offline;
//! - [`profiles`], [`config`]: what an operator says; `instruments`, `meter`, `stats`: what is measured.
//!
//! It does not know how many workers there are, what a step is, or where keys and values lie.

mod access;
mod app;
mod body;
pub mod config;
mod connection;
mod date;
pub mod dry_run;
mod frame;
mod handlers;
pub mod harmony;
mod instruments;
mod meter;
mod openai;
mod patience;
pub mod profiles;
mod routes;
mod server;
mod shared_page;
mod stats;
mod stream;
mod tls;
pub mod tokenizer;
mod upstream;

pub use config::Config;
pub use server::{bind, run};
