//! Damage to the index and to the files of the directory.

use std::{fs, os::unix::fs::symlink, process::Command};

use phalanx_tests::root;
use serde_json::{Value, json};

use crate::damage::{
    CONFIG, Copy, FIRST_SHARD, INDEX, Kind, NORM,
    Of::{Nano, Ragged},
    SHARD, TOKENIZER, WHOLE,
};

pub(crate) const DIRECTORY_KINDS: &[Kind] = &[
    ("an index that climbs out", Ragged, |c| index(c, json!("../x.safetensors")), &[INDEX, NORM, "leaves"]),
    ("an index with an absolute name", Ragged, |c| index(c, json!("/etc/passwd")), &[INDEX, NORM, "leaves"]),
    ("an index into a folder", Ragged, |c| index(c, json!("sub/x.safetensors")), &[INDEX, NORM, "leaves"]),
    ("an index of a pickle", Ragged, |c| index(c, json!("pytorch_model.bin")), &[INDEX, NORM, "safetensors"]),
    ("an index of a number", Ragged, |c| index(c, json!(7)), &[INDEX, NORM, "string"]),
    (
        "an index of a missing file",
        Ragged,
        |c| index(c, json!("model-9.safetensors")),
        &["model-9.safetensors", "No such file"],
    ),
    (
        "an index without a tensor",
        Ragged,
        |c| {
            c.json(INDEX, |i| drop(i["weight_map"].as_object_mut().unwrap().remove(NORM)));
        },
        &[INDEX, NORM, "missing"],
    ),
    ("an index of nothing", Ragged, |c| c.write(INDEX, r#"{"weight_map": {}}"#), &[INDEX, "no tensor"]),
    ("an index without its map", Ragged, |c| c.write(INDEX, "{}"), &[INDEX, "weight_map"]),
    (
        "a tensor in another shard than the index says",
        Ragged,
        |c| index(c, json!(FIRST_SHARD)),
        &[SHARD, NORM, FIRST_SHARD],
    ),
    (
        "a tensor in two shards",
        Ragged,
        |c| {
            c.header(FIRST_SHARD, |h| h[NORM] = json!({"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}));
        },
        &[FIRST_SHARD, NORM, SHARD],
    ),
    ("a shard missing", Ragged, |c| c.remove(SHARD), &[SHARD, "No such file"]),
    (
        "a directory in place of the file",
        Nano,
        |c| {
            c.remove(WHOLE);
            fs::create_dir(c.0.join(WHOLE)).unwrap();
        },
        &[WHOLE, "not a regular file"],
    ),
    (
        "a directory in place of the tokenizer",
        Nano,
        |c| {
            c.remove(TOKENIZER);
            fs::create_dir(c.0.join(TOKENIZER)).unwrap();
        },
        &[TOKENIZER, "not a regular file"],
    ),
    (
        "a pipe in place of the file",
        Nano,
        |c| {
            c.remove(WHOLE);
            assert!(Command::new("mkfifo").arg(c.0.join(WHOLE)).status().unwrap().success());
        },
        &[WHOLE, "not a regular file"],
    ),
    (
        "a link out of the directory",
        Nano,
        |c| {
            c.remove(WHOLE);
            symlink(root().join("deploy/models/nano").join(WHOLE), c.0.join(WHOLE)).unwrap();
        },
        &[WHOLE, "outside"],
    ),
    (
        "a link to nowhere",
        Nano,
        |c| {
            c.remove(WHOLE);
            symlink("gone", c.0.join(WHOLE)).unwrap();
        },
        &[WHOLE, "No such file"],
    ),
    (
        "only a pickle",
        Nano,
        |c| {
            c.remove(WHOLE);
            c.write("pytorch_model.bin", [0; 64]);
        },
        &["pytorch_model.bin", "safetensors"],
    ),
    (
        "only a GGUF",
        Nano,
        |c| {
            c.remove(WHOLE);
            c.remove(CONFIG);
            c.write("nano.gguf", "GGUF");
        },
        &["nano.gguf", "safetensors"],
    ),
    ("no weights at all", Nano, |c| c.remove(WHOLE), &[WHOLE, "No such file"]),
];

fn index(c: &Copy, file: Value) {
    c.json(INDEX, |index| index["weight_map"][NORM] = file);
}
