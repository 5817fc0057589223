//! What a safetensors header may say.

use std::{fmt, fs::File, io::Read, path::Path};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;

use super::{CheckpointError, Dtype, TensorEntry, header_error};

/// Longest header that is read, in bytes (safetensors' own limit).
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Longest name of a tensor, in bytes; the release's have up to 47.
const MAX_NAME_BYTES: usize = 256;
/// Most axes of a tensor; the release's have up to 4.
const MAX_AXES: usize = 8;
/// The header's one member that is no tensor.
const METADATA: &str = "__metadata__";

#[derive(Deserialize)]
struct RawTensor {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// Members of a JSON object in their order, unread: a map would keep the last of two with one name and hide the other,
/// and a tree of a hundred megabytes of small arrays would take gigabytes.
pub(super) struct Members(pub(super) Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

/// The file's length and its header's JSON.
pub(super) fn read(path: &Path, mut file: File) -> Result<(u64, Vec<u8>), CheckpointError> {
    let io = |source| CheckpointError::Io { path: path.to_owned(), source };
    let len = file.metadata().map_err(io)?.len();
    let mut prefix = [0; 8];
    file.read_exact(&mut prefix).map_err(|_| header_error(path, format!("{len} bytes are too few for a header")))?;
    let header_len = u64::from_le_bytes(prefix);
    if header_len > MAX_HEADER_BYTES || header_len + 8 > len {
        let problem = format!("header of {header_len} bytes in a file of {len} (limit {MAX_HEADER_BYTES})");
        return Err(header_error(path, problem));
    }
    let mut header = vec![0; header_len as usize];
    file.read_exact(&mut header).map_err(io)?;
    Ok((len, header))
}

/// The tensors that a header names, in its order; `file` is the file's index in the checkpoint.
pub(super) fn parse(path: &Path, header: &[u8], file: usize) -> Result<Vec<(String, TensorEntry)>, CheckpointError> {
    let json = |source| CheckpointError::Json { path: path.to_owned(), source };
    let Members(raw) = serde_json::from_slice(header).map_err(json)?;
    let mut entries: Vec<(String, TensorEntry)> = Vec::with_capacity(raw.len());
    for (name, value) in raw.into_iter().filter(|(name, _)| name != METADATA) {
        check_name(path, &name)?;
        let entry = parse_tensor(&value, header.len(), file)
            .map_err(|problem| header_error(path, format!("tensor {name}: {problem}")))?;
        entries.push((name, entry));
    }
    check_overlap(path, &entries)?;
    let mut names: Vec<&String> = entries.iter().map(|(name, _)| name).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(header_error(path, format!("tensor {} is there twice", twice[0])));
    }
    Ok(entries)
}

/// Names go into messages and logs, so only what prints in one piece is a name.
pub(super) fn check_name(path: &Path, name: &str) -> Result<(), CheckpointError> {
    if (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(());
    }
    let shown: String = name.chars().take(MAX_NAME_BYTES).collect();
    let problem = format!("tensor name {shown:?}: expected 1 to {MAX_NAME_BYTES} printable ASCII characters");
    Err(header_error(path, problem))
}

fn parse_tensor(value: &RawValue, header_len: usize, file: usize) -> Result<TensorEntry, String> {
    let RawTensor { dtype, shape, data_offsets: [start, end] } =
        serde_json::from_str(value.get()).map_err(|error| error.to_string())?;
    if shape.len() > MAX_AXES {
        return Err(format!("{} axes, expected at most {MAX_AXES}", shape.len()));
    }
    let elements = shape.iter().try_fold(1_u128, |product, &len| product.checked_mul(len as u128));
    let bytes = elements.and_then(|n| n.checked_mul(dtype.bytes() as u128));
    if bytes != end.checked_sub(start).map(u128::from) || end > u64::MAX / 2 {
        return Err(format!("shape {shape:?} of {dtype:?} and bytes {start}..{end} disagree"));
    }
    Ok(TensorEntry { dtype, shape, file, offset: 8 + header_len as u64 + start, bytes: end - start })
}

/// Tensors with bytes, by their place in the file.
fn by_offset(entries: &[(String, TensorEntry)]) -> Vec<&(String, TensorEntry)> {
    let mut sorted: Vec<_> = entries.iter().filter(|(_, entry)| entry.bytes > 0).collect();
    sorted.sort_unstable_by_key(|(_, entry)| entry.offset);
    sorted
}

fn check_overlap(path: &Path, entries: &[(String, TensorEntry)]) -> Result<(), CheckpointError> {
    for pair in by_offset(entries).windows(2) {
        if pair[0].1.offset + pair[0].1.bytes > pair[1].1.offset {
            return Err(header_error(path, format!("tensors {} and {} overlap", pair[0].0, pair[1].0)));
        }
    }
    Ok(())
}

/// Bytes in front of a tensor that belong to none, which the format forbids: something else could hide there.
pub(super) fn hole(path: &Path, header_len: usize, entries: &[(String, TensorEntry)]) -> Option<CheckpointError> {
    let mut next = 8 + header_len as u64;
    for (name, entry) in by_offset(entries) {
        if entry.offset != next {
            let problem = format!("tensor {name}: the bytes {next}..{} before it belong to no tensor", entry.offset);
            return Some(header_error(path, problem));
        }
        next = entry.offset + entry.bytes;
    }
    None
}
