//! Names, element types, shapes and byte ranges of a checkpoint's tensors, from its headers alone.
//!
//! Reads `config.json`, `model.safetensors.index.json` or `model.safetensors`, and each file's header. Never touches a
//! tensor's bytes, so that a directory of files cut after the header can be planned for as well.

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io::Read,
    path::{Component, Path, PathBuf},
};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use thiserror::Error;
use xxhash_rust::xxh3::Xxh3;

use crate::{
    geometry::{Geometry, GeometryError},
    ids::Rank,
    layout::{Layout, TensorKind, TensorSlice},
};

/// Says which file holds which tensor.
const INDEX_FILE: &str = "model.safetensors.index.json";
/// The file of a checkpoint without an index.
const SINGLE_FILE: &str = "model.safetensors";
/// Longest header that is read, in bytes (safetensors' own limit).
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Longest JSON file that is read beside the tensors, in bytes.
const MAX_JSON_BYTES: u64 = 100_000_000;

/// Why a checkpoint is refused. Every message names the file, and the tensor where there is one.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// A file is missing or cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A JSON file is malformed.
    #[error("{path}: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The configuration cannot be served.
    #[error("{path}: {source}")]
    Geometry {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: GeometryError,
    },
    /// A file's header breaks the format.
    #[error("{path}: {problem}")]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A tensor that the model needs is absent.
    #[error("{path}: tensor {name} is missing")]
    Missing {
        /// The file that should hold it: the one the index names, or the index itself.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor differs from what the configuration asks for.
    #[error("{path}: tensor {name} is {found}, expected {expected}")]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What the header says.
        found: String,
        /// What the configuration asks for.
        expected: String,
    },
    /// A file ends before its tensors do.
    #[error("{path}: truncated: tensor {name} ends at byte {end}, the file has {len}")]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// One past its last byte.
        end: u64,
        /// The file's length.
        len: u64,
    },
}

/// Element types that a checkpoint may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Dtype {
    /// The upper half of an f32.
    BF16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
    /// Bytes.
    U8,
}

impl Dtype {
    /// Size of one element, in bytes.
    pub fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::BF16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    fn is_kind(self, kind: TensorKind) -> bool {
        (self == Self::U8) == (kind == TensorKind::Bytes)
    }
}

/// Where one tensor lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Element type.
    pub dtype: Dtype,
    /// Shape, row-major.
    pub shape: Vec<usize>,
    /// Index into [`Checkpoint::files`].
    pub file: usize,
    /// First byte within the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// One file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointFile {
    /// Its path.
    pub path: PathBuf,
    /// Its length in bytes.
    pub len: u64,
}

/// A checkpoint directory, opened as far as its headers.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// The directory.
    pub path: PathBuf,
    /// The model's shape.
    pub geometry: Geometry,
    /// Tokens that end a completion: `generation_config.json`'s, else `config.json`'s.
    pub eos_token_ids: Vec<u32>,
    /// Files with tensors.
    pub files: Vec<CheckpointFile>,
    /// Every tensor by name.
    pub tensors: BTreeMap<String, TensorEntry>,
    /// Digest of configuration and headers; equal for equal checkpoints.
    pub digest: u64,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// Members of a JSON object in their order. A map would keep the last of two with one name and hide the other.
struct Members(Vec<(String, serde_json::Value)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum EosTokens {
    One(u32),
    Many(Vec<u32>),
}

#[derive(Deserialize)]
struct GenerationConfig {
    eos_token_id: Option<EosTokens>,
}

impl Checkpoint {
    /// Opens a directory in the Hugging Face layout and checks every tensor's name, type and shape against
    /// `config.json`. The tensors' bytes need not be there: see [`Checkpoint::check_complete`].
    ///
    /// # Errors
    /// Names the file, and the tensor where there is one.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let mut digest = Xxh3::new();
        let config_path = path.join("config.json");
        let config = read_text(&config_path)?;
        digest.update(config.as_bytes());
        let geometry = Geometry::from_config_json(&config)
            .map_err(|source| CheckpointError::Geometry { path: config_path, source })?;
        let (names, weight_map) = file_names(path)?;
        let mut files = Vec::new();
        let mut tensors = BTreeMap::new();
        for name in names {
            let file_path = path.join(&name);
            let (len, header) = read_header(&file_path)?;
            digest.update(&header);
            let found = parse_header(&file_path, &header, files.len())?;
            // With an index, a tensor counts only in the file that the index names for it.
            let counts = |tensor: &String| weight_map.as_ref().is_none_or(|map| map.get(tensor) == Some(&name));
            tensors.extend(found.into_iter().filter(|(tensor, _)| counts(tensor)));
            files.push(CheckpointFile { path: file_path, len });
        }
        let eos_token_ids = eos_tokens(path)?.unwrap_or_else(|| geometry.eos_token_ids.clone());
        let checkpoint =
            Self { path: path.to_owned(), geometry, eos_token_ids, files, tensors, digest: digest.digest() };
        checkpoint.check_tensors(weight_map.as_ref())?;
        Ok(checkpoint)
    }

    /// Checks that every file is as long as its header says.
    ///
    /// # Errors
    /// Names the first tensor whose bytes are missing.
    pub fn check_complete(&self) -> Result<(), CheckpointError> {
        for (name, entry) in &self.tensors {
            let (file, end) = (&self.files[entry.file], entry.offset + entry.bytes);
            if end > file.len {
                return Err(CheckpointError::Truncated {
                    path: file.path.clone(),
                    name: name.clone(),
                    end,
                    len: file.len,
                });
            }
        }
        Ok(())
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|entry| entry.bytes).sum()
    }

    /// Bytes that a slice of a tensor takes in this checkpoint; 0 if there is no such tensor.
    pub fn slice_bytes(&self, slice: &TensorSlice) -> u64 {
        let element = self.tensors.get(&slice.name).map_or(0, |entry| entry.dtype.bytes());
        (slice.elements() * element) as u64
    }

    fn check_tensors(&self, weight_map: Option<&WeightMap>) -> Result<(), CheckpointError> {
        let whole = Layout::single().rank(&self.geometry, Rank(0));
        for slice in whole.tensors(&self.geometry) {
            let Some(entry) = self.tensors.get(&slice.name) else {
                let file = match weight_map {
                    None => SINGLE_FILE,
                    Some(map) => map.get(&slice.name).map_or(INDEX_FILE, String::as_str),
                };
                return Err(CheckpointError::Missing { path: self.path.join(file), name: slice.name });
            };
            if entry.shape != slice.shape || !entry.dtype.is_kind(slice.kind) {
                let kind = if slice.kind == TensorKind::Bytes { "U8" } else { "BF16, F16 or F32" };
                return Err(CheckpointError::Mismatch {
                    path: self.files[entry.file].path.clone(),
                    name: slice.name,
                    found: format!("{:?} {:?}", entry.dtype, entry.shape),
                    expected: format!("{kind} {:?}", slice.shape),
                });
            }
        }
        Ok(())
    }
}

fn io_error(path: &Path) -> impl FnOnce(std::io::Error) -> CheckpointError {
    let path = path.to_owned();
    |source| CheckpointError::Io { path, source }
}

fn header_error(path: &Path, problem: impl Into<String>) -> CheckpointError {
    CheckpointError::Header { path: path.to_owned(), problem: problem.into() }
}

fn read_text(path: &Path) -> Result<String, CheckpointError> {
    let mut text = String::new();
    let file = File::open(path).map_err(io_error(path))?;
    file.take(MAX_JSON_BYTES).read_to_string(&mut text).map_err(io_error(path))?;
    Ok(text)
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T, CheckpointError> {
    let text = read_text(path)?;
    serde_json::from_str(&text).map_err(|source| CheckpointError::Json { path: path.to_owned(), source })
}

type WeightMap = BTreeMap<String, String>;

/// Names of the files with tensors, and which tensor lies where if there is an index.
fn file_names(path: &Path) -> Result<(Vec<String>, Option<WeightMap>), CheckpointError> {
    let index_path = path.join(INDEX_FILE);
    if !index_path.exists() {
        return Ok((vec![SINGLE_FILE.to_owned()], None));
    }
    let index: Index = read_json(&index_path)?;
    let mut names: Vec<String> = index.weight_map.values().cloned().collect();
    names.sort_unstable();
    names.dedup();
    for name in &names {
        let mut parts = Path::new(name).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            return Err(header_error(&index_path, format!("file name {name:?} leaves the model's directory")));
        }
    }
    Ok((names, Some(index.weight_map)))
}

fn eos_tokens(path: &Path) -> Result<Option<Vec<u32>>, CheckpointError> {
    let file = path.join("generation_config.json");
    if !file.exists() {
        return Ok(None);
    }
    let config: GenerationConfig = read_json(&file)?;
    Ok(config.eos_token_id.map(|tokens| match tokens {
        EosTokens::One(id) => vec![id],
        EosTokens::Many(ids) => ids,
    }))
}

/// The file's length and its header's JSON.
fn read_header(path: &Path) -> Result<(u64, Vec<u8>), CheckpointError> {
    let mut file = File::open(path).map_err(io_error(path))?;
    let len = file.metadata().map_err(io_error(path))?.len();
    let mut prefix = [0; 8];
    file.read_exact(&mut prefix).map_err(|_| header_error(path, format!("{len} bytes are too few for a header")))?;
    let header_len = u64::from_le_bytes(prefix);
    if header_len > MAX_HEADER_BYTES || header_len + 8 > len {
        let problem = format!("header of {header_len} bytes in a file of {len} (limit {MAX_HEADER_BYTES})");
        return Err(header_error(path, problem));
    }
    let mut header = vec![0; header_len as usize];
    file.read_exact(&mut header).map_err(io_error(path))?;
    Ok((len, header))
}

fn parse_header(path: &Path, header: &[u8], file: usize) -> Result<Vec<(String, TensorEntry)>, CheckpointError> {
    let json = |source| CheckpointError::Json { path: path.to_owned(), source };
    let Members(raw) = serde_json::from_slice(header).map_err(json)?;
    let mut entries: Vec<(String, TensorEntry)> = Vec::with_capacity(raw.len());
    for (name, value) in raw.into_iter().filter(|(name, _)| name != "__metadata__") {
        let tensor: RawTensor =
            serde_json::from_value(value).map_err(|source| header_error(path, format!("tensor {name}: {source}")))?;
        let [start, end] = tensor.data_offsets;
        let elements = tensor.shape.iter().try_fold(1_u128, |product, &len| product.checked_mul(len as u128));
        let bytes = elements.and_then(|n| n.checked_mul(tensor.dtype.bytes() as u128));
        if bytes != end.checked_sub(start).map(u128::from) || end > u64::MAX / 2 {
            let problem = format!("tensor {name}: shape {:?} and bytes {start}..{end} disagree", tensor.shape);
            return Err(header_error(path, problem));
        }
        let offset = 8 + header.len() as u64 + start;
        let entry = TensorEntry { dtype: tensor.dtype, shape: tensor.shape, file, offset, bytes: end - start };
        entries.push((name, entry));
    }
    check_overlap(path, &entries)?;
    let mut names: Vec<&String> = entries.iter().map(|(name, _)| name).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(header_error(path, format!("tensor {} is there twice", twice[0])));
    }
    Ok(entries)
}

fn check_overlap(path: &Path, entries: &[(String, TensorEntry)]) -> Result<(), CheckpointError> {
    let mut by_offset: Vec<_> = entries.iter().filter(|(_, entry)| entry.bytes > 0).collect();
    by_offset.sort_unstable_by_key(|(_, entry)| entry.offset);
    for pair in by_offset.windows(2) {
        if pair[0].1.offset + pair[0].1.bytes > pair[1].1.offset {
            return Err(header_error(path, format!("tensors {} and {} overlap", pair[0].0, pair[1].0)));
        }
    }
    Ok(())
}
