//! How many of the vocabulary's rows are tokens: the matrices have more rows than the tokenizer has ids.

use std::{fmt, fs::File, io::BufReader, path::Path};

use phalanx_proto::fault::{Fault, FaultKind};
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};

#[derive(Deserialize)]
struct Tokenizer {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    model: TokenizerModel,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
}

#[derive(Deserialize)]
struct TokenizerModel {
    vocab: LargestId,
}

/// The largest value of a map from token to id, found without keeping the map.
struct LargestId(Option<u32>);

impl<'de> Deserialize<'de> for LargestId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = LargestId;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from token to id")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<LargestId, A::Error> {
                let mut largest = None;
                while let Some((_, id)) = map.next_entry::<IgnoredAny, u32>()? {
                    largest = largest.max(Some(id));
                }
                Ok(LargestId(largest))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// One more than the largest id of the checkpoint's `tokenizer.json`. Without the file, every row is a token.
///
/// # Errors
/// A fault of kind `Checkpoint` when the file cannot be read, is no tokenizer, or has ids beyond the matrices' rows.
pub(crate) fn sampled_vocab(model_dir: &Path, vocab_size: usize) -> Result<usize, Fault> {
    let path = model_dir.join("tokenizer.json");
    if !path.exists() {
        return Ok(vocab_size);
    }
    let fault = |problem: String| Fault::new(FaultKind::Checkpoint, format!("{}: {problem}", path.display()));
    let file = File::open(&path).map_err(|error| fault(error.to_string()))?;
    let tokenizer: Tokenizer =
        serde_json::from_reader(BufReader::new(file)).map_err(|error| fault(error.to_string()))?;
    let added = tokenizer.added_tokens.iter().map(|token| token.id);
    let largest = added.chain(tokenizer.model.vocab.0).max().ok_or_else(|| fault("no tokens".to_owned()))?;
    if largest as usize >= vocab_size {
        return Err(fault(format!("token {largest} has no row in the model, whose vocab_size is {vocab_size}")));
    }
    Ok(largest as usize + 1)
}
