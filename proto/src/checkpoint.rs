//! Names, element types, shapes and byte ranges of a checkpoint's tensors, from its headers alone.
//!
//! Reads `config.json`, `model.safetensors.index.json` or `model.safetensors`, and each file's header. Never touches a
//! tensor's bytes, so that a directory of files cut after the header can be planned for as well. A checkpoint may come
//! from anywhere: nothing in it is believed before it is checked, and what is refused is named.
//!
//! | file | holds |
//! | --- | --- |
//! | `directory` | which files are read, how far, and from where |
//! | `header` | what a safetensors header may say |

mod directory;
mod header;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use thiserror::Error;
use xxhash_rust::xxh3::Xxh3;

use self::directory::{INDEX_FILE, SINGLE_FILE};
pub use self::directory::{WeightMap, parse_index};
use crate::{
    geometry::{Geometry, GeometryError},
    ids::Rank,
    layout::{Layout, TensorKind, TensorSlice},
};

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
    /// There are weights, but not as safetensors.
    #[error(
        "{path}: holds {found}; only safetensors checkpoints are read, since other formats can run code or lose names"
    )]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// The first file with weights of another format.
        found: String,
    },
    /// The configuration cannot be served.
    #[error("{path}: {source}")]
    Geometry {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: GeometryError,
    },
    /// A file's place, header or content breaks the format.
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
    /// One past the last byte of its last tensor.
    pub data_end: u64,
}

/// What a checkpoint says about itself before its tensors begin: all that [`Checkpoint::open`] reads.
#[derive(Clone, Debug, Default)]
pub struct Headers {
    /// Text of `config.json`.
    pub config: String,
    /// Text of `generation_config.json`, if there is one.
    pub generation_config: Option<String>,
    /// Which file holds which tensor, if there is an index.
    pub weight_map: Option<WeightMap>,
    /// One entry a file with tensors.
    pub files: Vec<FileHeader>,
}

/// The header of one safetensors file.
#[derive(Clone, Debug, Default)]
pub struct FileHeader {
    /// The file's name within the directory.
    pub name: String,
    /// Its length in bytes.
    pub len: u64,
    /// Its header's JSON.
    pub json: Vec<u8>,
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

impl Checkpoint {
    /// Opens a directory in the Hugging Face layout and checks every tensor's name, type and shape against
    /// `config.json`. The tensors' bytes need not be there: see [`Checkpoint::check_complete`].
    ///
    /// # Errors
    /// Names the file, and the tensor or field where there is one.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        Self::from_headers(path, &directory::read(path)?)
    }

    /// Makes sense of what was read from the directory `path`. Reads nothing.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_headers(path: &Path, headers: &Headers) -> Result<Self, CheckpointError> {
        let mut digest = Xxh3::new();
        digest.update(headers.config.as_bytes());
        let geometry = Geometry::from_config_json(&headers.config)
            .map_err(|source| CheckpointError::Geometry { path: path.join(directory::CONFIG_FILE), source })?;
        let eos_token_ids = directory::eos_tokens(path, headers, &geometry)?;
        let (mut files, mut tensors) = (Vec::new(), BTreeMap::new());
        let mut holes = Vec::new();
        for FileHeader { name, len, json } in &headers.files {
            let file_path = path.join(name);
            digest.update(json);
            let found = header::parse(&file_path, json, files.len())?;
            holes.extend(header::hole(&file_path, json.len(), &found));
            let data_end = found.iter().map(|(_, entry)| entry.offset + entry.bytes).max();
            add_tensors(&file_path, name, found, headers.weight_map.as_ref(), &mut tensors)?;
            let data_end = data_end.unwrap_or(8 + json.len() as u64);
            files.push(CheckpointFile { path: file_path, len: *len, data_end });
        }
        let checkpoint =
            Self { path: path.to_owned(), geometry, eos_token_ids, files, tensors, digest: digest.digest() };
        checkpoint.check_tensors(headers.weight_map.as_ref())?;
        checkpoint.check_layers()?;
        // A tensor that is missing leaves a hole: it is named first.
        holes.into_iter().next().map_or(Ok(checkpoint), Err)
    }

    /// Checks that every file is as long as its header says, no shorter and no longer.
    ///
    /// # Errors
    /// Names the first tensor whose bytes are missing, or the file with bytes that belong to none.
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
        for CheckpointFile { path, len, data_end } in &self.files {
            if len != data_end {
                let problem = format!("{len} bytes long, but its last tensor ends at byte {data_end}");
                return Err(header_error(path, problem));
            }
        }
        Ok(())
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors.values().fold(0, |sum, entry| sum.saturating_add(entry.bytes))
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

    /// Refuses tensors of layers that the configuration does not have: the model would run without its upper half.
    fn check_layers(&self) -> Result<(), CheckpointError> {
        let layers = self.geometry.num_hidden_layers();
        let layer = |name: &str| name.strip_prefix("model.layers.")?.split('.').next()?.parse::<usize>().ok();
        match self.tensors.iter().find(|(name, _)| layer(name).is_some_and(|layer| layer >= layers)) {
            None => Ok(()),
            Some((name, entry)) => {
                let problem = format!("tensor {name}: config.json says num_hidden_layers is {layers}");
                Err(header_error(&self.files[entry.file].path, problem))
            }
        }
    }
}

/// Adds one file's tensors. With an index, each tensor lies only in the file that the index names for it; what the
/// index leaves out is not part of the model.
fn add_tensors(
    path: &Path,
    file: &str,
    found: Vec<(String, TensorEntry)>,
    weight_map: Option<&WeightMap>,
    tensors: &mut BTreeMap<String, TensorEntry>,
) -> Result<(), CheckpointError> {
    for (name, entry) in found {
        match weight_map.map(|map| map.get(&name)) {
            Some(None) => continue,
            Some(Some(told)) if told != file => {
                return Err(header_error(path, format!("tensor {name} lies here, and {INDEX_FILE} says in {told}")));
            }
            Some(Some(_)) | None => {}
        }
        tensors.insert(name, entry);
    }
    Ok(())
}

fn header_error(path: &Path, problem: impl Into<String>) -> CheckpointError {
    CheckpointError::Header { path: path.to_owned(), problem: problem.into() }
}
