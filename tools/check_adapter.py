#!/usr/bin/env python3
"""Loads an adapter that PMetal wrote with peft and says whether peft understands it as it was meant.

    tools/check_adapter.py --base FOLDER --adapter FOLDER [--logits FILE.safetensors] [--json]

Checks that every tensor in the adapter folder is one that peft expects under its config, and the reverse; that peft
holds the stored values after loading; and, given --logits, that peft's logits agree. That file holds `input_ids`
[B, T], optionally `attention_mask` [B, T], and PMetal's `adapter.logits` or `logits` [B, T, V], compared where the
mask is 1. Everything runs in f32 on the CPU. Exits 1 on a miss.
"""
import argparse
import json
import os
import sys
import warnings
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

TOLERANCE = 1e-4  # of the standard deviation of the logits


def compare_keys(model, stored):
    """Missing, unexpected and altered tensor names."""
    held = get_peft_model_state_dict(model)
    missing, unexpected = sorted(held.keys() - stored.keys()), sorted(stored.keys() - held.keys())
    altered = [name for name in sorted(held.keys() & stored.keys())
               if not torch.equal(held[name].float(), stored[name].float())]
    return missing, unexpected, altered


def compare_logits(model, path):
    """Largest difference and spread of the logits, over real tokens."""
    tensors = load_file(path)
    ours = tensors["adapter.logits"] if "adapter.logits" in tensors else tensors["logits"]
    mask = tensors.get("attention_mask", torch.ones_like(tensors["input_ids"]))
    with torch.no_grad():
        theirs = model(input_ids=tensors["input_ids"].long(), attention_mask=mask.long(), use_cache=False).logits
    if theirs.shape != ours.shape:
        sys.exit(f"error: the logits of {path} have shape {list(ours.shape)}, peft computes {list(theirs.shape)}")
    real = mask == 1
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=tensors["input_ids"].long(), attention_mask=mask.long(), use_cache=False).logits
    difference = (theirs - ours.float())[real].abs().max()
    return {"max_logit_difference": float(difference), "logits_std": float(theirs[real].std()),
            # How far the adapter moves the logits: an agreement below this shows nothing.
            "max_adapter_effect": float((theirs - base)[real].abs().max())}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="model folder in Hugging Face layout")
    parser.add_argument("--adapter", type=Path, required=True, help="folder with adapter_config.json")
    parser.add_argument("--logits", type=Path, help="safetensors with input_ids and PMetal's logits")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers_logging.disable_progress_bar()
    stored = load_file(arguments.adapter / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32, attn_implementation="eager",
                                                experts_implementation="eager")
    model = PeftModel.from_pretrained(base, arguments.adapter).eval()
    missing, unexpected, altered = compare_keys(model, stored)
    report = {"tensors": len(stored), "missing": missing, "unexpected": unexpected, "altered": altered}
    failed = bool(missing or unexpected or altered) or not stored
    if arguments.logits:
        report |= compare_logits(model, arguments.logits)
        # A NaN must fail, so the comparison is the one that is false for it.
        failed |= not report["max_logit_difference"] <= TOLERANCE * report["logits_std"]
    report["verdict"] = "fail" if failed else "pass"
    if arguments.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name}: {', '.join(value) or 'none' if isinstance(value, list) else value}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
