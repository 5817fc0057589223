//! The same values stored as bf16, f16 or f32, in several files or in one, give the same logits.

use std::{fs, path::Path};

use half::{bf16, f16};
use phalanx_proto::{
    checkpoint::{Checkpoint, Dtype},
    ids::TokenId,
    layout::Parallelism,
};
use phalanx_worker::{backend::cpu::CpuBackend, backend::reference::ReferenceBackend, model::Model};

use crate::{Candidate, files::golden, group::run, session::Session};

/// Writes the ragged checkpoint as one file without an index, its dense values turned into `dtype` by `convert`.
fn rewrite(to: &Path, dtype: &str, convert: impl Fn(bf16) -> Vec<u8>) {
    let from = Checkpoint::open(&golden("tiny-ragged")).unwrap();
    let files: Vec<_> = from.files.iter().map(|file| fs::read(&file.path).unwrap()).collect();
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, entry) in &from.tensors {
        let bytes = &files[entry.file][entry.offset as usize..][..entry.bytes as usize];
        let start = data.len();
        let dtype = if entry.dtype == Dtype::BF16 {
            data.extend(bytes.as_chunks::<2>().0.iter().flat_map(|value| convert(bf16::from_le_bytes(*value))));
            dtype
        } else {
            data.extend(bytes);
            "U8"
        };
        let tensor = serde_json::json!({"dtype": dtype, "shape": entry.shape, "data_offsets": [start, data.len()]});
        header.insert(name.clone(), tensor);
    }
    let header = serde_json::Value::Object(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    fs::write(to.join("model.safetensors"), file).unwrap();
    fs::copy(golden("tiny-ragged").join("config.json"), to.join("config.json")).unwrap();
}

/// Logits of a short prompt on two ranks, so that slices are cut.
fn logits<B: Candidate>(checkpoint: &Path) -> Vec<f32> {
    let prompt: Vec<TokenId> = (0..9).map(|i| TokenId(i * 101)).collect();
    run(checkpoint, (2, Parallelism::Tensor), |model: Model<B>, end| {
        Session::new(model, end, &[prompt.len()], 16).prefill(0, &prompt, 16, &[0, 8])
    })
}

fn precisions_agree<B: Candidate>() {
    let folders: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let [wide, narrow, narrow_as_wide] = [0, 1, 2].map(|i| folders[i].path());
    rewrite(wide, "F32", |value| value.to_f32().to_le_bytes().to_vec());
    assert!(logits::<B>(wide) == logits::<B>(&golden("tiny-ragged")), "f32 differs from bf16");
    // Values too small for f16 change, so that f16 is compared with its own values in f32.
    rewrite(narrow, "F16", |value| f16::from_f32(value.to_f32()).to_le_bytes().to_vec());
    rewrite(narrow_as_wide, "F32", |value| f16::from_f32(value.to_f32()).to_f32().to_le_bytes().to_vec());
    assert!(logits::<B>(narrow) == logits::<B>(narrow_as_wide), "f16 differs from f32");
}

#[test]
fn precisions_of_the_same_values_agree_bit_for_bit() {
    precisions_agree::<ReferenceBackend>();
    precisions_agree::<CpuBackend>();
}
