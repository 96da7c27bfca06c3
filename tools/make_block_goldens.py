#!/usr/bin/env python3
"""Writes tests/data/blocks.bin: random blocks of every GGUF block format and what the `gguf` package makes of them.

Needs gguf 0.19 and numpy. Layout, little-endian, one record per format: u32 GGML type, u32 block count,
u32 bytes per block, u32 elements per block, the blocks, the elements as f32.
Half of the blocks have random scales, the rest extreme ones: zero, minus zero, subnormal, smallest, largest, infinite.
"""
import struct
import sys

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as Kind
from gguf.quants import dequantize

# Byte positions of the f16 numbers inside a block.
HALVES = {
    Kind.Q4_0: [0], Kind.Q4_1: [0, 2], Kind.Q5_0: [0], Kind.Q5_1: [0, 2], Kind.Q8_0: [0],
    Kind.Q4_K: [0, 2], Kind.Q5_K: [0, 2], Kind.Q6_K: [208], Kind.F16: [0], Kind.BF16: [],
}
EXTREMES = [0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00]


def main(path):
    random = np.random.default_rng(20)
    with open(path, "wb") as out:
        for kind, places in HALVES.items():
            elements, size = GGML_QUANT_SIZES[kind]
            count = 1024 if elements == 1 else 40 if elements == 32 else 14
            blocks = random.integers(0, 256, (count, size), dtype=np.uint8)
            for index in range(count):
                for place in places:
                    if index % 2:
                        bits = random.choice(EXTREMES)
                    else:
                        bits = np.float16(random.normal(0, 0.1)).view(np.uint16)
                    blocks[index, place:place + 2] = np.frombuffer(struct.pack("<H", bits), np.uint8)
            with np.errstate(invalid="ignore"):
                if kind == Kind.F16:
                    values = blocks.view(np.float16).astype(np.float32)
                else:
                    values = dequantize(blocks, kind)
            assert values.dtype == np.float32 and values.size == count * elements
            out.write(struct.pack("<4I", kind, count, size, elements))
            out.write(blocks.tobytes())
            out.write(np.ascontiguousarray(values).tobytes())


if __name__ == "__main__":
    main(sys.argv[1])
