//! Compiles the `.proto` files with protox, so that no `protoc` is needed.

use std::{env, error::Error, path::PathBuf};

use prost::Message;

const FILES: [&str; 2] = ["proto/phalanx/v1/inference.proto", "proto/phalanx/v1/cluster.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    std::fs::write(out.join("phalanx.v1.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().btree_map(".phalanx.v1.Sampling.logit_bias").compile_fds(descriptors)?;
    Ok(())
}
