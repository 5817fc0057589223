//! Where a model's directory is found.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// The models that come with the source tree this binary was built from.
fn bundled() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models")
}

/// Resolves a path, or a name below `model_dir` (default: the bundled models), to a directory with a `config.json`.
pub(crate) fn resolve(model: &str, model_dir: Option<&Path>) -> Result<PathBuf> {
    let below = model_dir.map_or_else(bundled, Path::to_path_buf).join(model);
    let candidates = [PathBuf::from(model), below];
    for candidate in &candidates {
        if candidate.join("config.json").is_file() {
            return Ok(std::fs::canonicalize(candidate)?);
        }
    }
    if let Some(found) = candidates.iter().find_map(|candidate| foreign(candidate)) {
        bail!("model {model:?}: {found}; only directories with safetensors and a config.json are served")
    }
    let [path, name] = candidates.map(|path| path.join("config.json").display().to_string());
    bail!(
        "model {model:?}: neither {path} nor {name} exists; give a directory in the Hugging Face layout, or --model-dir"
    )
}

/// What lies at a place that holds a model in a format that is not read.
fn foreign(candidate: &Path) -> Option<String> {
    let is_foreign = |name: &str| [".gguf", ".bin", ".pt", ".pth", ".ckpt"].iter().any(|end| name.ends_with(end));
    if candidate.is_file() {
        return Some(format!("{} is a file", candidate.display()));
    }
    let entries = std::fs::read_dir(candidate).ok()?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let found = names.filter(|name| is_foreign(name)).min()?;
    Some(format!("{} holds {found} and no config.json", candidate.display()))
}

/// The names under which a model is served: as told, else its directory's name.
pub(crate) fn served_names(directory: &Path, told: &[String]) -> Vec<String> {
    if !told.is_empty() {
        return told.to_vec();
    }
    let name = directory.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned());
    vec![name]
}
