#!/usr/bin/env python3
"""What transformers and peft make of the real SmolLM2 file: logits of 512 tokens, and a LoRA loss curve to replay.

    tools/smollm2_reference.py --text PLAIN.txt --chats MESSAGES.jsonl --out FOLDER [--gguf FILE]

Writes, outside the repository (about 1.3 GB):
    FOLDER/fixture/    config.json, model.safetensors (every weight as the GGUF's value in f32) and
                       expected.safetensors (input_ids [1, 512], logits, hidden.{i}, loss with every token trained)
    FOLDER/curve/      initial_adapter/ and final_adapter/ in PEFT form, batches.jsonl with one row
                       {"ids": [...], "labels": [...]} a line, unpadded, `rows_per_step` lines a step in order, and
                       losses.json with the settings, the loss and the gradient norm before clipping of every step

The loss of a step is the sum over its trained tokens divided by their number; `labels` are scored by the logits one
position earlier. The ids are what counts: the tokenizer that transformers builds from a GGUF file splits digits
unlike the released one, which does not matter to a replay.
"""
import argparse
import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = {"rank": 16, "alpha": 32, "dropout": 0.0, "target_modules": TARGETS, "optimizer": "adamw", "lr": 2e-4,
            "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "schedule": "constant", "max_grad_norm": 1.0,
            "dtype": "f32", "rows_per_step": 4, "steps": 50, "maximum_row_tokens": 160, "seed": 0}


def load(gguf):
    arguments = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **arguments)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, attn_implementation="eager",
                                                 **arguments)
    return tokenizer, model.eval()


def released_config(config):
    """The model's values under the names and in the layout of the released config.json."""
    names = ("attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size",
             "intermediate_size", "max_position_embeddings", "mlp_bias", "model_type", "num_attention_heads",
             "num_hidden_layers", "num_key_value_heads", "pad_token_id", "rms_norm_eps", "tie_word_embeddings",
             "vocab_size")
    result = {"architectures": ["LlamaForCausalLM"], **{name: getattr(config, name) for name in names}}
    result |= {"rope_scaling": None, "rope_theta": config.rope_parameters["rope_theta"], "torch_dtype": "float32"}
    return dict(sorted(result.items()))


def write_fixture(tokenizer, model, text, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(released_config(model.config), indent=2) + "\n")
    weights = {name: value.contiguous() for name, value in model.state_dict().items()
               if not (name == "lm_head.weight" and model.config.tie_word_embeddings)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:512]])
    if ids.shape[1] < 512:
        sys.exit(f"error: the text has {ids.shape[1]} tokens, 512 are needed")
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids, use_cache=False, output_hidden_states=True)
    expected = {"input_ids": ids, "labels": ids.clone(), "logits": output.logits, "loss": output.loss}
    expected |= {f"hidden.{index}": value for index, value in enumerate(output.hidden_states)}
    save_file({name: value.contiguous() for name, value in expected.items()}, folder / "expected.safetensors")
    spread = float(output.logits.std())
    print(f"fixture: loss {float(output.loss):.6f} of 511 trained tokens, logits std {spread:.3f}", flush=True)


def chat_row(tokenizer, messages, maximum):
    """Ids and labels of one chat: the assistant's turns and the token that ends them are trained."""
    ids, labels = [], []
    for message in messages:
        head = tokenizer(f"<|im_start|>{message['role']}\n", add_special_tokens=False)["input_ids"]
        body = tokenizer(f"{message['content']}<|im_end|>", add_special_tokens=False)["input_ids"]
        tail = tokenizer("\n", add_special_tokens=False)["input_ids"]
        trained = message["role"] == "assistant"
        ids += head + body + tail
        labels += [-100] * len(head) + (body if trained else [-100] * len(body)) + [-100] * len(tail)
    return {"ids": ids[:maximum], "labels": labels[:maximum]}


def read_rows(tokenizer, path):
    rows = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            row = chat_row(tokenizer, json.loads(line)["messages"], SETTINGS["maximum_row_tokens"])
            if any(label != -100 for label in row["labels"][1:]):
                rows.append(row)
            if len(rows) == SETTINGS["steps"] * SETTINGS["rows_per_step"]:
                return rows
    sys.exit(f"error: {path} has {len(rows)} usable chats, {SETTINGS['steps'] * SETTINGS['rows_per_step']} are needed")


def padded(rows):
    length = max(len(row["ids"]) for row in rows)
    ids = torch.zeros((len(rows), length), dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for index, row in enumerate(rows):
        count = len(row["ids"])
        ids[index, :count], labels[index, :count] = torch.tensor(row["ids"]), torch.tensor(row["labels"])
        mask[index, :count] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def save_adapter(model, folder):
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "smollm2-135m-instruct"
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_curve(tokenizer, model, chats, folder):
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_rows(tokenizer, chats)
    (folder / "batches.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(SETTINGS["seed"])
    model = get_peft_model(model, LoraConfig(r=SETTINGS["rank"], lora_alpha=SETTINGS["alpha"], lora_dropout=0.0,
                                             target_modules=TARGETS, task_type="CAUSAL_LM"))
    save_adapter(model, folder / "initial_adapter")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=SETTINGS["lr"], betas=tuple(SETTINGS["betas"]), eps=SETTINGS["eps"],
                                  weight_decay=SETTINGS["weight_decay"])
    losses, norms, tokens, started = [], [], [], time.time()
    for step in range(SETTINGS["steps"]):
        count = SETTINGS["rows_per_step"]
        batch = padded(rows[step * count:(step + 1) * count])
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trainable, SETTINGS["max_grad_norm"])))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        tokens.append(int((batch["labels"][:, 1:] != -100).sum()))
        print(f"step {step + 1}: loss {losses[-1]:.6f}, gradient norm {norms[-1]:.6f}, {time.time() - started:.0f} s",
              flush=True)
    save_adapter(model, folder / "final_adapter")
    record = {"settings": SETTINGS, "torch": torch.__version__, "transformers": transformers.__version__,
              "losses": losses, "gradient_norms": norms, "trained_tokens": tokens}
    (folder / "losses.json").write_text(json.dumps(record, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, default=ROOT / "models" / "smollm2-135m-instruct.gguf")
    parser.add_argument("--text", type=Path, required=True, help="plain text of at least 512 tokens")
    parser.add_argument("--chats", type=Path, required=True, help="JSON lines with `messages`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-fixture", action="store_true", help="write the curve alone")
    arguments = parser.parse_args()
    if not arguments.gguf.exists():
        sys.exit(f"error: {arguments.gguf} is missing\n\nhint: scripts/get-smollm2 fetches it")
    torch.set_num_threads(arguments.threads)
    tokenizer, model = load(arguments.gguf.resolve())
    if not arguments.skip_fixture:
        shutil.rmtree(arguments.out / "fixture", ignore_errors=True)
        write_fixture(tokenizer, model, arguments.text.read_text(encoding="utf-8"), arguments.out / "fixture")
    shutil.rmtree(arguments.out / "curve", ignore_errors=True)
    write_curve(tokenizer, model, arguments.chats, arguments.out / "curve")


if __name__ == "__main__":
    main()
