"""Writes which tokens TRL trains, for the dataset tests.

    python tools/make_label_goldens.py TEMPLATE_FOLDER crates/pmetal/tests/data/labels

Versions: trl 1.16, transformers 5.23.0, tokenizers as they need it (tools/requirements.txt). TEMPLATE_FOLDER holds
TRL's `*_training.jinja`. The ids and labels are those of `SFTTrainer.train_dataset`, TRL's own way through a dataset.
"""

import json
import sys
import tempfile
from pathlib import Path

import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

SPECIAL = [
    "<|bos|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
]

CORPUS = [
    "Hello there! How are you today? I am fine, thanks, and you?\n\nThe sun rises in the east.",
    "user\nassistant\nsystem\nWhat is two plus two? It is four. What is the capital of France? Paris.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n",
    "Caf\u00e9 na\u00efve \u00fcber stra\u00dfe \u65e5\u672c\u8a9e \U0001f600 and more text to merge over and over again.",
] * 3

CHATS = [
    [("user", "What is two plus two?"), ("assistant", "It is four.")],
    [("system", "Be brief."), ("user", "Hello there!"), ("assistant", "Hi."), ("user", "And you?"), ("assistant", "Fine, thanks.")],
    [("user", "Caf\u00e9 \u65e5\u672c\u8a9e?"), ("assistant", "\U0001f600 na\u00efve stra\u00dfe"), ("user", "x"), ("assistant", "y"), ("user", "again"), ("assistant", "over and over")],
    [("user", "Write code."), ("assistant", "def add(a, b):\n    return a + b\n\nprint(add(1, 2))")],
    [("user", "  spaces  "), ("assistant", "no edges")],
    [("user", "quote \"this\" {{ not_a_variable }}"), ("assistant", "{% raw %} 'that'")],
]

CONTINUATIONS = [
    ("What is two plus two?", " It is four."),
    ("What is two plus two? ", "It is four."),
    ("over and ov", "er again"),
    ("caf", "\u00e9"),
    ("ends in newline\n", "\nstarts in newline"),
    ("", "no prompt"),
    ("Hello", " there!<|endoftext|>"),
    ("\U0001f600", "\U0001f600"),
]

TEXTS = ["Hello there! How are you today?", "", "Caf\u00e9 \u65e5\u672c\u8a9e \U0001f600", "ends<|endoftext|>", "two  spaces\n\n"]

TEMPLATES = [
    "qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3", "gemma", "gemma3", "phi3", "phi3_5", "deepseekv3", "glm4moe", "lfm2", "smolvlm",
    "cohere", "nemotron_3_nano",
]


def build_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    bos = tokenizer.token_to_id("<|bos|>")
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", bos)]),
    ])
    return tokenizer


def train_dataset(model, tokenizer, rows, **settings):
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, report_to="none", max_length=None, use_cpu=True, bf16=False, gradient_checkpointing=False, **settings
        )
        trainer = SFTTrainer(model=model, args=config, processing_class=tokenizer, train_dataset=Dataset.from_list(rows))
        out = []
        for row in trainer.train_dataset:
            labels = row.get("labels", row["input_ids"])
            out.append({"ids": list(row["input_ids"]), "trained": [int(label != -100) for label in labels]})
        return out


def messages(chat):
    return [{"role": role, "content": content} for role, content in chat]


def main(templates, target):
    assert trl.__version__.startswith("1.16"), trl.__version__
    target = Path(target)
    build_tokenizer().save(str(target / "tokenizer.json"))
    settings = {"bos_token": "<|bos|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings}, indent=1) + "\n")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(target / "tokenizer.json"), **settings)
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    document = {"versions": {"trl": trl.__version__}, "chat": [], "skipped": {}}
    document["text"] = {
        "rows": [{"text": text} for text in TEXTS],
        "expected": train_dataset(model, tokenizer, [{"text": text} for text in TEXTS]),
    }
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in CONTINUATIONS]
    document["prompt_completion"] = {"rows": rows, "expected": train_dataset(model, tokenizer, rows)}
    for name in TEMPLATES:
        source = (Path(templates) / f"{name}_training.jinja").read_text()
        tokenizer.chat_template = source
        usable, parts = [], []
        for chat in CHATS:
            listed = messages(chat)
            try:
                tokenizer.apply_chat_template(listed, tokenize=False)
            except Exception:
                continue
            usable.append({"messages": listed})
            if listed[-2]["role"] == "user":
                parts.append({"prompt": listed[:-1], "completion": listed[-1:]})
        try:
            entry = {
                "name": name,
                "template": source,
                "rows": usable,
                "expected": train_dataset(model, tokenizer, usable, assistant_only_loss=True),
                "parts": parts,
                "parts_expected": train_dataset(model, tokenizer, parts),
            }
        except Exception as error:
            document["skipped"][name] = f"{type(error).__name__}: {error}"[:200]
            continue
        document["chat"].append(entry)
    (target / "expected.json").write_text(json.dumps(document, ensure_ascii=False) + "\n")
    print([entry["name"] for entry in document["chat"]], document["skipped"])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
