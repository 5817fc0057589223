//! Golden files, which lie in the repository.

use std::{collections::BTreeMap, path::PathBuf};

use phalanx_proto::ids::TokenId;

/// The crate's folder: where it was built, unless `CARGO_MANIFEST_DIR` says where it was brought.
fn crate_folder() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

/// The folder of golden data.
pub(crate) fn golden(name: &str) -> PathBuf {
    crate_folder().join("../tests/data/golden").join(name)
}

/// The bundled model.
pub(crate) fn nano() -> PathBuf {
    crate_folder().join("../deploy/models/nano")
}

/// A tensor of a golden file.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Tensor {
    pub(crate) fn floats(&self) -> Vec<f32> {
        self.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    pub(crate) fn indices(&self) -> Vec<usize> {
        self.bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b) as usize).collect()
    }

    pub(crate) fn tokens(&self) -> Vec<TokenId> {
        self.indices().into_iter().map(|id| TokenId(id as u32)).collect()
    }

    /// Row `index` of the first axis.
    pub(crate) fn row(&self, index: usize) -> Vec<f32> {
        let len = self.shape[1..].iter().product::<usize>();
        self.floats()[index * len..(index + 1) * len].to_vec()
    }
}

/// A prompt and what the model says to it.
pub(crate) struct Prompt {
    pub(crate) ids: Vec<TokenId>,
    /// Positions whose logits are kept.
    pub(crate) positions: Vec<usize>,
    /// `[positions, vocab]`
    pub(crate) logits: Tensor,
    pub(crate) greedy: Vec<TokenId>,
    /// `hidden`, `attn`, `router`, `final` of short prompts.
    pub(crate) inner: BTreeMap<String, Tensor>,
}

/// Reads `NAME.safetensors`: every prompt's tensors, in order.
pub(crate) fn prompts(name: &str) -> Vec<Prompt> {
    let bytes = std::fs::read(golden(&format!("{name}.safetensors"))).unwrap();
    let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header_len]).unwrap();
    let data = &bytes[8 + header_len..];
    let mut prompts: BTreeMap<usize, BTreeMap<String, Tensor>> = BTreeMap::new();
    for (key, entry) in header.as_object().unwrap().iter().filter(|(key, _)| *key != "__metadata__") {
        let (index, what) = key[1..].split_once('.').unwrap();
        let numbers = |field: &str| {
            let values = entry[field].as_array().unwrap().iter();
            values.map(|n| n.as_u64().unwrap() as usize).collect::<Vec<_>>()
        };
        let range = numbers("data_offsets");
        let tensor = Tensor { shape: numbers("shape"), bytes: data[range[0]..range[1]].to_vec() };
        prompts.entry(index.parse().unwrap()).or_default().insert(what.to_owned(), tensor);
    }
    let prompt = |mut tensors: BTreeMap<String, Tensor>| Prompt {
        ids: tensors.remove("ids").unwrap().tokens(),
        positions: tensors.remove("positions").unwrap().indices(),
        logits: tensors.remove("logits").unwrap(),
        greedy: tensors.remove("greedy").unwrap().tokens(),
        inner: {
            tensors.remove("greedy_margin");
            tensors
        },
    };
    prompts.into_values().map(prompt).collect()
}
