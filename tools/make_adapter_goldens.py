"""Writes which modules PEFT gives an adapter of which rank and scale, for many configurations.

    python tools/make_adapter_goldens.py crates/pmetal-formats/tests/data/peft_targets.json

Versions: peft 0.21.2, torch 2.15.0 (tools/requirements.txt). The modules are those of a small model that has every
name that makes matching hard: numbered experts inside numbered layers, one name that ends like another, a head.
"""

import dataclasses
import json
import sys
import tempfile
import warnings
from pathlib import Path

import peft
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

CASES = [
    dict(target_modules=["q_proj", "v_proj"]),
    dict(target_modules="all-linear"),
    dict(target_modules="All-Linear", exclude_modules=["down_proj"]),
    dict(target_modules=["proj"]),
    dict(target_modules=["self_attn.q_proj", "mlp.up_proj"], lora_alpha=3),
    dict(target_modules=["model.layers.1.self_attn.q_proj"]),
    dict(target_modules=["q_proj", "lm_head"]),
    dict(target_modules=r".*\.(q|k)_proj"),
    dict(target_modules=r"model\.layers\.[02]\.mlp\.(up|down)_proj", use_rslora=True),
    dict(target_modules=r"q_proj|.*up_proj"),
    dict(target_modules=["q_proj", "k_proj"], exclude_modules=["layers.1.self_attn.q_proj"]),
    dict(target_modules=["q_proj", "k_proj"], exclude_modules=r".*\.2\..*"),
    dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2]),
    dict(target_modules=["q_proj", "down_proj"], layers_to_transform=1),
    dict(target_modules=["q_proj"], layers_to_transform=[]),
    dict(target_modules=["q_proj", "model.layers.0.self_attn.k_proj"], layers_to_transform=[2]),
    dict(target_modules=["w1", "q_proj"], layers_to_transform=[1]),
    dict(target_modules=["w1"], layers_to_transform=[1], layers_pattern="experts"),
    dict(target_modules=["w1", "q_proj"], layers_to_transform=[1], layers_pattern=["experts", "layers"]),
    dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="l.*s"),
    dict(target_modules=["q_proj", "k_proj"], rank_pattern={"q_proj": 3}, alpha_pattern={"k_proj": 5}),
    dict(target_modules=["q_proj", "k_proj"], rank_pattern={r"layers\.1\.self_attn\.q_proj": 3, "q_proj": 2}),
    dict(target_modules=["q_proj", "k_proj"], rank_pattern={"q_proj": 2, r"layers\.1\.self_attn\.q_proj": 3}),
    dict(target_modules=["q_proj"], rank_pattern={r"^model\.layers\.0\.self_attn\.q_proj": 7, "roj": 5}),
    dict(target_modules=["q_proj"], rank_pattern={r".*\.2\..*": 6, "model.layers.0.self_attn.q_proj": 4}),
    dict(target_modules=["q_proj", "v_proj"], use_rslora=True, rank_pattern={"v_proj": 4}, alpha_pattern={"q_proj": 9}),
    dict(target_modules=["up_proj"], lora_alpha=2.5, lora_dropout=0.1, r=3),
    dict(target_modules=["head"], r=1),
]


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList()
        for _ in range(3):
            expert = torch.nn.Module()
            expert.w1 = torch.nn.Linear(8, 8)
            self.experts.append(expert)


def build():
    config = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, vocab_size=11
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.moe = Experts()
    model.model.head = torch.nn.Linear(8, 8)
    return model


def main(target):
    assert peft.__version__ == "0.21.2", peft.__version__
    model = build()
    head = model.get_output_embeddings()
    linear = [
        {"name": name, "output_head": module is head}
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    cases = []
    for case in CASES:
        config = LoraConfig(**{"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", **case})
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            path = Path(folder) / "adapter_config.json"
            written = json.loads(path.read_text())
            # save_pretrained sorts the patterns, whose order decides which one is found first.
            for field in ("rank_pattern", "alpha_pattern"):
                written[field] = case.get(field, {})
            path.write_text(json.dumps(written))
            config = LoraConfig.from_pretrained(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                modules = list(get_peft_model(build(), config).base_model.model.named_modules())
            except ValueError as error:
                assert "not found in the base model" in str(error) or "No modules were targeted" in str(error), error
                modules = []
        found = {}
        for name, module in modules:
            if isinstance(module, LoraLayer):
                found[name] = {
                    "rank": module.r["default"],
                    "alpha": module.lora_alpha["default"],
                    "scale": module.scaling["default"],
                }
        # The set that PEFT keeps has no order.
        for field in ("target_modules", "exclude_modules"):
            if isinstance(written[field], list):
                written[field].sort()
        cases.append({"config": written, "modules": found})
    fields = {
        field.name: json.loads(json.dumps(getattr(LoraConfig(), field.name), default=str))
        for field in dataclasses.fields(LoraConfig)
        if field.name != "runtime_config"
    }
    with tempfile.TemporaryDirectory() as folder:
        LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(folder)
        text = (Path(folder) / "adapter_config.json").read_text()
    document = {"linear_modules": linear, "fields": sorted(fields), "plain_file": text, "cases": cases}
    Path(target).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
