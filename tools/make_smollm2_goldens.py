#!/usr/bin/env python3
"""Writes tests/data/smollm2.json: ids and chat texts of SmolLM2-135M-Instruct, from the metadata of its GGUF file.

Usage: make_smollm2_goldens.py MODEL.gguf OUT.json. Needs gguf 0.19, tokenizers, regex and transformers.

The ids come from `tokenizers` set up as the model's own tokenizer.json is (digits one by one, then byte-level BPE,
which `transformers` loses when it converts the GGUF file), and from the plain BPE below; both must agree.
"""
import json
import sys

import regex
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

TEXTS = [
    "", " ", "  ", "\n", "\n\n\t x", "Hello, world!", " Hello", "It's 3.14159, isn't it? I'LL say so.",
    "1234567890", "a1b22c333 4444", "2024-11-21T07:15:00Z", "\u0663\u0664\u0665 \u00bd \u2460 \u5341\u4e8c",
    "fn main() {\n    println!(\"{}\", 1_000);\n}\n", "\tdef f(x):\r\n\t\treturn x**2  # square\r\n",
    "Stra\u00dfe na\u00efve caf\u00e9 cafe\u0301 \u0130stanbul", "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3067\u3059\u3002",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea", "\u00a0\u2003\u200b\ufeff x\u3000y",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "<|endoftext|><|im_end|> <|im_start|",
    "a" * 200, "ab " * 50, "e\u0301" * 20, "https://example.com/?q=1&r=%20#top", "...---!!!   ###\n\n\n***",
    "'s 't 're 've 'm 'll 'd 'S don't", "\x00\x01\x7f\x80", "\u00e9\u00ff\u0100\uffff\U0010fffd",
]
USER = {"role": "user", "content": "What is 12 + 30?"}
CHATS = [
    ([USER], True), ([USER], False), ([{"role": "system", "content": "Be brief."}, USER], True),
    ([USER, {"role": "assistant", "content": " 42.\n"}, {"role": "user", "content": "Sure?"}], True),
]


def byte_letters():
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + at) for at, byte in enumerate(rest)}


def plain_bpe(ids, ranks, specials):
    letters = byte_letters()
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    marks = regex.compile("(" + "|".join(map(regex.escape, sorted(specials, key=len, reverse=True))) + ")")

    def word_ids(word):
        parts = [letters[byte] for byte in word.encode()]
        while len(parts) > 1:
            rank, at = min((ranks.get(pair, 1 << 30), at) for at, pair in enumerate(zip(parts, parts[1:])))
            if rank == 1 << 30:
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        return [ids[part] for part in parts]

    def encode(text):
        out = []
        for piece in marks.split(text):
            if piece in specials:
                out.append(ids[piece])
                continue
            for run in regex.findall(r"\p{N}|[^\p{N}]+", piece):
                out += [token for word in words.findall(run) for token in word_ids(word)]
        return out

    return encode


def main(model, path):
    fields = {name: field.contents() for name, field in GGUFReader(model).fields.items()}
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    ids = {token: index for index, token in enumerate(tokens)}
    specials = [token for token, kind in zip(tokens, types) if kind == 3]
    tokenizer = Tokenizer(models.BPE(ids, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    plain = plain_bpe(ids, {pair: rank for rank, pair in enumerate(merges)}, set(specials))
    encoded = []
    for text in TEXTS:
        own = tokenizer.encode(text).ids
        assert own == plain(text), (text, own, plain(text))
        encoded.append({"text": text, "ids": own})
    template = fields["tokenizer.chat_template"]
    chats = []
    for messages, prompt in CHATS:
        texts, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=prompt)
        chats.append({"messages": messages, "add_generation_prompt": prompt, "text": texts[0],
                      "ids": tokenizer.encode(texts[0]).ids})
    with open(path, "w") as out:
        json.dump({"encoded": encoded, "chats": chats}, out, separators=(",", ":"))
        out.write("\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
