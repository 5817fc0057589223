//! Damage to the headers of safetensors files.

use serde_json::json;

use crate::damage::{
    BLOCKS, Kind, NORM, OTHER_NORM,
    Of::{Nano, Ragged},
    SCALES, SHARD, WHOLE,
};

pub(crate) const HEADER_KINDS: &[Kind] = &[
    ("an empty file", Nano, |c| c.set_len(WHOLE, 0), &[WHOLE, "too few"]),
    ("a file of seven bytes", Nano, |c| c.set_len(WHOLE, 7), &[WHOLE, "too few"]),
    ("a header cut in its middle", Nano, |c| c.set_len(WHOLE, 100), &[WHOLE, "header of"]),
    ("tensors cut", Nano, |c| c.set_len(WHOLE, 7_000_000), &[WHOLE, "tensor", "truncated"]),
    ("one byte too many", Nano, |c| c.set_len(WHOLE, 7_329_137), &[WHOLE, "last tensor ends at"]),
    ("a header of 2^64 bytes", Nano, |c| c.first_bytes(WHOLE, [255; 8]), &[WHOLE, "18446744073709551615"]),
    (
        "a header over 100 MB",
        Nano,
        |c| {
            c.set_len(WHOLE, 200_000_000);
            c.first_bytes(WHOLE, 100_000_001_u64.to_le_bytes());
        },
        &[WHOLE, "limit 100000000"],
    ),
    ("a header of no bytes", Nano, |c| c.first_bytes(WHOLE, [0; 8]), &[WHOLE, "EOF"]),
    ("a header that is no JSON", Nano, |c| c.header_text(WHOLE, |t| t.replacen('{', "[", 1)), &[WHOLE, "line 1"]),
    ("a header that is a list", Nano, |c| c.header_text(WHOLE, |_| "[]".into()), &[WHOLE, "an object of tensors"]),
    (
        "a header nested 10,000 deep",
        Nano,
        |c| {
            c.header_text(WHOLE, |_| format!("{{\"a\":{}", "[".repeat(10_000)));
        },
        &[WHOLE, "line 1"],
    ),
    (
        "a header that is not UTF-8",
        Nano,
        |c| {
            let (header, data) = c.parts(WHOLE);
            let mut bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
            bytes[12] = 0xFF;
            c.write(WHOLE, bytes);
        },
        &[WHOLE, "line 1"],
    ),
    (
        "a tensor twice",
        Nano,
        |c| {
            let twin = format!(r#"{{"{NORM}":{{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}},"#);
            c.header_text(WHOLE, |t| t.replacen('{', &twin, 1));
        },
        &[WHOLE, NORM, "twice"],
    ),
    (
        "tensors that overlap",
        Nano,
        |c| {
            c.header(WHOLE, |h| h[NORM]["data_offsets"] = h[OTHER_NORM]["data_offsets"].clone());
        },
        &[WHOLE, NORM, "overlap"],
    ),
    (
        "a hole between tensors",
        Nano,
        |c| {
            c.header(WHOLE, |h| {
                for (_, tensor) in h.as_object_mut().unwrap().iter_mut().filter(|(name, _)| *name != "__metadata__") {
                    for at in 0..2 {
                        tensor["data_offsets"][at] = json!(tensor["data_offsets"][at].as_u64().unwrap() + 64);
                    }
                }
            });
        },
        &[WHOLE, "tensor", "belong to no tensor"],
    ),
    (
        "offsets behind the file's end",
        Ragged,
        |c| {
            c.header(SHARD, |h| h[NORM]["data_offsets"] = json!([1_u64 << 40, (1_u64 << 40) + 320]));
        },
        &[SHARD, "tensor"],
    ),
    (
        "offsets that run backwards",
        Nano,
        |c| {
            c.header(WHOLE, |h| h[NORM]["data_offsets"] = json!([384, 0]));
        },
        &[WHOLE, NORM, "disagree"],
    ),
    ("a negative offset", Nano, |c| c.header(WHOLE, |h| h[NORM]["data_offsets"] = json!([-1, 383])), &[WHOLE, NORM]),
    ("three offsets", Nano, |c| c.header(WHOLE, |h| h[NORM]["data_offsets"] = json!([0, 1, 2])), &[WHOLE, NORM]),
    (
        "a shape whose product overflows",
        Nano,
        |c| {
            c.header(WHOLE, |h| h[NORM]["shape"] = json!([u64::MAX, u64::MAX, u64::MAX]));
        },
        &[WHOLE, NORM, "shape"],
    ),
    (
        "a shape of a thousand axes",
        Nano,
        |c| {
            c.header(WHOLE, |h| h[NORM]["shape"] = json!(vec![1; 1000]));
        },
        &[WHOLE, NORM, "1000 axes"],
    ),
    ("a wrong shape", Nano, |c| c.header(WHOLE, |h| h[NORM]["shape"] = json!([96, 2])), &[WHOLE, NORM, "[96, 2]"]),
    (
        "a wrong element type",
        Nano,
        |c| {
            c.header(WHOLE, |h| (h[NORM]["dtype"], h[NORM]["shape"]) = (json!("U8"), json!([384])));
        },
        &[WHOLE, NORM, "U8 [384]"],
    ),
    ("an unknown element type", Nano, |c| c.header(WHOLE, |h| h[NORM]["dtype"] = json!("I64")), &[WHOLE, NORM, "I64"]),
    (
        "a tensor without a type",
        Nano,
        |c| {
            c.header(WHOLE, |h| drop(h[NORM].as_object_mut().unwrap().remove("dtype")));
        },
        &[WHOLE, NORM, "dtype"],
    ),
    (
        "a tensor that is missing",
        Nano,
        |c| {
            c.header(WHOLE, |h| drop(h.as_object_mut().unwrap().remove(NORM)));
        },
        &[WHOLE, NORM, "missing"],
    ),
    (
        "a name with control characters",
        Nano,
        |c| {
            c.header_text(WHOLE, |t| t.replacen(NORM, "model\\u001b[2J", 1));
        },
        &[WHOLE, "printable"],
    ),
    (
        "scales that do not match their blocks",
        Nano,
        |c| {
            c.header(WHOLE, |h| h[SCALES]["shape"] = json!([16, 128, 12]));
        },
        &[WHOLE, SCALES, "[16, 128, 12]"],
    ),
    (
        "blocks of another size",
        Nano,
        |c| {
            c.header(WHOLE, |h| h[BLOCKS]["shape"] = json!([16, 256, 12, 8]));
        },
        &[WHOLE, BLOCKS, "[16, 256, 12, 8]"],
    ),
];
