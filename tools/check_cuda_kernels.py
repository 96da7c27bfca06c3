#!/usr/bin/env python3
"""Compiles the kernels that are written for CUDA alone, without a GPU.

    pip install nvidia-cuda-nvrtc && tools/check_cuda_kernels.py

The compiler's errors are problems, and so is its remark that it puts the products of warpgroups in series: such a kernel is right
and loses a tenth or more of its time. The tests refuse it too, but need a card to see it.
"""

import ctypes
import glob
import itertools
import multiprocessing
import os
import pathlib
import sys

KERNELS = pathlib.Path(__file__).resolve().parent.parent / "crates/pmetal-engine/kernels"
SERIALISED = b"instructions are serialized"

ATTENTION = ["cuda/tiles.cuh", "cuda/attention_common.cuh"]
HOPPER = ["cuda/attention_hopper.cuh"]
ROWS = ["prelude/cuda.h", "common.cpp"]


def every(**choices):
    """All combinations of macros with one value of each."""
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def attention():
    """Texts, architecture and macros of attention for head widths below, at and above whole pieces of 64 columns."""
    for key, value in ((8, 8), (40, 24), (64, 64), (96, 96), (128, 128), (128, 192), (192, 128), (256, 256)):
        for halves, capped in ((0, 0), (1, 1)):
            macros = {"HEAD_WIDTH": key, "VALUE_WIDTH": value, "HALVES_F16": halves, "ATTENTION_SOFTCAP": capped}
            wide = max(key, value)
            for choice in (0, 1):
                yield [*ATTENTION, "cuda/attention_forward.cu"], "80", macros | {"ATTENTION_CHOICE": choice}
                for keys, queries, stages in ((128 if wide <= 128 else 64, 64, 2), (32, 32, 1)):
                    tiles = {"BACKWARD_KEYS": keys, "BACKWARD_QUERIES": queries, "BACKWARD_STAGES": stages}
                    texts = [*ATTENTION, "cuda/attention_prepare.cu", "cuda/attention_backward.cu"]
                    yield texts, "80", macros | tiles | {"ATTENTION_CHOICE": choice}
            yield [*ATTENTION, "cuda/attention_decode.cu"], "80", macros
            if wide <= 128 or value <= key:
                for consumers in (2, 3) if wide <= 64 else (2,):
                    texts = [*ATTENTION, *HOPPER, "cuda/attention_forward_hopper.cu"]
                    yield texts, "90a", macros | {"FORWARD_CONSUMERS": consumers}
            for cluster in (1, 3, 4) if wide <= 128 else (1,):
                texts = [*ATTENTION, *HOPPER, "cuda/attention_prepare.cu", "cuda/attention_backward_hopper.cu"]
                yield texts, "90a", macros | {"BACKWARD_CLUSTER": cluster}


def variants():
    """Texts, architecture and macros of everything but portable kernels."""
    yield from attention()
    for tile in every(TURNED=(0, 1), SECOND_TURNED=(0, 1), HALVES_F16=(0, 1)):
        for rows, columns in ((64, 128), (64, 256), (128, 64), (128, 128), (128, 256)):
            stages = min((192 << 10) // ((rows + columns) * 128), 6)
            texts = ["cuda/tiles.cuh", *HOPPER, "cuda/expert_tiles.cuh", "cuda/expert_products_hopper.cu"]
            yield texts, "90a", tile | {"TILE_ROWS": rows, "COLUMN_TILE": columns, "STAGES": stages}
        for rows, stages in ((16, 4), (64, 4), (128, 3)):
            texts = ["cuda/tiles.cuh", "cuda/expert_tiles.cuh", "cuda/expert_products.cu"]
            yield texts, "80", tile | {"TILE_ROWS": rows, "COLUMN_TILE": 128, "STAGES": stages}
    for macros in every(HALVES_F16=(0, 1), THIN_TILE=(32, 128), STAGES=(3,)):
        yield ["cuda/tiles.cuh", "cuda/expert_gradients.cu"], "80", macros
    for tokens, stages in ((64, 3), (32, 4)):
        for cluster, architecture in ((1, "80"), (4, "90a")):
            macros = {"HALVES_F16": 0, "TOKEN_TILE": tokens, "STAGES": stages, "AT_ONCE": stages, "CLUSTER": cluster}
            yield ["cuda/tiles.cuh", "cuda/weight_gradients.cu"], architecture, macros
    for macros in every(ELEMENT=("bf16", "f32"), CLUSTER=(2, 4, 8), CAPPED=(0, 1)):
        yield [*ROWS, "cuda/tiles.cuh", *HOPPER, "cuda/loss_hopper.cu"], "90a", macros
    for macros in every(ELEMENT=("bf16",), ROW_WIDTH=(576, 1024), RANKS=(16, 64), WEIGHT=("f32", "bf16")):
        yield [*ROWS, "cuda/tiles.cuh", "cuda/riding.cuh", "cuda/norm_riding.cu"], "80", macros
    for macros in every(ELEMENT=("bf16",), ROW_WIDTH=(1536,), RANKS=(16, 64), SILU=(0, 1), ALIGNED=(1,)):
        yield [*ROWS, "gated.cpp", "cuda/tiles.cuh", "cuda/riding.cuh", "cuda/gated_riding.cu"], "80", macros


def library():
    found = [path for folder in sys.path for path in glob.glob(os.path.join(folder, "nvidia/*/lib/libnvrtc.so*")) if "builtins" not in path]
    if not found:
        raise SystemExit("there is no NVRTC in this Python: pip install nvidia-cuda-nvrtc")
    return ctypes.CDLL(found[0])


def problem(variant):
    texts, architecture, macros = variant
    nvrtc, program, size = library(), ctypes.c_void_p(), ctypes.c_size_t()
    text = "\n".join((KERNELS / name).read_text() for name in texts)
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
    options = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", "-default-device"]
    options = [option.encode() for option in options + [f"-D{name}={value}" for name, value in macros.items()]]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if status != 0 or SERIALISED in log.value:
        return f"{texts[-1]} {macros}:\n{log.value.decode(errors='replace')[-1500:]}"
    return None


def main():
    library()
    every_variant = list(variants())
    with multiprocessing.Pool() as pool:
        problems = [found for found in pool.imap_unordered(problem, every_variant) if found]
    print("\n".join([*problems, f"{len(every_variant)} variants of the kernels, {len(problems)} problems"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
