#!/usr/bin/env python3
"""Writes tiny random GGUF models and what transformers reads from them.

Needs gguf 0.19, torch 2.15, transformers 5.23.
  make_gguf_goldens.py OUT           writes OUT/gguf-{llama,qwen2,qwen3}.gguf, each with a .json beside it
  make_gguf_goldens.py --of FILE     writes FILE with the ending .json for a GGUF file that is there already
The JSON holds, per tensor of transformers' state dict, shape and 64-bit FNV-1a of the f32 bytes, and the fields of the
configuration that transformers derives.
"""
import json
import pathlib
import sys

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind, GGUFReader, GGUFWriter
from gguf.quants import quantize
from transformers import AutoModelForCausalLM

FIELDS = ["model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"]
SHAPE = {"layers": 2, "heads": 4, "kv_heads": 2, "width": 32, "inner": 64, "vocabulary": 64}

# transformers 5.23 does not read attention.key_length for this architecture, and takes its default.
QWEN3_HEAD = 128


def fnv1a(data):
    """FNV-1a over 64-bit little-endian words, the last one padded with zeros."""
    words = np.frombuffer(data + bytes(-len(data) % 8), "<u8").tolist()
    value = 0xCBF29CE484222325
    for word in words:
        value = ((value ^ word) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def describe(path):
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = model.config.to_dict()
    tied = config["tie_word_embeddings"]
    tensors = {
        name: {"shape": list(value.shape), "fnv1a": fnv1a(value.detach().float().contiguous().numpy().tobytes())}
        for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")
    }
    fields = {name: config[name] for name in FIELDS}
    fields["rope_theta"] = model.config.rope_parameters["rope_theta"]
    path.with_suffix(".json").write_text(json.dumps({"config": fields, "tensors": tensors}, indent=1) + "\n")


def tensors(architecture, random):
    """GGUF names, dtypes and values, rows of queries and keys in whatever order."""
    head = QWEN3_HEAD if architecture == "qwen3" else SHAPE["width"] // SHAPE["heads"]
    width, inner, vocabulary = SHAPE["width"], SHAPE["inner"], SHAPE["vocabulary"]
    q, kv = SHAPE["heads"] * head, SHAPE["kv_heads"] * head

    def make(*shape):
        return random.normal(0, 0.3, shape).astype(np.float32)

    yield "token_embd.weight", Kind.Q8_0, make(vocabulary, width)
    yield "output_norm.weight", Kind.F32, make(width)
    if architecture != "llama":
        yield "output.weight", Kind.F16, make(vocabulary, width)
    for layer in range(SHAPE["layers"]):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", Kind.F32, make(width)
        yield block + "ffn_norm.weight", Kind.F32, make(width)
        yield block + "attn_q.weight", Kind.Q8_0, make(q, width)
        yield block + "attn_k.weight", Kind.Q4_0, make(kv, width)
        yield block + "attn_v.weight", Kind.F16, make(kv, width)
        yield block + "attn_output.weight", Kind.Q4_1, make(width, q)
        yield block + "ffn_gate.weight", Kind.Q5_0, make(inner, width)
        yield block + "ffn_up.weight", Kind.Q5_1, make(inner, width)
        yield block + "ffn_down.weight", Kind.BF16, make(width, inner)
        if architecture == "qwen2":
            for part, rows in (("q", q), ("k", kv), ("v", kv)):
                yield f"{block}attn_{part}.bias", Kind.F32, make(rows)
        if architecture == "qwen3":
            yield block + "attn_q_norm.weight", Kind.F32, make(head)
            yield block + "attn_k_norm.weight", Kind.F32, make(head)


def write(path, architecture):
    random = np.random.default_rng(19)
    out = GGUFWriter(path, architecture)
    out.add_block_count(SHAPE["layers"])
    out.add_context_length(256)
    out.add_embedding_length(SHAPE["width"])
    out.add_feed_forward_length(SHAPE["inner"])
    out.add_head_count(SHAPE["heads"])
    out.add_head_count_kv(SHAPE["kv_heads"])
    out.add_layer_norm_rms_eps(1e-6)
    out.add_rope_freq_base(50000.0)
    out.add_vocab_size(SHAPE["vocabulary"])
    if architecture == "qwen3":
        out.add_key_length(QWEN3_HEAD)
        out.add_value_length(QWEN3_HEAD)
    for name, kind, values in tensors(architecture, random):
        out.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    assert len(GGUFReader(path).tensors) > 0


def main():
    if sys.argv[1] == "--of":
        describe(pathlib.Path(sys.argv[2]))
        return
    for architecture in ("llama", "qwen2", "qwen3"):
        path = pathlib.Path(sys.argv[1]) / f"gguf-{architecture}.gguf"
        write(path, architecture)
        describe(path)


if __name__ == "__main__":
    main()
