//! Under construction.

pub mod harmony;
pub mod tokenizer;
