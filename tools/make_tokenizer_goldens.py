"""Writes what Python's `tokenizers` and llama.cpp make of a fuzz corpus, for the tests of the formats crate.

Usage:
  make_tokenizer_goldens.py folder MODEL_FOLDER OUT.json [COUNT]   ids by `tokenizers`, from a folder with tokenizer.json
  make_tokenizer_goldens.py gguf VOCABULARY.gguf OUT_FOLDER        the metadata as JSON, and ids from .gguf.inp/.gguf.out
Made with tokenizers 0.23.3 and gguf 0.19. Tests read the folder named by PMETAL_TOKENIZERS: one subfolder per tokenizer
with `goldens.json` and either tokenizer.json (+ tokenizer_config.json) or `gguf.json`.
"""

import json
import pathlib
import random
import sys

PIECES = [
    "Hello", " world", "  ", "   \n", "\n", "\n\n", "\t", "\r\n", " ", "123", "45678", " 9", "3.14", "'s", "'LL", "don't",
    "caf\u00e9", "cafe\u0301", "\u00df", "\u65e5\u672c\u8a9e", "\u4e2d\u6587", "\ud55c\uad6d\uc5b4", "\u0645\u0631\u062d\u0628\u0627",
    "\u05e9\u05dc\u05d5\u05dd", "\U0001f642", "\U0001f469\u200d\U0001f680", "\U0001f1e9\U0001f1ea", "\u00a0", "\u2028",
    "\u200b", "\ufeff", "\x00", "\x7f", "\u0301", "!!", "...", "==", "->", "{}", "<s>", "</s>", "<unk>", "<|im_end|>",
    "<|im_start|>", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>", "<think>", "<tool_call>", "<bos>", "<start_of_turn>",
    "<0x41>", "\u2581", "\u2581the", "a" * 40, "A", "iPhone", "snake_case", "https://x.y/z?q=1", "\u0130", "\ufb01", "\u2460", "\u00bd",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\ue000", "\U0010fffd", "once", " upon", " a time", "Lily", ".", ",",
]


def corpus(count):
    rng = random.Random(7)
    texts = [""] + PIECES
    while len(texts) < count:
        texts.append("".join(rng.choice(PIECES) for _ in range(rng.randint(2, 12))))
    return texts[:count]


def from_folder(folder, out, count):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = str(pathlib.Path(folder) / "tokenizer.json")
    parse, plain = Tokenizer.from_file(path), Tokenizer.from_file(path)
    for tokenizer in (parse, plain):
        tokenizer.no_padding()
        tokenizer.no_truncation()
    plain.encode_special_tokens = True
    config_path = pathlib.Path(folder) / "tokenizer_config.json"
    config = json.loads(config_path.read_text()) if config_path.exists() else {}
    keep = {k: v for k, v in config.items() if k in ("bos_token", "eos_token", "add_bos_token", "add_eos_token")}
    whole = PreTrainedTokenizerFast(tokenizer_file=path, **keep)
    rows = []
    for text in corpus(count):
        encoded = parse.encode(text, add_special_tokens=False)
        ends = [0]
        for character in text:
            ends.append(ends[-1] + len(character.encode()))
        rows.append({
            "text": text,
            "ids": encoded.ids,
            "offsets": [[ends[a], ends[b]] for a, b in encoded.offsets],
            "plain": plain.encode(text, add_special_tokens=False).ids,
            "document": whole(text)["input_ids"],
            "decoded": parse.decode(encoded.ids, skip_special_tokens=False),
            "skipped": parse.decode(encoded.ids, skip_special_tokens=True),
        })
    write(out, rows)


def from_gguf(path, out):
    from gguf import GGUFReader

    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    fields = {
        name: field.contents() for name, field in GGUFReader(path).fields.items() if name.startswith("tokenizer.")
    }
    (out / "gguf.json").write_text(json.dumps(fields))
    if pathlib.Path(path + ".inp").exists():
        texts = pathlib.Path(path + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
        ids = pathlib.Path(path + ".out").read_text().splitlines()
        rows = [{"text": text, "ids": [int(i) for i in line.split()]} for text, line in zip(texts, ids)]
        write(out / "goldens.json", rows)


def write(out, rows):
    pathlib.Path(out).write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if sys.argv[1] == "folder":
    from_folder(sys.argv[2], sys.argv[3], int(sys.argv[4]) if len(sys.argv) > 4 else 600)
else:
    from_gguf(sys.argv[2], sys.argv[3])
