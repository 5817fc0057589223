//! Reads `tokenizer.json`: first an outline that says what kind of tokenizer it is, then the two big tables.
//!
//! Two passes cost a few tens of milliseconds on the release's 28 MB and spare building anything for a file that is
//! refused. The tables go straight into bytes; no JSON tree is built.

use std::fmt;

use serde::{
    Deserialize,
    de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor},
};

use super::byte_level;

/// The split pattern of GPT-2, which the `ByteLevel` pre-tokenizer runs when no `Split` stands before it.
const GPT2_PATTERN: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// Everything in the file but the tables.
#[derive(Debug, Deserialize)]
pub(super) struct Outline {
    #[serde(default)]
    normalizer: Option<Component>,
    #[serde(default)]
    pre_tokenizer: Option<PreTokenizer>,
    #[serde(default)]
    decoder: Option<Component>,
    model: ModelOutline,
    #[serde(default)]
    pub(super) added_tokens: Vec<AddedToken>,
}

#[derive(Debug, Deserialize)]
struct Component {
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Debug, Deserialize)]
struct PreTokenizer {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    pretokenizers: Vec<PreTokenizer>,
    #[serde(default)]
    pattern: Option<SplitPattern>,
    #[serde(default)]
    behavior: Option<String>,
    #[serde(default)]
    invert: bool,
    #[serde(default)]
    add_prefix_space: bool,
    #[serde(default = "yes")]
    use_regex: bool,
}

fn yes() -> bool {
    true
}

#[derive(Debug, Deserialize)]
enum SplitPattern {
    Regex(String),
    String(String),
}

#[derive(Debug, Deserialize)]
struct ModelOutline {
    #[serde(default, rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    dropout: Option<f64>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    ignore_merges: bool,
}

/// A token that has a name instead of bytes, such as `<|start|>`.
#[derive(Debug, Deserialize)]
pub(super) struct AddedToken {
    pub(super) id: u32,
    pub(super) content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    special: bool,
}

impl Outline {
    /// Whether a word that is a token is taken whole.
    pub(super) fn whole_words_first(&self) -> bool {
        self.model.ignore_merges
    }

    /// The split pattern, or what in the file this encoder cannot run.
    pub(super) fn pattern(&self) -> Result<&str, String> {
        self.check_model()?;
        if let Some(normalizer) = &self.normalizer {
            return Err(format!("it has a normalizer of type {}", normalizer.kind));
        }
        if let Some(decoder) = self.decoder.as_ref().filter(|decoder| decoder.kind != "ByteLevel") {
            return Err(format!("it has a decoder of type {}", decoder.kind));
        }
        for token in &self.added_tokens {
            if !token.special || token.single_word || token.lstrip || token.rstrip {
                return Err(format!(
                    "its added token {:?} is not special, or takes words or spaces with it",
                    token.content
                ));
            }
        }
        match &self.pre_tokenizer {
            Some(pre_tokenizer) => pre_tokenizer.pattern(),
            None => Err("it has no pre-tokenizer".to_owned()),
        }
    }

    fn check_model(&self) -> Result<(), String> {
        let model = &self.model;
        // Old files leave the type out; what they hold is then told by the tables, which only BPE has.
        if let Some(kind) = model.kind.as_deref().filter(|&kind| kind != "BPE") {
            return Err(format!("its model is of type {kind}"));
        }
        if model.dropout.is_some_and(|dropout| dropout > 0.0) {
            return Err("its model drops merges at random".to_owned());
        }
        let affixes = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
        match affixes.into_iter().flatten().find(|affix| !affix.is_empty()) {
            Some(affix) => Err(format!("its model marks parts of words with {affix:?}")),
            None => Ok(()),
        }
    }
}

impl PreTokenizer {
    fn pattern(&self) -> Result<&str, String> {
        let parts = match self.kind.as_str() {
            "Sequence" => self.pretokenizers.iter().collect(),
            _ => vec![self],
        };
        let Some((byte_level, splits)) = parts.split_last().filter(|(last, _)| last.kind == "ByteLevel") else {
            return Err(format!("its pre-tokenizer of type {} does not end in ByteLevel", self.kind));
        };
        if byte_level.add_prefix_space {
            return Err("its pre-tokenizer adds a space before the text".to_owned());
        }
        match (splits, byte_level.use_regex) {
            ([], true) => Ok(GPT2_PATTERN),
            ([split], false) => split.own_pattern(),
            _ => Err("its pre-tokenizer splits text in more or fewer than one way".to_owned()),
        }
    }

    fn own_pattern(&self) -> Result<&str, String> {
        match (&self.pattern, self.behavior.as_deref()) {
            (Some(SplitPattern::Regex(pattern)), Some("Isolated")) if self.kind == "Split" && !self.invert => {
                Ok(pattern)
            }
            (Some(SplitPattern::String(literal)), _) => {
                Err(format!("its pre-tokenizer splits at the literal {literal:?}"))
            }
            (_, behavior) => Err(format!(
                "its pre-tokenizer has a {} of behavior {behavior:?} (inverted: {}) before ByteLevel",
                self.kind, self.invert
            )),
        }
    }
}

/// The vocabulary and the merges, as bytes.
#[derive(Deserialize)]
pub(super) struct Tables {
    pub(super) model: ModelTables,
}

#[derive(Deserialize)]
pub(super) struct ModelTables {
    pub(super) vocab: Vocabulary,
    pub(super) merges: Merges,
}

/// Each token's bytes and its id, in the order of the file.
pub(super) struct Vocabulary(pub(super) Vec<(Box<[u8]>, u32)>);

/// The merges in order of rank: the two sides' bytes, one after the other.
#[derive(Default)]
pub(super) struct Merges {
    bytes: Vec<u8>,
    /// Where the left and the right side of each merge end in `bytes`.
    ends: Vec<(u32, u32)>,
}

impl Merges {
    /// How many merges there are.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The bytes of both sides together, and how many of them are the left side's, in order of rank.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&[u8], usize)> {
        let starts = std::iter::once(0).chain(self.ends.iter().map(|&(_, end)| end as usize));
        starts.zip(&self.ends).map(|(start, &(left, end))| (&self.bytes[start..end as usize], left as usize - start))
    }

    fn push_side<E: Error>(&mut self, text: &str) -> Result<u32, E> {
        byte_level::decode_into(text, &mut self.bytes)
            .map_err(|character| E::custom(format_args!("merge part {text:?}: {character:?} is not byte-level")))?;
        u32::try_from(self.bytes.len()).map_err(|_| E::custom("the merges take more than 4 GiB"))
    }
}

impl<'de> Deserialize<'de> for Vocabulary {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(VocabularyVisitor)
    }
}

struct VocabularyVisitor;

impl<'de> Visitor<'de> for VocabularyVisitor {
    type Value = Vocabulary;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of token to id")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocabulary, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry_seed(TokenBytes, std::marker::PhantomData::<u32>)? {
            entries.push(entry);
        }
        Ok(Vocabulary(entries))
    }
}

/// Reads a token's spelling as its bytes.
struct TokenBytes;

impl<'de> DeserializeSeed<'de> for TokenBytes {
    type Value = Box<[u8]>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for TokenBytes {
    type Value = Box<[u8]>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a token in the byte-level alphabet")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        let mut bytes = Vec::with_capacity(text.len());
        byte_level::decode_into(text, &mut bytes)
            .map_err(|character| E::custom(format_args!("token {text:?}: {character:?} is not byte-level")))?;
        Ok(bytes.into_boxed_slice())
    }
}

impl<'de> Deserialize<'de> for Merges {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(MergesVisitor)
    }
}

struct MergesVisitor;

impl<'de> Visitor<'de> for MergesVisitor {
    type Value = Merges;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of merges")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Merges, A::Error> {
        let mut merges = Merges::default();
        while list.next_element_seed(OneMerge(&mut merges))?.is_some() {}
        Ok(merges)
    }
}

/// Reads one merge, written `["a", "b"]` or, in older files, `"a b"`.
struct OneMerge<'m>(&'m mut Merges);

impl<'de> DeserializeSeed<'de> for OneMerge<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for OneMerge<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a merge: two tokens in a list, or in a string with a space between")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        let (left, right) =
            text.split_once(' ').ok_or_else(|| E::custom(format_args!("merge {text:?} has no space")))?;
        let left = self.0.push_side(left)?;
        let right = self.0.push_side(right)?;
        self.0.ends.push((left, right));
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sides: A) -> Result<(), A::Error> {
        let mut ends = [0; 2];
        for (at, end) in ends.iter_mut().enumerate() {
            *end = sides
                .next_element_seed(MergeSide(&mut *self.0))?
                .ok_or_else(|| A::Error::invalid_length(at, &"two tokens"))?;
        }
        self.0.ends.push((ends[0], ends[1]));
        Ok(())
    }
}

/// Reads one side of a merge and says where it ends.
struct MergeSide<'m>(&'m mut Merges);

impl<'de> DeserializeSeed<'de> for MergeSide<'_> {
    type Value = u32;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<u32, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for MergeSide<'_> {
    type Value = u32;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a token in the byte-level alphabet")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<u32, E> {
        self.0.push_side(text)
    }
}
