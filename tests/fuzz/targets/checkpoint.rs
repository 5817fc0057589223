//! A checkpoint's `config.json`, header and index: accepted with every range inside the file, or refused; never a panic.
//!
//! An input is the configuration, a zero byte, the header, and after a second zero byte the index, if there is one.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use phalanx_proto::{
    checkpoint::{Checkpoint, FileHeader, Headers, parse_index},
    geometry::Geometry,
    ids::Rank,
    layout::{Layout, Parallelism},
};

const FILE: &str = "model.safetensors";
/// Longest input; the configuration and the header of the corpus take 2 kB.
const MAX_INPUT: usize = 16 << 10;

fuzz_target!(|data: &[u8]| {
    if data.len() > MAX_INPUT {
        return;
    }
    let mut parts = data.splitn(3, |&byte| byte == 0);
    let mut part = || parts.next();
    let (Some(config), header) = (part(), part().unwrap_or_default()) else { return };
    let config = String::from_utf8_lossy(config).into_owned();
    let directory = Path::new("fuzzed");
    let weight_map = part().map(|text| parse_index(directory, &String::from_utf8_lossy(text)));
    if let Some(Ok(map)) = &weight_map {
        assert!(map.values().all(|file| !file.contains('/') && file != ".."), "an index leaves its directory");
    }
    let file = FileHeader { name: FILE.to_owned(), len: 1 << 20, json: header.to_vec() };
    let headers = Headers {
        generation_config: Some(config.clone()),
        weight_map: weight_map.and_then(Result::ok),
        files: vec![file],
        config,
    };
    if let Ok(checkpoint) = Checkpoint::from_headers(directory, &headers) {
        check_places(&checkpoint);
        check_ranks(&checkpoint.geometry, &checkpoint);
    }
});

/// What was accepted can be read: no two tensors share a byte, and a complete file holds them all.
fn check_places(checkpoint: &Checkpoint) {
    let mut places: Vec<_> = checkpoint.tensors.values().map(|entry| (entry.offset, entry.bytes)).collect();
    places.sort_unstable();
    for pair in places.windows(2) {
        assert!(pair[0].0 + pair[0].1 <= pair[1].0, "two accepted tensors overlap");
    }
    for entry in checkpoint.tensors.values() {
        let elements: usize = entry.shape.iter().product();
        assert_eq!((elements * entry.dtype.bytes()) as u64, entry.bytes);
    }
    if checkpoint.check_complete().is_ok() {
        assert!(places.iter().all(|(offset, bytes)| offset + bytes <= checkpoint.files[0].len));
    }
    checkpoint.bytes();
}

fn check_ranks(geometry: &Geometry, checkpoint: &Checkpoint) {
    geometry.parameters();
    for (world_size, parallelism) in [(1, Parallelism::Tensor), (3, Parallelism::Tensor), (2, Parallelism::Expert)] {
        let Ok(layout) = Layout::new(geometry, world_size, parallelism) else { continue };
        for rank in 0..world_size as u32 {
            for slice in layout.rank(geometry, Rank(rank)).tensors(geometry) {
                let fits = slice.ranges.iter().zip(&slice.shape).all(|(range, &len)| range.end <= len);
                assert!(fits, "rank {rank} of {world_size} reads outside of {}", slice.name);
                assert!(checkpoint.slice_bytes(&slice) <= checkpoint.bytes());
            }
        }
    }
}
