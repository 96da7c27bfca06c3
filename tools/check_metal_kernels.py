#!/usr/bin/env python3
"""Parses every portable kernel behind the Metal prelude, without a Mac.

    pip install libclang==18.1.1 && tools/check_metal_kernels.py

clang knows the grammar of C++14, which Metal's language extends; a few lines stand for <metal_stdlib>, and the address
spaces are clang's own. So pointers of the wrong address space, words that Metal reserves and positions that were not
handed on are found. Where Metal allows more than C++, the prelude is reworded (REWORDED). What Apple's compiler says
beyond that, only a Mac can tell.
"""

import itertools
import pathlib
import re
import sys

from clang import cindex

KERNELS = pathlib.Path(__file__).resolve().parent.parent / "crates/pmetal-engine/kernels"

LIBRARY = """
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define kernel
#define vertex reserved-word
#define fragment reserved-word
#define sampler reserved-word
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long ulong;
#define half _Float16
typedef float float4 __attribute__((ext_vector_type(4)));
typedef float float2 __attribute__((ext_vector_type(2)));
typedef float packed_float4 __attribute__((ext_vector_type(4), aligned(4)));
typedef uint uint2 __attribute__((ext_vector_type(2)));
typedef uint uint3 __attribute__((ext_vector_type(3)));
typedef uint uint4 __attribute__((ext_vector_type(4)));
template <typename T, typename U> T as_type(U value) {
    static_assert(sizeof(T) == sizeof(U), "as_type keeps the size");
    return __builtin_bit_cast(T, value);
}
namespace metal {
float simd_shuffle_xor(float, ushort);
float simd_sum(float);
float simd_max(float);
uint mulhi(uint, uint);
enum class mem_flags { mem_device = 1, mem_threadgroup = 2 };
constexpr mem_flags operator|(mem_flags a, mem_flags) { return a; }
void threadgroup_barrier(mem_flags);
struct atomic_uint { uint value; };
enum memory_order { memory_order_relaxed };
uint atomic_fetch_add_explicit(volatile threadgroup atomic_uint*, uint, memory_order);
float dot(float4, float4);
float exp(float);
float fabs(float);
float fma(float, float, float);
float fract(float);
float log(float);
float sqrt(float);
float tanh(float);
namespace precise {
float exp(float);
float fmax(float, float);
float log(float);
float rsqrt(float);
float sqrt(float);
float tanh(float);
}
}
#define float2(...) ((float2){__VA_ARGS__})
#define float4(...) ((float4){__VA_ARGS__})
#define packed_float4(...) ((packed_float4){__VA_ARGS__})
#define uint2(...) ((uint2){__VA_ARGS__})
#define uint4(...) ((uint4){__VA_ARGS__})
#define INFINITY __builtin_inff()
"""

# Metal has arrays of `threadgroup` in kernels, and copies structs from every address space.
COPIED = "struct {0} {{ ushort bits; {0}() = default; {0}(const {0}&) = default; {0}(const device {0}& x) : bits(x.bits) {{}} }};"
REWORDED = {
    "#include <metal_stdlib>": "",
    "#define SHARED threadgroup\n": "#define SHARED static threadgroup\n",
    "struct bf16 { ushort bits; };": COPIED.format("bf16"),
    "struct f16 { ushort bits; };": COPIED.format("f16"),
}

TYPES = ("f32", "bf16", "f16")
# The macros that a module is compiled with, beside ELEMENT, and their values.
MACROS = {
    "SOURCE": TYPES,
    "WEIGHT": TYPES,
    "BIAS": TYPES,
    "ALIGNED": (0, 1),
    "SILU": (0, 1),
    "SIGMOID": (0, 1),
    "CODES": (0, 1),
    "PAIR": (0, 1, 2),
    "TURNED": (0, 1),
    "PAIRS_HALVES": (0, 1),
    "STATE_ROWS": (5, 128, 256),
    "TAPS": (1, 4),
    "IN_PAIRS": (0, 1),
    "VECTORS": (1, 4),
    "LANES": (16, 32),
    "SIMD_ROWS": (0, 1),
    "ROWS": (1, 4),
    "FEATURES": (1, 2),
    "SPLITS": (1, 4),
    "DEPTH": (2,),
    "KEY_WIDTH": (5, 128, 256),
    "ROUNDED": (0, 1, 2),
    "SLICE": (16, 32),
    "PAIRED": ("bf16", "f16"),
}


def problems(name, defines):
    prelude = (KERNELS / "prelude/metal.h").read_text()
    for ours, theirs in REWORDED.items():
        if ours not in prelude:
            yield f"metal.h has no `{ours.strip()}`"
        prelude = prelude.replace(ours, theirs)
    parts = [f"#define {key} {value}" for key, value in defines.items()]
    parts += [LIBRARY, prelude, (KERNELS / "common.cpp").read_text(), (KERNELS / f"{name}.cpp").read_text()]
    text = "\n".join(parts)
    unit = cindex.Index.create().parse(
        "kernel.cpp",
        args=["-x", "c++", "-std=c++14", "-nostdinc", "-Wno-unknown-attributes"],
        unsaved_files=[("kernel.cpp", text)],
    )
    lines = text.split("\n")
    for found in unit.diagnostics:
        if found.severity >= 3:
            yield f"{name} {defines}: {found.spelling}\n    {lines[found.location.line - 1].strip()}"


def pointers_without_memory(name, text):
    """clang takes pointers and references that do not say what memory they are to; Metal does not."""
    kernels = re.findall(r"^KERNEL\((\w+)\)\(([^{]*?)\) \{$", text, re.MULTILINE | re.DOTALL)
    functions = re.findall(r"^DEVICE \w+ (\w+)\(([^{]*?)\) \{$", text, re.MULTILINE | re.DOTALL)
    for function, parameters in kernels + functions:
        for parameter in parameters.split(","):
            if re.search("[*&]", parameter) and not re.search("GLOBAL|LOCAL", parameter):
                yield f"{name}: `{parameter.strip()}` of {function} is neither GLOBAL nor LOCAL"


def main():
    modules, count = 0, 0
    for path in sorted(KERNELS.glob("*.cpp")):
        text = path.read_text()
        for problem in pointers_without_memory(path.stem, text):
            count += 1
            print(problem)
        if path.stem == "common":
            continue
        macros = {"ELEMENT": TYPES} | {name: values for name, values in MACROS.items() if re.search(rf"\b{name}\b", text)}
        for values in itertools.product(*macros.values()):
            modules += 1
            for problem in problems(path.stem, dict(zip(macros, values))):
                count += 1
                print(problem)
    print(f"{modules} variants of the kernels, {count} problems")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
