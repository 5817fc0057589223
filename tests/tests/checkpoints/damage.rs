//! Copies of checkpoints, and ways to damage them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use phalanx_tests::{data, root};
use serde_json::Value;

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const GENERATION: &str = "generation_config.json";
pub(crate) const TOKENIZER: &str = "tokenizer.json";
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// The bundled model's one file.
pub(crate) const WHOLE: &str = "model.safetensors";
/// The second of the two files of `tiny-ragged`.
pub(crate) const SHARD: &str = "model-00001-of-00001.safetensors";
pub(crate) const FIRST_SHARD: &str = "model-00000-of-00001.safetensors";
pub(crate) const NORM: &str = "model.layers.2.input_layernorm.weight";
pub(crate) const OTHER_NORM: &str = "model.layers.2.post_attention_layernorm.weight";
pub(crate) const BLOCKS: &str = "model.layers.1.mlp.experts.gate_up_proj_blocks";
pub(crate) const SCALES: &str = "model.layers.1.mlp.experts.gate_up_proj_scales";
/// A copy of a checkpoint to damage.
pub(crate) struct Copy(pub(crate) PathBuf);

impl Copy {
    pub(crate) fn text(&self, file: &str) -> String {
        fs::read_to_string(self.0.join(file)).unwrap()
    }

    pub(crate) fn write(&self, file: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.0.join(file), bytes).unwrap();
    }

    pub(crate) fn remove(&self, file: &str) {
        fs::remove_file(self.0.join(file)).unwrap();
    }

    pub(crate) fn json(&self, file: &str, edit: impl FnOnce(&mut Value)) {
        let mut value = serde_json::from_str(&self.text(file)).unwrap();
        edit(&mut value);
        self.write(file, value.to_string());
    }

    pub(crate) fn config(&self, field: &str, value: Value) {
        self.json(CONFIG, |config| match field.split_once('.') {
            Some((outer, inner)) => config[outer][inner] = value,
            None => config[field] = value,
        });
    }

    /// A safetensors file as header text and tensors' bytes.
    pub(crate) fn parts(&self, file: &str) -> (String, Vec<u8>) {
        let mut bytes = fs::read(self.0.join(file)).unwrap();
        let len = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let data = bytes.split_off(len);
        (String::from_utf8(bytes.split_off(8)).unwrap(), data)
    }

    pub(crate) fn header_text(&self, file: &str, edit: impl FnOnce(String) -> String) {
        let (header, data) = self.parts(file);
        let header = edit(header);
        self.write(file, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat());
    }

    pub(crate) fn header(&self, file: &str, edit: impl FnOnce(&mut Value)) {
        self.header_text(file, |text| {
            let mut header = serde_json::from_str(&text).unwrap();
            edit(&mut header);
            header.to_string()
        });
    }

    /// Overwrites a tensor's bytes from `at` on.
    pub(crate) fn tensor_bytes(&self, file: &str, tensor: &str, at: usize, bytes: &[u8]) {
        let (header, data) = self.parts(file);
        let offsets: Value = serde_json::from_str::<Value>(&header).unwrap()[tensor]["data_offsets"].clone();
        let start = fs::read(self.0.join(file)).unwrap().len() - data.len() + offsets[0].as_u64().unwrap() as usize;
        let mut whole = fs::read(self.0.join(file)).unwrap();
        whole[start + at..start + at + bytes.len()].copy_from_slice(bytes);
        self.write(file, whole);
    }

    pub(crate) fn set_len(&self, file: &str, len: u64) {
        fs::File::options().write(true).open(self.0.join(file)).unwrap().set_len(len).unwrap();
    }

    pub(crate) fn first_bytes(&self, file: &str, bytes: [u8; 8]) {
        let mut whole = fs::read(self.0.join(file)).unwrap();
        whole[..8].copy_from_slice(&bytes);
        self.write(file, whole);
    }
}

/// Which checkpoint is damaged.
#[derive(Clone, Copy)]
pub(crate) enum Of {
    /// The bundled model: one file, and everything that serving needs.
    Nano,
    /// Two files and an index.
    Ragged,
}

/// What is done to it, and what the refusal must say.
pub(crate) type Kind = (&'static str, Of, fn(&Copy), &'static [&'static str]);

pub(crate) fn copy(of: Of, to: &Path) -> Copy {
    let from = match of {
        Of::Nano => root().join("deploy/models/nano"),
        Of::Ragged => data("golden/tiny-ragged"),
    };
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        // Written anew: a copy of a read-only file could not be damaged.
        fs::write(to.join(entry.file_name()), fs::read(entry.path()).unwrap()).unwrap();
    }
    Copy(to.to_owned())
}
