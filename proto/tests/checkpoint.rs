//! Damaged checkpoints are refused, and the message names the file and the tensor.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests fail by panicking")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use phalanx_proto::checkpoint::{Checkpoint, CheckpointError};
use serde_json::{Value, json};

/// The file of the copied checkpoint that the tests damage; it holds dense tensors and packed ones.
const FILE: &str = "model-00001-of-00001.safetensors";
const NORM: &str = "model.layers.2.input_layernorm.weight";

/// A copy of `tiny-ragged` to damage.
struct Copy(PathBuf);

impl Copy {
    fn new(test: &str) -> Self {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/golden/tiny-ragged");
        let to = Path::new(env!("CARGO_TARGET_TMPDIR")).join(test);
        fs::create_dir_all(&to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            fs::write(to.join(entry.file_name()), fs::read(entry.path()).unwrap()).unwrap();
        }
        Self(to)
    }

    fn file(&self) -> PathBuf {
        self.0.join(FILE)
    }

    /// Changes the JSON text of the damaged file's header.
    fn edit_header_text(&self, edit: impl FnOnce(String) -> String) {
        let bytes = fs::read(self.file()).unwrap();
        let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = edit(String::from_utf8(bytes[8..8 + len].to_vec()).unwrap());
        let damaged = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes[8 + len..]].concat();
        fs::write(self.file(), damaged).unwrap();
    }

    fn edit_header(&self, edit: impl FnOnce(&mut Value)) {
        self.edit_header_text(|text| {
            let mut header = serde_json::from_str(&text).unwrap();
            edit(&mut header);
            header.to_string()
        });
    }

    fn edit_json(&self, name: &str, edit: impl FnOnce(&mut Value)) {
        let path = self.0.join(name);
        let mut value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        edit(&mut value);
        fs::write(path, value.to_string()).unwrap();
    }

    /// Why it is refused, by opening or by looking at its length.
    fn refusal(&self) -> CheckpointError {
        Checkpoint::open(&self.0).and_then(|checkpoint| checkpoint.check_complete()).expect_err("must be refused")
    }

    /// Asserts that the refusal names `file` and says `what`.
    fn is_refused(&self, file: &str, what: &str) {
        let message = self.refusal().to_string();
        let path = self.0.join(file).display().to_string();
        assert!(message.starts_with(&path) && message.contains(what), "{message}");
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn an_undamaged_copy_is_accepted() {
    let copy = Copy::new("undamaged");
    let checkpoint = Checkpoint::open(&copy.0).unwrap();
    checkpoint.check_complete().unwrap();
    assert_eq!(checkpoint.files.len(), 2);
    assert_eq!(checkpoint.eos_token_ids, [975, 972, 985]);
}

#[test]
fn a_truncated_file_is_refused_with_the_tensor_that_lost_its_end() {
    let copy = Copy::new("truncated");
    let len = fs::metadata(copy.file()).unwrap().len();
    fs::File::options().write(true).open(copy.file()).unwrap().set_len(len - 1).unwrap();
    assert!(matches!(copy.refusal(), CheckpointError::Truncated { .. }));
    copy.is_refused(FILE, "truncated: tensor model.layers.2.mlp.experts.gate_up_proj_scales ends at byte");
}

#[test]
fn a_file_cut_within_its_header_is_refused() {
    let copy = Copy::new("cut-header");
    for len in [100, 7, 0] {
        fs::File::options().write(true).open(copy.file()).unwrap().set_len(len).unwrap();
        assert!(matches!(copy.refusal(), CheckpointError::Header { .. }));
        copy.is_refused(FILE, if len < 8 { "too few for a header" } else { "in a file of 100" });
    }
}

#[test]
fn a_missing_tensor_is_refused_with_the_file_that_the_index_names() {
    let copy = Copy::new("missing");
    copy.edit_header(|header| drop(header.as_object_mut().unwrap().remove(NORM)));
    copy.is_refused(FILE, &format!("tensor {NORM} is missing"));
}

#[test]
fn a_tensor_that_the_index_does_not_name_is_missing_from_the_index() {
    let copy = Copy::new("unindexed");
    copy.edit_json("model.safetensors.index.json", |index| {
        index["weight_map"].as_object_mut().unwrap().remove(NORM);
    });
    copy.is_refused("model.safetensors.index.json", &format!("tensor {NORM} is missing"));
}

#[test]
fn a_missing_file_is_refused() {
    let copy = Copy::new("missing-file");
    fs::remove_file(copy.file()).unwrap();
    copy.is_refused(FILE, "No such file");
}

#[test]
fn a_wrong_shape_is_refused() {
    let copy = Copy::new("shape");
    copy.edit_header(|header| header[NORM]["shape"] = json!([80, 2]));
    copy.is_refused(FILE, &format!("tensor {NORM} is BF16 [80, 2], expected BF16, F16 or F32 [160]"));
}

#[test]
fn a_wrong_type_is_refused() {
    let copy = Copy::new("dtype");
    copy.edit_header(|header| {
        header[NORM]["dtype"] = json!("U8");
        header[NORM]["shape"] = json!([320]);
    });
    copy.is_refused(FILE, &format!("tensor {NORM} is U8 [320], expected BF16, F16 or F32 [160]"));
    let copy = Copy::new("dtype-unknown");
    copy.edit_header(|header| header[NORM]["dtype"] = json!("I64"));
    copy.is_refused(FILE, &format!("tensor {NORM}: unknown variant `I64`"));
}

#[test]
fn a_shape_that_disagrees_with_the_bytes_is_refused() {
    for (test, shape) in [("disagree", json!([161])), ("overflow", json!([u64::MAX, u64::MAX, u64::MAX]))] {
        let copy = Copy::new(test);
        copy.edit_header(|header| header[NORM]["shape"] = shape);
        copy.is_refused(FILE, &format!("tensor {NORM}: shape"));
    }
    let copy = Copy::new("backwards");
    copy.edit_header(|header| header[NORM]["data_offsets"] = json!([320, 0]));
    copy.is_refused(FILE, &format!("tensor {NORM}: shape"));
}

#[test]
fn overlapping_tensors_are_refused() {
    let copy = Copy::new("overlap");
    copy.edit_header(|header| {
        header[NORM]["data_offsets"] = header["model.layers.2.post_attention_layernorm.weight"]["data_offsets"].clone();
    });
    copy.is_refused(FILE, "overlap");
    copy.is_refused(FILE, NORM);
}

#[test]
fn a_tensor_that_stands_twice_is_refused() {
    let copy = Copy::new("twice");
    let empty = format!(r#"{{"{NORM}":{{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}},"#);
    copy.edit_header_text(|text| text.replacen('{', &empty, 1));
    copy.is_refused(FILE, &format!("tensor {NORM} is there twice"));
}

#[test]
fn a_header_that_is_no_json_or_too_long_is_refused() {
    let copy = Copy::new("json");
    copy.edit_header_text(|text| text.replacen('{', "[", 1));
    assert!(matches!(copy.refusal(), CheckpointError::Json { .. }));
    copy.is_refused(FILE, "line 1");
    let mut bytes = fs::read(copy.file()).unwrap();
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(copy.file(), bytes).unwrap();
    copy.is_refused(FILE, "header of 18446744073709551615 bytes");
}

#[test]
fn an_index_that_leaves_the_directory_is_refused() {
    for name in ["../tiny/model.safetensors", "/etc/passwd", "..", ""] {
        let copy = Copy::new("leaves");
        copy.edit_json("model.safetensors.index.json", |index| index["weight_map"][NORM] = json!(name));
        copy.is_refused("model.safetensors.index.json", "leaves the model's directory");
    }
}

#[test]
fn a_configuration_that_cannot_be_served_is_refused_with_its_field() {
    let cases = [
        ("model_type", json!("llama"), "model_type is llama, expected gpt_oss"),
        ("hidden_size", json!(100), "hidden_size is 100, expected a multiple of 32"),
        ("num_key_value_heads", json!(4), "num_key_value_heads is 4, expected a divisor"),
        ("num_experts_per_tok", json!(7), "num_experts_per_tok is 7, expected 1 to 6"),
        ("layer_types", json!(["full_attention"]), "layer_types is 1 entries, expected num_hidden_layers (3)"),
        ("vocab_size", json!(0), "vocab_size is 0"),
        ("head_dim", json!(33), "head_dim is 33, expected an even number"),
        ("rope_theta", json!(1.0), "rope_theta is 1, expected a number above 1"),
        ("rms_norm_eps", json!(-1.0), "rms_norm_eps is -1, expected a positive number"),
        ("quantization_config", json!(null), "quantization_config is absent"),
        ("vocab_size", json!("many"), "vocab_size: invalid type"),
        ("experts_per_token", json!(3), "experts_per_token is 3, expected the same as num_experts_per_tok (2)"),
    ];
    for (field, value, what) in cases {
        let copy = Copy::new("config");
        copy.edit_json("config.json", |config| {
            // The older name of the count would contradict the newer one.
            config.as_object_mut().unwrap().remove("experts_per_token");
            config[field] = value;
        });
        copy.is_refused("config.json", what);
    }
    let cases = [
        ("rope_type", json!("linear"), "rope_scaling.rope_type is linear, expected yarn"),
        ("factor", json!(0.0), "rope_scaling.factor is 0, expected a positive number"),
        ("beta_slow", json!(-1.0), "rope_scaling.beta_slow is -1, expected a positive number"),
    ];
    for (field, value, what) in cases {
        let copy = Copy::new("yarn");
        copy.edit_json("config.json", |config| config["rope_scaling"][field] = value);
        copy.is_refused("config.json", what);
    }
}

#[test]
fn a_configuration_of_another_size_is_refused_with_the_first_tensor_that_differs() {
    let copy = Copy::new("size");
    copy.edit_json("config.json", |config| config["vocab_size"] = json!(1004));
    copy.is_refused("", "tensor model.embed_tokens.weight is BF16 [1003, 160], expected BF16, F16 or F32 [1004, 160]");
}
