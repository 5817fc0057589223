//! Which files of a directory are read, how far, and from where.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read,
    path::{Component, Path},
};

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{CheckpointError, FileHeader, Headers, header, header::Members, header_error};
use crate::geometry::Geometry;

/// Shape of the model.
pub(super) const CONFIG_FILE: &str = "config.json";
/// Settings of generation, of which only the tokens that end a text are read.
const GENERATION_FILE: &str = "generation_config.json";
/// Tokens and their ids.
const TOKENIZER_FILE: &str = "tokenizer.json";
/// Says which file holds which tensor.
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";
/// The file of a checkpoint without an index.
pub(super) const SINGLE_FILE: &str = "model.safetensors";
/// Longest configuration that is read, in bytes; the release's has 2 kB.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Longest index that is read, in bytes; the 120b release's has 60 kB.
const MAX_INDEX_BYTES: u64 = 32 << 20;
/// How files with weights in other formats end.
const FOREIGN: [&str; 5] = [".bin", ".gguf", ".pt", ".pth", ".ckpt"];

/// Name of the file of each tensor.
pub type WeightMap = BTreeMap<String, String>;

#[derive(Deserialize)]
struct Index {
    weight_map: Members,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum EosTokens {
    One(u32),
    Many(Vec<u32>),
}

#[derive(Deserialize)]
struct GenerationConfig<'a> {
    #[serde(borrow)]
    eos_token_id: Option<&'a RawValue>,
}

/// Reads everything but the tensors.
pub(super) fn read(path: &Path) -> Result<Headers, CheckpointError> {
    let config = read_text(path, CONFIG_FILE, MAX_CONFIG_BYTES)?;
    let generation_config = match path.join(GENERATION_FILE).exists() {
        true => Some(read_text(path, GENERATION_FILE, MAX_CONFIG_BYTES)?),
        false => None,
    };
    // Others read it; that it can be read without leaving the directory is checked with the rest.
    if path.join(TOKENIZER_FILE).exists() {
        open(path, TOKENIZER_FILE)?;
    }
    let weight_map = match path.join(INDEX_FILE).exists() {
        true => Some(parse_index(path, &read_text(path, INDEX_FILE, MAX_INDEX_BYTES)?)?),
        false => None,
    };
    let mut names: Vec<String> = match &weight_map {
        Some(map) => map.values().cloned().collect(),
        None => vec![single_file(path)?],
    };
    names.sort_unstable();
    names.dedup();
    let mut files = Vec::with_capacity(names.len());
    for name in names {
        let (len, json) = header::read(&path.join(&name), open(path, &name)?)?;
        files.push(FileHeader { name, len, json });
    }
    Ok(Headers { config, generation_config, weight_map, files })
}

/// The file of a checkpoint without an index; a directory that holds only other formats is told so.
fn single_file(path: &Path) -> Result<String, CheckpointError> {
    let is_foreign = |name: &String| FOREIGN.iter().any(|end| name.ends_with(end));
    if !path.join(SINGLE_FILE).exists() {
        let entries = fs::read_dir(path).map_err(io_error(path))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        if let Some(found) = names.filter(is_foreign).min() {
            return Err(CheckpointError::Foreign { path: path.to_owned(), found });
        }
    }
    Ok(SINGLE_FILE.to_owned())
}

/// Opens a file of the directory. Nothing else is opened: no pipe that would block, no device, nothing that a link
/// reaches outside.
fn open(directory: &Path, name: &str) -> Result<File, CheckpointError> {
    let path = directory.join(name);
    let real = fs::canonicalize(&path).map_err(io_error(&path))?;
    let home = fs::canonicalize(directory).map_err(io_error(directory))?;
    // In the cache of the Hugging Face hub, snapshots/REVISION/FILE is a link to ../../blobs/DIGEST.
    let snapshots = home.parent().filter(|parent| parent.file_name().is_some_and(|name| name == "snapshots"));
    let blobs = snapshots.and_then(Path::parent).map(|hub| hub.join("blobs"));
    if !real.starts_with(&home) && !blobs.is_some_and(|blobs| real.starts_with(blobs)) {
        let problem = format!("is a link to {}, outside of the model's directory", real.display());
        return Err(header_error(&path, problem));
    }
    if !fs::metadata(&real).map_err(io_error(&path))?.is_file() {
        return Err(header_error(&path, "is not a regular file"));
    }
    File::open(&real).map_err(io_error(&path))
}

fn read_text(directory: &Path, name: &str, limit: u64) -> Result<String, CheckpointError> {
    let (path, file) = (directory.join(name), open(directory, name)?);
    let mut text = String::new();
    let read = file.take(limit + 1).read_to_string(&mut text).map_err(io_error(&path))?;
    if read as u64 > limit {
        return Err(header_error(&path, format!("longer than {limit} bytes")));
    }
    Ok(text)
}

fn io_error(path: &Path) -> impl FnOnce(std::io::Error) -> CheckpointError {
    let path = path.to_owned();
    |source| CheckpointError::Io { path, source }
}

/// Reads the text of the index of `directory`.
///
/// # Errors
/// Names the tensor whose file is none of the directory's, or that stands there twice.
pub fn parse_index(directory: &Path, text: &str) -> Result<WeightMap, CheckpointError> {
    let path = directory.join(INDEX_FILE);
    let index: Index =
        serde_json::from_str(text).map_err(|source| CheckpointError::Json { path: path.clone(), source })?;
    let mut map = WeightMap::new();
    for (tensor, value) in index.weight_map.0 {
        header::check_name(&path, &tensor)?;
        let refuse = |problem: String| Err(header_error(&path, format!("tensor {tensor}: {problem}")));
        let Ok(file) = serde_json::from_str::<String>(value.get()) else {
            return refuse(format!("its file is {}, expected a string", shown(&value)));
        };
        let mut parts = Path::new(&file).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            return refuse(format!("its file {file:?} leaves the model's directory"));
        }
        if !file.ends_with(".safetensors") || !file.bytes().all(|byte| byte.is_ascii_graphic()) {
            return refuse(format!("its file {file:?} is no safetensors file by its name"));
        }
        if map.contains_key(&tensor) {
            return refuse("is there twice".to_owned());
        }
        map.insert(tensor, file);
    }
    if map.is_empty() {
        return Err(header_error(&path, "weight_map names no tensor"));
    }
    Ok(map)
}

/// The tokens that end a text: `generation_config.json`'s, else `config.json`'s.
pub(super) fn eos_tokens(
    directory: &Path,
    headers: &Headers,
    geometry: &Geometry,
) -> Result<Vec<u32>, CheckpointError> {
    let path = directory.join(GENERATION_FILE);
    let told = match &headers.generation_config {
        Some(text) => told_eos_tokens(&path, text)?,
        None => None,
    };
    let (path, ids) = match told {
        Some(ids) => (path, ids),
        None => (directory.join(CONFIG_FILE), geometry.eos_token_ids.clone()),
    };
    match ids.iter().find(|&&id| id as usize >= geometry.vocab_size) {
        // It would never be chosen, and no text would end.
        Some(id) => {
            let problem = format!("eos_token_id {id} is outside the vocabulary of {}", geometry.vocab_size);
            Err(header_error(&path, problem))
        }
        None => Ok(ids),
    }
}

fn told_eos_tokens(path: &Path, text: &str) -> Result<Option<Vec<u32>>, CheckpointError> {
    let config: GenerationConfig<'_> =
        serde_json::from_str(text).map_err(|source| CheckpointError::Json { path: path.to_owned(), source })?;
    match config.eos_token_id.map(|raw| (raw, serde_json::from_str(raw.get()))) {
        None => Ok(None),
        Some((_, Ok(EosTokens::One(id)))) => Ok(Some(vec![id])),
        Some((_, Ok(EosTokens::Many(ids)))) => Ok(Some(ids)),
        Some((raw, Err(_))) => {
            let problem = format!("eos_token_id is {}, expected a token id or a list of them", shown(raw));
            Err(header_error(path, problem))
        }
    }
}

/// The beginning of a value, for messages.
fn shown(value: &RawValue) -> String {
    value.get().chars().take(64).collect()
}
