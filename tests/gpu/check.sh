#!/usr/bin/env bash
# Checks the CUDA backend on this machine's first GPU, without a network, with what tests/gpu/pack.sh built:
#   tests/gpu/check.sh [FOLDER]
# FOLDER (target/gpu) has the programs and gets the logs and report.json. Ends with 0 if everything passed.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=$(realpath -m "${1:-target/gpu}")
root=$PWD
export PHALANX_TEST_GPU=1 CARGO_MANIFEST_DIR=$root/worker XDG_CACHE_HOME=${XDG_CACHE_HOME:-$out/cache}
logs=${OUT:-$out/logs}
mkdir -p "$logs"
results=()
failed=0

# step NAME SECONDS COMMAND …: runs it, keeps its output, remembers how it ended.
step() {
    local name=$1 limit=$2 began=$SECONDS code
    shift 2
    printf '== %s\n' "$name"
    timeout "$limit" "$@" >"$logs/$name.log" 2>&1
    code=$?
    [ $code = 0 ] || { failed=1; tail -n 15 "$logs/$name.log"; }
    printf '   %s after %s s\n' "$([ $code = 0 ] && echo passed || echo "FAILED ($code)")" $((SECONDS - began))
    results+=("{\"step\": \"$name\", \"exit\": $code, \"seconds\": $((SECONDS - began))}")
}

# One question to a server on this GPU: the answer must be nano's.
ask() {
    local pid url answer
    "$out/phalanx" serve --backend cuda -tp 1 --port 0 >"$logs/serve.out" 2>"$logs/serve.err" &
    pid=$!
    while ! grep -q '^try: ' "$logs/serve.out"; do
        kill -0 $pid 2>/dev/null || { cat "$logs/serve.err"; return 1; }
        sleep 0.2
    done
    url=$(grep -o 'http://[^ /]*' "$logs/serve.out" | head -1)
    answer=$(curl -sS "$url/v1/chat/completions" -H 'content-type: application/json' \
        -d '{"temperature": 0, "messages": [{"role": "user", "content": "What is the capital of France?"}]}')
    kill -TERM $pid
    wait $pid
    echo "$answer"
    grep -q 'The capital of France is Paris' <<<"$answer"
}

step doctor 60 "$out/phalanx" doctor
step kernels 240 "$out/kernels" --test-threads 1 --skip mistakes --skip all_reduce
step golden 240 "$out/golden" --test-threads 1 cuda::
export -f ask
export out logs
step serve 120 bash -c ask
step bench 120 "$out/phalanx" bench --engine nano --backend cuda -tp 1 --prompt 64 --generate 64 --concurrency 1,4,16
if command -v compute-sanitizer >/dev/null; then
    nano=cuda::cuda_gives_nanos_golden_answers
    step memcheck 240 compute-sanitizer --error-exitcode 9 --tool memcheck "$out/golden" --exact "$nano"
    step racecheck 240 compute-sanitizer --error-exitcode 9 --tool racecheck "$out/golden" --exact "$nano"
fi
(IFS=,; printf '[%s]\n' "${results[*]}") >"$logs/report.json"
exit $failed
