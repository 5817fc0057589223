//! Damage to tensors, tokenizer and configuration.

use serde_json::json;

use crate::damage::{CONFIG, GENERATION, Kind, NORM, Of::Nano, SCALES, TOKENIZER, WHOLE};

pub(crate) const CONTENT_KINDS: &[Kind] = &[
    (
        "a scale that is not a number",
        Nano,
        |c| c.tensor_bytes(WHOLE, SCALES, 77, &[255]),
        &[WHOLE, SCALES, "not a number"],
    ),
    (
        "a weight that is not a number",
        Nano,
        |c| c.tensor_bytes(WHOLE, NORM, 6, &[0xC0, 0x7F]),
        &[WHOLE, NORM, "not a number"],
    ),
    (
        "an infinite weight",
        Nano,
        |c| c.tensor_bytes(WHOLE, "lm_head.weight", 4000, &[0x80, 0xFF]),
        &[WHOLE, "lm_head.weight", "infinite"],
    ),
    ("no tokenizer", Nano, |c| c.remove(TOKENIZER), &[TOKENIZER]),
    ("half a tokenizer", Nano, |c| c.write(TOKENIZER, &c.text(TOKENIZER)[..70_000]), &[TOKENIZER]),
    (
        "a tokenizer of another kind",
        Nano,
        |c| c.json(TOKENIZER, |t| t["model"]["type"] = json!("Unigram")),
        &[TOKENIZER, "Unigram"],
    ),
    (
        "a tokenizer without <|call|>",
        Nano,
        |c| {
            c.json(TOKENIZER, |t| t["added_tokens"].as_array_mut().unwrap().retain(|t| t["content"] != "<|call|>"));
        },
        &["tokenizer", "<|call|>"],
    ),
    (
        "a tokenizer with more tokens than rows",
        Nano,
        |c| {
            c.json(TOKENIZER, |t| t["added_tokens"][0]["id"] = json!(3072));
        },
        &[TOKENIZER, "3072"],
    ),
    (
        "a merge of no token",
        Nano,
        |c| c.json(TOKENIZER, |t| t["model"]["merges"][0] = json!(["zqzq", "qzqz"])),
        &[TOKENIZER, "merge"],
    ),
    (
        "an end token outside of the vocabulary",
        Nano,
        |c| {
            c.json(GENERATION, |g| g["eos_token_id"] = json!([3055, 99_999]));
        },
        &[GENERATION, "eos_token_id", "99999"],
    ),
    (
        "an end token that is no token",
        Nano,
        |c| {
            c.json(GENERATION, |g| g["eos_token_id"] = json!("<|return|>"));
        },
        &[GENERATION, "eos_token_id"],
    ),
];

pub(crate) const CONFIG_KINDS: &[Kind] = &[
    ("no configuration", Nano, |c| c.remove(CONFIG), &[CONFIG]),
    ("an empty configuration", Nano, |c| c.write(CONFIG, ""), &[CONFIG, "EOF"]),
    ("a configuration that is a list", Nano, |c| c.write(CONFIG, "[]"), &[CONFIG, "map"]),
    ("a configuration of 2 MB", Nano, |c| c.write(CONFIG, " ".repeat(2 << 20)), &[CONFIG, "longer than"]),
    ("another architecture", Nano, |c| c.config("model_type", json!("llama")), &[CONFIG, "model_type", "llama"]),
    (
        "a field missing",
        Nano,
        |c| c.json(CONFIG, |v| drop(v.as_object_mut().unwrap().remove("head_dim"))),
        &[CONFIG, "head_dim"],
    ),
    ("a number as text", Nano, |c| c.config("vocab_size", json!("many")), &[CONFIG, "vocab_size"]),
    ("a negative number", Nano, |c| c.config("sliding_window", json!(-1)), &[CONFIG, "sliding_window"]),
    ("a size of nothing", Nano, |c| c.config("num_key_value_heads", json!(0)), &[CONFIG, "num_key_value_heads"]),
    (
        "a billion layers",
        Nano,
        |c| {
            c.json(CONFIG, |v| drop(v.as_object_mut().unwrap().remove("layer_types")));
            c.config("num_hidden_layers", json!(1_000_000_000));
        },
        &[CONFIG, "1000000000"],
    ),
    (
        "fewer layers than tensors",
        Nano,
        |c| {
            c.config("num_hidden_layers", json!(3));
            c.json(CONFIG, |v| drop(v["layer_types"].as_array_mut().unwrap().pop()));
        },
        &[WHOLE, "model.layers.3", "num_hidden_layers is 3"],
    ),
    ("layer types for another depth", Nano, |c| c.config("num_hidden_layers", json!(5)), &[CONFIG, "layer_types"]),
    (
        "an unknown layer type",
        Nano,
        |c| c.config("layer_types", json!(["linear_attention"])),
        &[CONFIG, "layer_types", "linear_attention"],
    ),
    ("heads that do not divide", Nano, |c| c.config("num_key_value_heads", json!(3)), &[CONFIG, "num_key_value_heads"]),
    (
        "sizes of another model",
        Nano,
        |c| c.config("hidden_size", json!(256)),
        &[WHOLE, "model.embed_tokens.weight", "256"],
    ),
    ("a vocabulary of another model", Nano, |c| c.config("vocab_size", json!(201_088)), &[WHOLE, "tensor", "201088"]),
    (
        "more experts a token than there are",
        Nano,
        |c| {
            c.config("num_experts_per_tok", json!(17));
            c.config("experts_per_token", json!(17));
        },
        &[CONFIG, "num_experts_per_tok"],
    ),
    ("two counts of experts", Nano, |c| c.config("experts_per_token", json!(2)), &[CONFIG, "experts_per_token"]),
    (
        "a rope base that is not a number",
        Nano,
        |c| {
            c.write(CONFIG, c.text(CONFIG).replace("\"rope_theta\": 150000", "\"rope_theta\": NaN"));
        },
        &[CONFIG, "line"],
    ),
    (
        "a rope base that is infinite",
        Nano,
        |c| {
            c.write(CONFIG, c.text(CONFIG).replace("\"rope_theta\": 150000", "\"rope_theta\": 1e999"));
        },
        &[CONFIG, "line"],
    ),
    ("a rope factor of null", Nano, |c| c.config("rope_scaling.factor", json!(null)), &[CONFIG, "rope_scaling.factor"]),
    ("a rope factor of zero", Nano, |c| c.config("rope_scaling.factor", json!(0.0)), &[CONFIG, "rope_scaling.factor"]),
    (
        "rope ramps the wrong way round",
        Nano,
        |c| c.config("rope_scaling.beta_fast", json!(0.5)),
        &[CONFIG, "rope_scaling.beta_fast"],
    ),
    ("a vanishing epsilon", Nano, |c| c.config("rms_norm_eps", json!(1e-60)), &[CONFIG, "rms_norm_eps"]),
    (
        "another quantization",
        Nano,
        |c| c.config("quantization_config.quant_method", json!("awq")),
        &[CONFIG, "quantization_config", "awq"],
    ),
];
