//! Turns text into token ids and back: byte-level BPE over the model's own `tokenizer.json`.
//!
//! Knows nothing of Harmony, of requests or of the network. The ids are exactly those of the `tokenizers` crate (the
//! tests' oracle), which takes seconds to load the release's file and to encode a long prompt; this takes a fraction.
//!
//! - `file` reads `tokenizer.json` and refuses what cannot be run;
//! - `split` cuts text into words by the file's pattern;
//! - `bpe` merges a word's bytes into tokens;
//! - `utf8` puts the bytes of generated tokens back together as text.

mod bpe;
mod byte_level;
mod file;
mod split;
mod utf8;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use regex_automata::meta;
use rustc_hash::FxHashMap;

use bpe::{Bpe, Scratch};
use file::{AddedToken, Merges, Outline, Tables, Vocabulary};
use split::Splitter;
pub use utf8::Utf8Stream;

/// Ids from here on are refused: no vocabulary is that large, and a table is as long as its highest id.
const ID_LIMIT: u32 = 1 << 24;

/// A tokenizer that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file is missing or unreadable.
    #[error("cannot read the tokenizer {}: {source}; the model's directory must hold its tokenizer.json", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not a `tokenizer.json`.
    #[error("cannot understand the tokenizer {origin}: {source}; is it the model's tokenizer.json, whole?")]
    Json {
        /// Where the JSON came from.
        origin: String,
        /// What is wrong, and where.
        source: serde_json::Error,
    },
    /// The file describes a tokenizer of another kind.
    #[error("cannot run the tokenizer {origin}: {found}; only byte-level BPE with one split pattern is supported")]
    Unsupported {
        /// Where the JSON came from.
        origin: String,
        /// What was found in it.
        found: String,
    },
}

/// A byte-level BPE tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    splitter: Splitter,
    bpe: Bpe,
    tokens: TokenTable,
    /// Special tokens by name.
    specials: FxHashMap<String, u32>,
    special_finder: SpecialFinder,
}

impl Tokenizer {
    /// Loads a `tokenizer.json`.
    ///
    /// # Errors
    /// When the file cannot be read, is not a tokenizer, or is one of a kind that this encoder does not run.
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        let json = fs::read(path).map_err(|source| TokenizerError::Read { path: path.to_owned(), source })?;
        Self::from_json(&json, &path.display().to_string())
    }

    /// Builds a tokenizer from the text of a `tokenizer.json`; `origin` names it in errors.
    ///
    /// # Errors
    /// As [`Self::from_file`].
    pub fn from_json(json: &[u8], origin: &str) -> Result<Self, TokenizerError> {
        let broken = |source| TokenizerError::Json { origin: origin.to_owned(), source };
        let outline: Outline = serde_json::from_slice(json).map_err(broken)?;
        let unsupported = |found| TokenizerError::Unsupported { origin: origin.to_owned(), found };
        let pattern = outline.pattern().map_err(unsupported)?;
        let splitter = Splitter::new(pattern)
            .map_err(|error| unsupported(format!("its split pattern {pattern:?} does not compile: {error}")))?;
        let tables: Tables = serde_json::from_slice(json).map_err(broken)?;
        Self::assemble(&outline, splitter, tables).map_err(unsupported)
    }

    fn assemble(outline: &Outline, splitter: Splitter, tables: Tables) -> Result<Self, String> {
        let Tables { model } = tables;
        let tokens = TokenTable::new(&model.vocab, &outline.added_tokens)?;
        let words: FxHashMap<_, _> = model.vocab.0.into_iter().collect();
        let bpe = Bpe {
            merges: ranked_merges(&words, &model.merges)?,
            byte_ids: byte_ids(&words)?,
            words,
            whole_words_first: outline.whole_words_first(),
        };
        let specials = outline.added_tokens.iter().map(|token| (token.content.clone(), token.id)).collect();
        let special_finder = SpecialFinder::new(&outline.added_tokens)?;
        Ok(Self { splitter, bpe, tokens, specials, special_finder })
    }

    /// Encodes text as text: the names of special tokens in it are ordinary characters, and no special id comes out.
    pub fn encode_ordinary(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        self.encode_ordinary_into(text, &mut ids);
        ids
    }

    /// Appends what [`Self::encode_ordinary`] returns.
    pub fn encode_ordinary_into(&self, text: &str, ids: &mut Vec<u32>) {
        let mut scratch = Scratch::default();
        self.splitter.split(text, |word| self.bpe.encode(word.as_bytes(), &mut scratch, ids));
    }

    /// Encodes text in which the names of special tokens stand for these tokens. Not for text of users: they would write
    /// control tokens with it.
    pub fn encode_with_special(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        let mut done = 0;
        for (start, end, id) in self.special_finder.find(text) {
            self.encode_ordinary_into(&text[done..start], &mut ids);
            ids.push(id);
            done = end;
        }
        self.encode_ordinary_into(&text[done..], &mut ids);
        ids
    }

    /// The bytes of a token: for a special one its name's; none for an id that the tokenizer does not know.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.tokens.bytes_of(id)
    }

    /// The id of the special token of this name.
    pub fn special(&self, name: &str) -> Option<u32> {
        self.specials.get(name).copied()
    }

    /// Tells whether `id` is a special token.
    pub fn is_special(&self, id: u32) -> bool {
        self.tokens.is_special(id)
    }

    /// One more than the highest id that stands for something. The model's matrices may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.tokens.spans.len()
    }

    /// The text of tokens, special ones by name, for people to read: what is not UTF-8 or not a token becomes U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        const UNKNOWN: &[u8] = "\u{FFFD}".as_bytes();
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.token_bytes(id).unwrap_or(UNKNOWN)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

fn ranked_merges(words: &FxHashMap<Box<[u8]>, u32>, merges: &Merges) -> Result<FxHashMap<(u32, u32), u64>, String> {
    let mut ranked = FxHashMap::with_capacity_and_hasher(merges.len(), rustc_hash::FxBuildHasher);
    for (rank, (both, middle)) in merges.iter().enumerate() {
        let id_of = |bytes: &[u8]| {
            let missing = || format!("its merge {rank} names {:?}, which is no token", String::from_utf8_lossy(bytes));
            words.get(bytes).copied().ok_or_else(missing)
        };
        let (left, right) = both.split_at(middle);
        ranked.insert((id_of(left)?, id_of(right)?), (rank as u64) << 32 | u64::from(id_of(both)?));
    }
    Ok(ranked)
}

fn byte_ids(words: &FxHashMap<Box<[u8]>, u32>) -> Result<Box<[u32; 256]>, String> {
    let mut ids = Box::new([0; 256]);
    for (byte, id) in (0..=u8::MAX).zip(ids.iter_mut()) {
        *id =
            *words.get([byte].as_slice()).ok_or_else(|| format!("its vocabulary has no token for byte {byte:#04x}"))?;
    }
    Ok(ids)
}

/// The bytes of every id, one after the other.
#[derive(Debug, Default)]
struct TokenTable {
    bytes: Vec<u8>,
    /// Where each id's bytes lie, if it has any.
    spans: Vec<Option<Span>>,
}

#[derive(Debug, Clone, Copy)]
struct Span {
    start: u32,
    len: u32,
    special: bool,
}

impl TokenTable {
    fn new(vocabulary: &Vocabulary, added: &[AddedToken]) -> Result<Self, String> {
        let mut table = Self::default();
        for (bytes, id) in &vocabulary.0 {
            table.put(*id, bytes, false)?;
        }
        for token in added {
            table.put(token.id, token.content.as_bytes(), true)?;
        }
        Ok(table)
    }

    fn put(&mut self, id: u32, bytes: &[u8], special: bool) -> Result<(), String> {
        if id >= ID_LIMIT {
            return Err(format!("its token {:?} has the id {id}", String::from_utf8_lossy(bytes)));
        }
        let too_long = |_| "its tokens take more than 4 GiB".to_owned();
        let start = u32::try_from(self.bytes.len()).map_err(too_long)?;
        let len = u32::try_from(bytes.len()).map_err(too_long)?;
        self.bytes.extend_from_slice(bytes);
        let at = id as usize;
        if self.spans.len() <= at {
            self.spans.resize(at + 1, None);
        }
        self.spans[at] = Some(Span { start, len, special });
        Ok(())
    }

    fn span(&self, id: u32) -> Option<Span> {
        self.spans.get(id as usize).copied().flatten()
    }

    fn bytes_of(&self, id: u32) -> Option<&[u8]> {
        let span = self.span(id)?;
        self.bytes.get(span.start as usize..(span.start + span.len) as usize)
    }

    fn is_special(&self, id: u32) -> bool {
        self.span(id).is_some_and(|span| span.special)
    }
}

/// Finds the names of special tokens in text.
#[derive(Debug)]
struct SpecialFinder {
    names: Option<meta::Regex>,
    /// The id of each of the regex's patterns.
    ids: Vec<u32>,
}

impl SpecialFinder {
    fn new(added: &[AddedToken]) -> Result<Self, String> {
        let mut named: Vec<_> = added.iter().filter(|token| !token.content.is_empty()).collect();
        // The first pattern that matches wins, so of two names that begin alike the longer one must come first.
        named.sort_by_key(|token| std::cmp::Reverse(token.content.len()));
        let patterns: Vec<_> = named.iter().map(|token| escaped(&token.content)).collect();
        let names = match patterns.as_slice() {
            [] => None,
            patterns => Some(
                meta::Regex::new_many(patterns)
                    .map_err(|error| format!("the names of its special tokens do not compile: {error}"))?,
            ),
        };
        Ok(Self { names, ids: named.iter().map(|token| token.id).collect() })
    }

    fn find<'a>(&'a self, text: &'a str) -> impl Iterator<Item = (usize, usize, u32)> + 'a {
        let found = self.names.iter().flat_map(move |names| names.find_iter(text));
        found.map(|found| (found.start(), found.end(), self.ids[found.pattern().as_usize()]))
    }
}

/// A pattern that matches `literal`. `\<` and `\>` are boundaries of words, and the bare characters need no escape.
fn escaped(literal: &str) -> String {
    let mut pattern = String::with_capacity(2 * literal.len());
    for character in literal.chars() {
        if character.is_ascii_punctuation() && !matches!(character, '<' | '>') {
            pattern.push('\\');
        }
        pattern.push(character);
    }
    pattern
}
