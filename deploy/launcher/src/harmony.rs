//! `phalanx harmony render|parse`: standard input to standard output, for debugging and tests.

use std::{io::Read, sync::Arc};

use anyhow::{Context, Result};
use phalanx_gateway::{
    harmony::{Harmony, cli},
    tokenizer::Tokenizer,
};

use crate::{
    cli::{HarmonyAction, HarmonyArgs},
    models,
};

/// Longest input, in bytes.
const MAX_INPUT_BYTES: u64 = 64 << 20;

pub(crate) fn run(args: &HarmonyArgs) -> Result<()> {
    let path = match &args.tokenizer {
        Some(path) => path.clone(),
        None => models::resolve("nano", None)?.join("tokenizer.json"),
    };
    let harmony = Harmony::new(Arc::new(Tokenizer::from_file(&path)?))?;
    let mut input = String::new();
    std::io::stdin().take(MAX_INPUT_BYTES).read_to_string(&mut input).context("standard input")?;
    let output = match args.action {
        HarmonyAction::Render => serde_json::to_string(&cli::render_json(&harmony, &input)?)?,
        HarmonyAction::Parse => serde_json::to_string(&cli::parse_json(&harmony, &input)?)?,
    };
    println!("{output}");
    Ok(())
}
