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
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper
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

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
PARAMETER_CASES = [
    dict(target_modules=[], target_parameters=[GATE_UP]),
    dict(target_modules=[], target_parameters=[GATE_UP, DOWN]),
    dict(target_modules=["q_proj"], target_parameters=[DOWN, GATE_UP, DOWN], lora_alpha=2.5, r=3),
    dict(target_modules=[], target_parameters=["experts.gate_up_proj_bias", DOWN, GATE_UP]),
    dict(target_modules=[], target_parameters=["gate_up_proj"]),
    dict(target_modules=[], target_parameters=["experts.gate_up_proj", ""]),
    dict(target_modules=[], target_parameters=["model.layers.1.mlp.experts.down_proj"]),
    dict(target_modules=["v_proj"], target_parameters=["up_proj", "experts"]),
    dict(target_modules=[], target_parameters=["router.weight", "layers.2.mlp.experts.down_proj"]),
    dict(target_modules=["q_proj"], target_parameters=[]),
    dict(target_modules="all-linear", target_parameters=[GATE_UP]),
    dict(target_modules=r".*\.(q|k)_proj", target_parameters=[GATE_UP, DOWN]),
    dict(target_modules=["q_proj"], target_parameters=[GATE_UP], exclude_modules=["experts", GATE_UP, "k_proj"]),
    dict(target_modules=["q_proj"], target_parameters=[GATE_UP], exclude_modules=r".*experts.*"),
    dict(target_modules=["q_proj"], target_parameters=[GATE_UP], layers_to_transform=[1]),
    dict(target_modules=[], target_parameters=[GATE_UP], layers_to_transform=[1], layers_pattern="layers"),
    dict(target_modules=[], target_parameters=[GATE_UP, DOWN], use_rslora=True, rank_pattern={"gate_up_proj": 4}),
    dict(
        target_modules=[],
        target_parameters=[GATE_UP, DOWN],
        rank_pattern={r"layers\.1\.mlp\.experts\.down_proj": 3, "experts": 5, "down_proj": 2},
        alpha_pattern={r".*\.gate_up_proj": 7, "mlp": 9},
    ),
    dict(
        target_modules=[],
        target_parameters=[GATE_UP],
        rank_pattern={r".*\.gate_up_proj": 16},
        alpha_pattern={r"^model\.layers\.0\.mlp\.experts\.gate_up_proj": 3, r".*\.gate_up_proj": 32},
    ),
    dict(target_modules=[], target_parameters=[DOWN], rank_pattern={"p.experts.down_proj": 5, "proj": 6, "own_proj": 7}),
]


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList()
        for _ in range(3):
            expert = torch.nn.Module()
            expert.w1 = torch.nn.Linear(8, 8)
            self.experts.append(expert)


class Stacked(torch.nn.Module):
    """Experts in one tensor each, declared in another order than that of their names."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.zeros(3, 16, 8))
        self.gate_up_proj_bias = torch.nn.Parameter(torch.zeros(3, 16))
        self.down_proj = torch.nn.Parameter(torch.zeros(3, 8, 8))


def build_stacked():
    model = build()
    for layer in model.model.layers:
        layer.mlp.experts = Stacked()
        layer.mlp.my_experts = Stacked()
        layer.mlp.router = torch.nn.Linear(8, 3)
    return model


def shape_of(module):
    return {
        "rank": module.r["default"],
        "alpha": module.lora_alpha["default"],
        "scale": module.scaling["default"],
    }


def read_back(case, folder):
    """The file that PEFT writes of a case, and the configuration that it reads from it."""
    config = LoraConfig(**{"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", **case})
    config.save_pretrained(folder)
    path = Path(folder) / "adapter_config.json"
    written = json.loads(path.read_text())
    # save_pretrained sorts the patterns, whose order decides which one is found first.
    for field in ("rank_pattern", "alpha_pattern"):
        written[field] = case.get(field, {})
    path.write_text(json.dumps(written))
    return written, LoraConfig.from_pretrained(folder)


def parameter_cases():
    cases = []
    for case in PARAMETER_CASES:
        with tempfile.TemporaryDirectory() as folder:
            written, config = read_back(case, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(build_stacked(), config)
        saved = set(get_peft_model_state_dict(model))
        modules, parameters = {}, {}
        for name, module in model.base_model.model.named_modules():
            if isinstance(module, ParamWrapper):
                path, *nested = name.split(".base_layer")
                a, b = (f"base_model.model.{name}.lora_{half}.weight" for half in "AB")
                saved -= {a, b}
                parameters[f"{path}.{module.parameter_name}"] = {
                    "module": path,
                    "depth": len(nested),
                    "names": [a, b],
                    **shape_of(module),
                }
            elif isinstance(module, LoraLayer):
                modules[name] = shape_of(module)
                saved -= {f"base_model.model.{name}.lora_{half}.weight" for half in "AB"}
        assert not saved, saved
        for field in ("target_modules", "exclude_modules"):
            if isinstance(written[field], list):
                written[field].sort()
        cases.append({"config": written, "modules": modules, "parameters": parameters})
    return cases


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
        with tempfile.TemporaryDirectory() as folder:
            written, config = read_back(case, folder)
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
                found[name] = shape_of(module)
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
    with tempfile.TemporaryDirectory() as folder:
        experts = LoraConfig(r=8, lora_alpha=16, target_modules=[], target_parameters=[GATE_UP, DOWN], task_type="CAUSAL_LM")
        experts.save_pretrained(folder)
        parameter_text = (Path(folder) / "adapter_config.json").read_text()
    stacked = build_stacked()
    document = {
        "linear_modules": linear,
        "fields": sorted(fields),
        "plain_file": text,
        "cases": cases,
        "parameter_file": parameter_text,
        "stacked_linear_modules": [
            {"name": name, "output_head": module is stacked.get_output_embeddings()}
            for name, module in stacked.named_modules()
            if isinstance(module, torch.nn.Linear)
        ],
        "parameters": [name for name, _ in stacked.named_parameters()],
        "parameter_cases": parameter_cases(),
    }
    Path(target).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
