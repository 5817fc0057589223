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
    let [path, name] = candidates.map(|path| path.join("config.json").display().to_string());
    bail!(
        "model {model:?}: neither {path} nor {name} exists; give a directory in the Hugging Face layout, or --model-dir"
    )
}

/// The names under which a model is served: as told, else its directory's name.
pub(crate) fn served_names(directory: &Path, told: &[String]) -> Vec<String> {
    if !told.is_empty() {
        return told.to_vec();
    }
    let name = directory.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned());
    vec![name]
}
