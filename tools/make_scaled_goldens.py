#!/usr/bin/env python3
"""Writes tests/data/scaled: tensors whose scales are tensors of their own, and what transformers makes of them.

    python tools/make_scaled_goldens.py crates/pmetal-formats/tests/data/scaled

Needs transformers 5.23.0, torch 2.15.0 and safetensors (tools/requirements.txt). NAME.safetensors is what a checkpoint
holds, NAME.expected.safetensors has the values in f32 under the names that they stand for.
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

BLOCK = [4, 8]
GENERATOR = torch.Generator().manual_seed(20)
EXTREMES = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-38, 3e38, -1.5, 448.0, 2.0**-130, 1.0]


def codes(*shape):
    """Random codes without NaN."""
    values = torch.randint(0, 256, shape, generator=GENERATOR, dtype=torch.uint8)
    values[(values & 127) == 127] = 60
    return values.view(torch.float8_e4m3fn)


def scales(*shape, dtype=torch.float32):
    return (torch.rand(shape, generator=GENERATOR) * 0.3 + 1e-4).to(dtype)


def by_grid(weight, scale):
    """The reference's conversion at loading, which takes the block from the shape of the scales."""
    return Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=torch.float32)


def by_block(weight, scale):
    """The reference's conversion in the backward pass, which cuts the last blocks short."""
    return _dequantize_fp8_weight(weight, scale, BLOCK, torch.float32)


def fp8(folder):
    tensors, expected = {}, {}

    def add(name, weight, scale, convert):
        tensors[name], tensors[name + "_scale_inv"] = weight, scale
        expected[name] = convert(weight, scale)

    add("whole.weight", codes(8, 24), scales(2, 3), by_grid)
    add("ragged.weight", codes(10, 21), scales(3, 3), by_block)
    add("ragged_rows.weight", codes(9, 16), scales(3, 2), by_block)
    add("ragged_columns.weight", codes(8, 3), scales(2, 1), by_block)
    every = torch.arange(256, dtype=torch.uint8).reshape(16, 16).view(torch.float8_e4m3fn)
    add("every_code.weight", every, scales(4, 2), by_grid)
    extreme = torch.tensor(EXTREMES).reshape(6, 2)
    add("extreme.weight", torch.cat([every, every[:8]]), extreme, by_grid)
    add("experts.gate_up_proj", codes(3, 8, 16), scales(3, 2, 2), by_grid)
    add("experts.down_proj", codes(3, 10, 12), scales(3, 3, 2), by_block)
    add("small.gate_up_proj", codes(2, 4, 8), scales(2, 2, 1), by_grid)
    add("bf16.weight", codes(8, 16), scales(2, 2, dtype=torch.bfloat16), by_grid)
    add("f16.weight", codes(8, 16), scales(2, 2, dtype=torch.float16), by_grid)
    exponents = torch.tensor([0, 1, 2, 120, 127, 130, 254, 255], dtype=torch.uint8).reshape(4, 2)
    add("exponents.weight", every.clone(), exponents, by_grid)
    tensors["whole.activation_scale"] = torch.tensor(0.5)
    tensors["experts.down_proj_activation_scale"] = torch.ones(3)
    tensors["norm.weight"] = scales(8, dtype=torch.bfloat16)
    expected["norm.weight"] = tensors["norm.weight"].float()
    save_file(tensors, folder / "fp8.safetensors")
    save_file(expected, folder / "fp8.expected.safetensors")
    tensors.clear()
    expected.clear()
    add("one.weight", codes(5, 7), torch.tensor(0.37), by_grid)
    add("two.weight", codes(5, 7), scales(1), by_grid)
    add("experts.down_proj", codes(2, 3, 4), scales(2, 1, 1), by_grid)
    save_file(tensors, folder / "fp8-whole.safetensors")
    save_file(expected, folder / "fp8-whole.expected.safetensors")


def mxfp4(folder):
    tensors, expected = {}, {}

    def add(name, blocks, exponents):
        tensors[name + "_blocks"], tensors[name + "_scales"] = blocks, exponents
        expected[name] = _convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)

    def random(*shape, low=0, high=256):
        return torch.randint(low, high, shape, generator=GENERATOR, dtype=torch.uint8)

    pairs = torch.tensor([2 * pair | (2 * pair + 1) << 4 for pair in range(8)] * 2, dtype=torch.uint8)
    add("every", pairs.expand(1, 256, 1, 16).contiguous(), torch.arange(256, dtype=torch.uint8).reshape(1, 256, 1))
    add("model.layers.0.mlp.experts.gate_up_proj", random(3, 37, 2, 16), random(3, 37, 2, low=110, high=135))
    add("model.layers.0.mlp.experts.down_proj", random(2, 16, 3, 16), random(2, 16, 3))
    tensors["model.layers.0.mlp.experts.gate_up_proj_bias"] = scales(3, 37, dtype=torch.bfloat16)
    expected["model.layers.0.mlp.experts.gate_up_proj_bias"] = tensors[
        "model.layers.0.mlp.experts.gate_up_proj_bias"
    ].float()
    save_file(tensors, folder / "mxfp4.safetensors")
    save_file(expected, folder / "mxfp4.expected.safetensors")


if __name__ == "__main__":
    assert transformers.__version__ == "5.23.0", transformers.__version__
    target = Path(sys.argv[1])
    target.mkdir(exist_ok=True)
    fp8(target)
    mxfp4(target)
