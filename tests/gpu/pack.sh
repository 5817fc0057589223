#!/usr/bin/env bash
# Builds what tests/gpu/check.sh runs and gathers it in target/gpu, so that it can be brought to a machine with a GPU that has
# neither Rust nor a network.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=target/gpu
mkdir -p "$out"
cargo build --release --locked
# The path of a test's program is the last thing that cargo says of it.
program() {
    cargo test --release --locked -p phalanx-worker --test "$1" --no-run --message-format=json |
        python3 -c 'import json, sys
paths = [json.loads(line).get("executable") for line in sys.stdin if line.startswith("{")]
print([path for path in paths if path][-1])'
}
directory=${CARGO_TARGET_DIR:-target}
strip -o "$out/phalanx" "$directory/release/phalanx"
strip -o "$out/kernels" "$(program cuda)"
strip -o "$out/golden" "$(program golden)"
ls -l "$out"
