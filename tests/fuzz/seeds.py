#!/usr/bin/env python3
"""Writes the first inputs of each fuzz target to tests/fuzz/corpus. Run again after a change of a format."""

import json
import pathlib
import struct

HERE = pathlib.Path(__file__).parent
NANO = HERE / "../../tests/data/golden/nano.jsonl"


def write(target, name, data):
    folder = HERE / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


# --- checkpoint: config, NUL, header[, NUL, index] ---

CONFIG = {
    "model_type": "gpt_oss", "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "vocab_size": 16,
    "sliding_window": 4, "max_position_embeddings": 64, "num_hidden_layers": 1, "layer_types": ["full_attention"],
    "rms_norm_eps": 1e-5, "rope_theta": 150000, "eos_token_id": [3, 4],
    "quantization_config": {"quant_method": "mxfp4"},
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                     "original_max_position_embeddings": 32, "truncate": False},
}
LAYER = {
    "input_layernorm.weight": [32], "self_attn.q_proj.weight": [4, 32], "self_attn.q_proj.bias": [4],
    "self_attn.k_proj.weight": [2, 32], "self_attn.k_proj.bias": [2], "self_attn.v_proj.weight": [2, 32],
    "self_attn.v_proj.bias": [2], "self_attn.sinks": [2], "self_attn.o_proj.weight": [32, 4],
    "self_attn.o_proj.bias": [32], "post_attention_layernorm.weight": [32], "mlp.router.weight": [2, 32],
    "mlp.router.bias": [2], "mlp.experts.gate_up_proj_blocks": [2, 64, 1, 16],
    "mlp.experts.gate_up_proj_scales": [2, 64, 1], "mlp.experts.gate_up_proj_bias": [2, 64],
    "mlp.experts.down_proj_blocks": [2, 32, 1, 16], "mlp.experts.down_proj_scales": [2, 32, 1],
    "mlp.experts.down_proj_bias": [2, 32],
}
TOP = {"lm_head.weight": [16, 32], "model.embed_tokens.weight": [16, 32], "model.norm.weight": [32]}


def header():
    shapes = TOP | {f"model.layers.0.{name}": shape for name, shape in LAYER.items()}
    out, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        dtype, size = ("U8", 1) if name.endswith(("blocks", "scales")) else ("BF16", 2)
        for axis in shape:
            size *= axis
        out[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return out


def checkpoint():
    text = lambda value: json.dumps(value, separators=(",", ":")).encode()
    whole = text(CONFIG) + b"\0" + text(header())
    write("checkpoint", "whole", whole)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: "model.safetensors" for name in header() if name[0] != "_"}}
    write("checkpoint", "indexed", whole + b"\0" + text(index))
    small = {"weight_map": {"a": "../x.safetensors", "b": "m.safetensors"}}
    write("checkpoint", "climbing", text({"model_type": "gpt_oss"}) + b"\0" + b"{}" + b"\0" + text(small))
    twisted = dict(header())
    twisted["model.norm.weight"] = {"dtype": "F32", "shape": [2**63, 2**63, 8], "data_offsets": [2**62, 2**63]}
    write("checkpoint", "overflow", text(CONFIG) + b"\0" + text(twisted))
    (HERE / "checkpoint.dict").write_text("".join(
        f'"\\"{word}\\""\n' for word in [*CONFIG, *CONFIG["rope_scaling"], *header(), "dtype", "shape", "data_offsets",
                                        "BF16", "F16", "F32", "U8", "weight_map", "model.safetensors"]))


# --- harmony: a little program (see the target) ---

START, END, MESSAGE, CHANNEL, CONSTRAIN, RETURN, CALL = range(7)
WORD = {word: 7 + at for at, word in enumerate([
    "assistant", "user", "developer", "system", "analysis", "final", "commentary", "thoughts", " to=",
    " to=functions.f", "to=functions.get_weather", "functions.g", "functions", ".", "json", " json", " code",
    "<|constrain|>", " ", "\n", "  ", "?", "{}", "get_weather"])}
MARKER, RAW, ANY = 31, 32, 33


def harmony():
    answer = [CHANNEL, WORD["final"], MESSAGE, MARKER, MARKER, RETURN]
    thought = [CHANNEL, WORD["analysis"], MESSAGE, MARKER, END]
    call = [CHANNEL, WORD["commentary"], WORD[" to=functions.f"], WORD[" "], CONSTRAIN, WORD["json"], MESSAGE,
            WORD["{}"], MARKER, CALL]
    start = [START, WORD["assistant"]]
    programs = {
        "answer": answer, "thought": thought + start + answer, "call": thought + start + call,
        "unclosed": [CHANNEL, WORD["final"], MARKER], "no-message": start + [WORD["final"], MARKER, END],
        "doubled": start + start + answer, "glued": [WORD["assistant"], WORD["analysis"], MESSAGE, MARKER],
        "to-late": [CHANNEL, WORD["commentary"], WORD["json"], WORD["to=functions.get_weather"], MESSAGE, MARKER, CALL],
        "constrained": [CHANNEL, WORD["final"], CONSTRAIN, WORD["json"], MESSAGE, WORD["{}"], RETURN],
        "channel-in-content": [CHANNEL, WORD["final"], MESSAGE, MARKER, CHANNEL, WORD["analysis"], MESSAGE, MARKER],
        "bytes": [CHANNEL, WORD["final"], MESSAGE, RAW, 0xF0, RAW, 0x9F, MARKER, RAW, 0xE2, END],
        "ids": [ANY, 0xF1, 0x0B, ANY, 0xFF, 0xFF, MARKER, ANY, 0x10, 0x00],
        "prose": [MARKER, WORD[" "], MARKER, END, MARKER, WORD["\n"], START, WORD["user"], MARKER],
        "roles": [START, WORD["system"], MESSAGE, MARKER, END, START, WORD["developer"], MESSAGE, MARKER, END],
    }
    for name, program in programs.items():
        write("harmony", name, bytes(program))


# --- request: the endpoint, then the body ---

def request():
    lines = [json.loads(line)["request"] for line in NANO.read_text().splitlines()]
    tools = [{"type": "function", "function": {"name": "get_weather", "description": "w", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Seoul"]}, "days": {
            "type": ["integer", "null"], "default": 1}}, "required": ["city"]}}}]
    called = {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{\"city\":\"Paris\"}"}}]}
    chats = {
        "plain": lines[0], "korean": next(r for r in lines if any(ord(c) > 0xAC00 for c in json.dumps(r, ensure_ascii=False))),
        "everything": {
            "model": "nano", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [
                {"type": "text", "text": "a"}]}, called, {"role": "tool", "tool_call_id": "c1", "content": "{}"}],
            "tools": tools, "tool_choice": "auto", "parallel_tool_calls": False, "temperature": 0.5, "top_p": 0.9,
            "n": 2, "stop": ["a", "b"], "max_completion_tokens": 7, "logprobs": True, "top_logprobs": 3, "seed": -1,
            "stream": True, "stream_options": {"include_usage": True}, "logit_bias": {"5": -100}, "user": "u",
            "presence_penalty": 1, "frequency_penalty": -1, "reasoning_effort": "high", "response_format": {"type": "text"}},
        "more": {"messages": [{"role": "developer", "content": "<|end|>"}, {"role": "user", "content": "x"}], "top_k": 3,
                 "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1, "ignore_eos": True, "stop_token_ids": [1],
                 "return_token_ids": True, "priority": -3, "cache_salt": "z", "profile": "p", "include_reasoning": False,
                 "tool_choice": {"type": "function", "function": {"name": "f"}}, "functions": []},
    }
    text = lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    for name, body in chats.items():
        write("request", f"chat-{name}", b"\0" + text(body))
    prompts = {"text": "The capital", "texts": ["a", "b"], "ids": [1, 2, 3], "lists": [[1], [2, 3]]}
    for name, prompt in prompts.items():
        write("request", f"completion-{name}", b"\1" + text({"prompt": prompt, "max_tokens": 0, "echo": True,
                                                             "logprobs": 2, "n": 2, "best_of": 2, "suffix": ""}))
    write("request", "tokenize", b"\2" + text({"prompt": "<|start|>a", "add_special_tokens": False}))
    write("request", "tokenize-chat", b"\2" + text({**chats["plain"], "return_token_strs": True}))
    write("request", "detokenize", b"\3" + text({"tokens": [1, 2, 3071]}))
    write("request", "deep", b"\0" + b'{"messages":' + b"[" * 200)
    words = sorted({key for body in chats.values() for key in body} | {
        "role", "content", "type", "text", "function", "name", "arguments", "parameters", "properties", "required",
        "tool_calls", "tool_call_id", "assistant", "user", "system", "developer", "tool", "prompt", "echo", "suffix",
        "best_of", "tokens", "anyOf", "oneOf", "$ref", "$defs", "items", "enum", "default", "description", "reasoning",
        "reasoning_content", "image_url", "refusal", "<|start|>", "<|message|>"})
    (HERE / "request.dict").write_text("".join(f'"\\"{word}\\""\n' for word in words))


# --- plan: a Form and plans as protobuf, each with its length before it ---

def varint(value):
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def number(field, value):
    return varint(field << 3) + varint(value)


def real(field, value):
    return varint(field << 3 | 5) + struct.pack("<f", value)


def block(field, data):
    return varint(field << 3 | 2) + varint(len(data)) + data


def packed(field, values):
    return block(field, b"".join(map(varint, values)))


def sized(data):
    return varint(len(data)) + data


def admit(sequence, tokens, prompt=None, sampling=b"", stops=()):
    return block(4, number(1, sequence) + packed(2, tokens) + number(3, prompt or len(tokens)) + block(4, sampling)
                 + packed(5, stops))


def piece(sequence, first, count, blocks=(), sample=True):
    return block(5, number(1, sequence) + number(2, first) + number(3, count) + packed(4, blocks) + packed(5, blocks)
                 + number(6, int(sample)))


def plan():
    form = sized(number(1, 3) + number(2, 9) + block(3, b"r") + block(4, number(1, 4) + number(2, 8) + number(3, 8))
                 + number(5, 64) + number(6, 8))
    head = lambda step, *rest: sized(number(1, 3) + number(2, step) + b"".join(rest))
    greedy = real(1, 0.0)
    warm = real(1, 1.5) + real(2, 0.9) + number(3, 5) + real(4, 0.05) + number(11, 7) + number(13, 3)
    bent = (real(5, 1.0) + real(6, -1.0) + real(7, 1.3) + block(8, number(1, 5) + real(2, -100.0)) + number(9, 2)
            + number(14, 2) + number(12, 1))
    write("plan", "one", form + head(1, admit(1, [1, 2, 3], sampling=greedy), piece(1, 0, 3, [0]))
          + head(2, piece(1, 3, 1)) + head(3, packed(3, [1])))
    write("plan", "two", form + head(1, admit(1, [1, 2], sampling=warm), admit(2, [4] * 9, sampling=bent, stops=[3]),
                                     piece(1, 0, 2, [0]), piece(2, 0, 5, [1, 2], False))
          + head(2, piece(1, 2, 1), piece(2, 5, 4, [3])) + head(3, packed(3, [1]), piece(2, 9, 1)))
    write("plan", "resumed", form + head(1, admit(7, [1, 2, 3, 4], 2, warm + bent), piece(7, 0, 4, [0])))
    write("plan", "wrong", form + head(1, admit(1, [1, 99]), piece(2, 4294967295, 4294967295)))
    write("plan", "top-p", form + head(1, admit(1, [5], sampling=real(2, 0.5) + number(13, 20)), piece(1, 0, 1, [0])))


if __name__ == "__main__":
    checkpoint(), harmony(), request(), plan()
