//! OpenAI's HTTP API as types: bodies that arrive, checked; bodies that leave; errors.
//!
//! Knows nothing of Harmony, of tokens' meaning, of the coordinator, or of where a request came from.
//!
//! - `fields` takes fields out of a JSON object and names the one that is wrong;
//! - `params` holds what all endpoints share, `messages`, `chat`, `completion` and `tokens` the rest of each body;
//! - `reply` holds the bodies and chunks of answers;
//! - `error` holds errors with their status and headers.

pub(crate) mod chat;
pub(crate) mod completion;
pub(crate) mod error;
pub(crate) mod fields;
pub(crate) mod messages;
pub(crate) mod params;
pub(crate) mod reply;
pub(crate) mod tokens;
pub(crate) mod tools;
