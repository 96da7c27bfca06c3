#!/usr/bin/env python3
"""Writes the fixtures: tiny all-random models with the numbers that transformers and peft compute from them.

    tools/make_fixtures.py                 write every case of fixture_cases.py under fixtures/, and fixtures.sha256 beside this file
    tools/make_fixtures.py NAME...         write these cases alone, keeping the sums of the others
    tools/make_fixtures.py --check         regenerate into a scratch folder and compare with what is committed
    tools/make_fixtures.py --edits FILE    write the edits of configs that every case was checked with, for the tests to repeat

The reference reads the files that were written, in f32 on the CPU with eager attention. A case is refused when its
numbers could not catch a bug: a tensor or a named config field that does not move the logits, logits of a standard
deviation under 1, a greedy choice or a gradient too close to rounding, a token that reaches its experts by rounding.

Conventions of the numbers:
- `labels[:, 0]` has no predictor and is not counted; with left padding the first real token is not trained either,
  because its predictor is a padding position, whose value means nothing.
- positions count from the start of the row, also under left padding.
- `bf16.logits` are those of the same files with bf16 weights and activations: the error that a reader may have twice.
- Gradients have the names and shapes of the reference's parameters (experts stacked), as if the text model were
  loaded alone, while model.safetensors has those of released files.
- `greedy` is one uncached forward per new token on a model whose RoPE state is fresh, so that a dynamic base is
  that of the current length.
"""
import argparse
import contextlib
import copy
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import unittest.mock
import warnings
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from fixture_adapters import adapted, split_by_expert
from fixture_cases import CASES, DROP

SUMS = Path(__file__).with_name("fixtures.sha256")
TOLERANCE = 1e-4  # of the logits' standard deviation: what a reader of the fixtures is held to
MINIMUM_EFFECT = 20 * TOLERANCE
GREEDY_PROMPT, GREEDY_TOKENS, GREEDY_DISTINCT = 8, 24, 6
MAXIMUM_FIXTURE_BYTES = 300_000
MAXIMUM_TOTAL_BYTES = 18_000_000
TOWER = ".language_model."
# Of the spread of a router's or an indexer's scores: what the last one chosen is ahead of the first one left out.
CHOICE_MARGIN, NARROW_CHOICE_MARGIN, GREEDY_CHOICE_MARGIN = 4e-3, 3e-2, 1e-3
CHOICE_REPAIRS = 400
ROOT = Path(__file__).resolve().parent.parent


class Refused(Exception):
    """The case would let a bug pass."""


def generator_of(case, purpose):
    digest = hashlib.sha256(f"{case.name}/{purpose}/{case.seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))


def config_object(config):
    left_out = ("model_type", "architectures", "quantization_config")
    fields = {key: value for key, value in config.items() if key not in left_out}
    return AutoConfig.for_model(config["model_type"], **copy.deepcopy(fields))


EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def empty_model(config):
    return AutoModelForCausalLM.from_config(config_object(config), dtype=torch.float32, **EAGER).eval()


def text_model(model):
    """The causal language model inside a multimodal one, as if it were loaded alone; any other model is itself."""
    tower = getattr(model.model, "language_model", None)
    if tower is None:
        return model
    alone = AutoModelForCausalLM.from_config(model.config.get_text_config(), dtype=model.dtype, **EAGER)
    alone.model, alone.lm_head = tower, model.lm_head
    return alone.eval()


def whole_class(config):
    """The class that `architectures` names: that of the text model, or one that also has a vision tower."""
    return getattr(transformers, config["architectures"][0])


def text_name(name):
    """The name that a tensor has when the text model is loaded alone."""
    return re.sub(r"^(?:language_model\.|(model\.)language_model\.)", r"\1", name)


def is_text(name):
    return not any(part in name for part in ("vision", "visual", "multi_modal_projector"))


def is_prediction(name, config):
    """Whether a tensor belongs to the layers that predict further tokens, which the text model does without."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return name.startswith("mtp.") or bool(layer) and int(layer[1]) >= config["num_hidden_layers"]


def is_stack(name, value):
    return value.ndim == 3 and ".experts." in name


def random_tensor(name, shape, tied, generator, grow=()):
    """Every tensor away from its initial value: norms not 1, biases not 0, matrices that keep activations near 1."""
    for pattern, (kind, *values) in grow:
        if not re.search(pattern, name):
            continue
        if kind == "uniform":
            return values[0] + (values[1] - values[0]) * torch.rand(shape, generator=generator)
        if kind == "normal":
            return values[0] * torch.randn(shape, generator=generator)
        # A matrix of the given gain; the width that is summed over is the last one unless said otherwise.
        gain, width = values[0], shape[values[1] if len(values) > 1 else -1]
        return gain * torch.randn(shape, generator=generator) / width ** 0.5
    if name.endswith(".bias"):
        return 0.5 * torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.5 + torch.rand(shape, generator=generator)
    if "embed_tokens" in name:
        # A tied head scores the token that was just read by the square of this: small, or it repeats that token.
        return (0.4 if tied else 1.0) * torch.randn(shape, generator=generator)
    gain = 1.5 if any(part in name for part in ("q_proj", "k_proj", "lm_head")) else 1.0
    if tied and any(part in name for part in ("o_proj", "down_proj")):
        gain = 2.5
    return gain * torch.randn(shape, generator=generator) / shape[-1] ** 0.5


def released_weights(case):
    """Tensors under the names of released checkpoints, in the storage dtype; a tied head is left out."""
    generator = generator_of(case, "weights")
    model = empty_model(case.config)
    tied = model.config.get_text_config().tie_word_embeddings
    weights = {}
    for name, value in sorted(model.state_dict().items()):
        if tied and name == "lm_head.weight":
            continue
        weights[name] = random_tensor(name, value.shape, tied, generator, case.grow)
    whole = whole_class(case.config)
    if not isinstance(model, whole):
        # A folder with a vision tower: the text model's tensors under longer names, and the tower's.
        model, text = whole._from_config(config_object(case.config), dtype=torch.float32), weights
        weights = {}
        for name, value in sorted(model.state_dict().items()):
            if not is_text(name):
                weights[name] = random_tensor(name, value.shape, False, generator)
            elif text_name(name) in text:
                weights[name] = text[text_name(name)]
        if sum(map(is_text, weights)) != len(text):
            raise Refused("a tensor of the text model has no name in the whole model")
    weights = revert_weight_conversion(model, weights)
    if case.release is not None:
        weights = case.release(case, weights, generator)
    dtype = getattr(torch, case.storage)
    kept = [re.compile(pattern) for pattern in case.keeps_float32]
    return {name: (value.to(dtype) if value.dtype == torch.float32 and not any(k.search(name) for k in kept)
                   else value).contiguous() for name, value in weights.items()}


def write_model(case, folder):
    weights = released_weights(case)
    (folder / "config.json").write_text(json.dumps(case.config, indent=2) + "\n")
    if case.shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    place, size = {}, -(-len(names) // case.shards)
    for shard in range(case.shards):
        file = f"model-{shard + 1:05}-of-{case.shards:05}.safetensors"
        part = names[shard * size:(shard + 1) * size]
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        place.update({name: file for name in part})
    total = sum(value.numel() * value.element_size() for value in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def load_whole_model(folder, dtype=torch.float32, chosen=AutoModelForCausalLM):
    model, report = chosen.from_pretrained(folder, dtype=dtype, output_loading_info=True, **EAGER)
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    report["unexpected_keys"] = {name for name in report["unexpected_keys"]
                                 if is_text(name) and not is_prediction(name, config)}
    problems = {key: value for key, value in report.items() if value and key != "error_msgs"}
    if problems:
        raise Refused(f"the reference does not load its own files: {problems}")
    if dtype == torch.float32:
        # Of files in blocks the reference leaves the rest as it is stored.
        model.float()
    return model.eval()


def load_model(folder, dtype=torch.float32):
    return text_model(load_whole_model(folder, dtype))


def check_whole(folder):
    """The class that the config names, with its vision tower, finds every tensor too."""
    config = json.loads((folder / "config.json").read_text())
    _, report = whole_class(config).from_pretrained(folder, output_loading_info=True)
    if report["missing_keys"]:
        raise Refused(f"the reference misses {sorted(report['missing_keys'])}")


def adapted_model(case, folder, whole):
    """What an adapter is made for: the class that the config names, or the text model."""
    return load_whole_model(folder, chosen=whole_class(case.config)) if whole else load_model(folder)


def write_adapter(case, folder):
    """A PEFT folder with random A and B, holding nothing that depends on where or in which order it was written."""
    generator = generator_of(case, "adapter")
    base = adapted_model(case, folder, case.adapts_whole)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **case.adapter))
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                gain = 0.7 if "lora_A" in name else 0.5
                parameter.copy_(gain * torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    adapter = folder / "adapter"
    model.save_pretrained(adapter)
    (adapter / "README.md").unlink(missing_ok=True)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    if case.adapter_by_expert:
        stored = load_file(adapter / "adapter_model.safetensors")
        save_file(by_expert(case, stored), adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        config |= {"target_modules": list(case.adapter["target_modules"]), "target_parameters": None,
                   "rank_pattern": {}, "alpha_pattern": {}}
    config["base_model_name_or_path"] = case.name
    for field in ("target_modules", "target_parameters"):
        if isinstance(config[field], list):
            config[field].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def by_expert(case, tensors):
    if not case.adapter_by_expert:
        return tensors
    experts = case.config.get("num_local_experts") or case.config["num_experts"]
    return split_by_expert(tensors, case.config["model_type"], experts, case.adapter["r"])


def load_adapter(case, folder):
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    base = adapted_model(case, folder, any(TOWER in name for name in stored))
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    trainable = by_expert(case, {peft_name(name): value.detach() for name, value in model.named_parameters()
                                 if value.requires_grad})
    if stored.keys() != trainable.keys():
        raise Refused(f"adapter tensors differ from the trainable ones: {sorted(stored.keys() ^ trainable.keys())}")
    if not all(torch.equal(stored[name], trainable[name]) for name in stored):
        raise Refused("peft holds other values than those that are stored")
    return model.eval()


def peft_name(parameter_name):
    return parameter_name.replace(".default.", ".")


def alone_name(parameter_name):
    """The PEFT name that the parameter would have if the text model were alone."""
    return peft_name(parameter_name).replace(TOWER, ".")


def make_batch(case):
    generator = generator_of(case, "batch")
    vocabulary, padding_id = vocabulary_of(case.config), padding_of(case.config)
    rows = len(case.padding)
    ids = torch.randint(0, vocabulary, (rows, case.tokens), generator=generator)
    if padding_id is not None:
        if case.padding_id_in_text:
            ids[:, 9::6] = padding_id
        else:
            ids[ids == padding_id] = (padding_id + 5) % vocabulary
    mask = torch.ones_like(ids)
    labels = ids.clone()
    holes = torch.rand(ids.shape, generator=generator)
    for row, (left, right) in enumerate(case.padding):
        # Unequal numbers of trained tokens, so that a mean over rows differs from a mean over tokens.
        labels[row][holes[row] < 0.15 + 0.3 * row] = -100
        end = case.tokens - right
        if left:
            mask[row, :left], labels[row, :left + 1] = 0, -100
            ids[row, :left] = padding_id or 0
        if right:
            mask[row, end:], labels[row, end:] = 0, -100
            ids[row, end:] = padding_id or 0
    labels[0, 0] = ids[0, 0]
    if case.padding[0][0] or case.tokens - case.padding[0][1] < GREEDY_PROMPT:
        raise Refused("row 0 must begin with the tokens that the greedy continuation starts from")
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logits_of(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits


def without_gradient(case):
    return [*case.without_gradient, *case.without_effect]


def loss_and_gradients(model, batch, trainable, silent_names=()):
    """Loss, logits, hidden states and gradients of the named parameters, from one forward and backward."""
    model.zero_grad(set_to_none=True)
    output = model(**batch, use_cache=False, output_hidden_states=True)
    output.loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if not trainable(name):
            continue
        if any(re.search(pattern, name) for pattern in silent_names):
            continue
        if parameter.grad is None or not parameter.grad.abs().max() > 0:
            raise Refused(f"{name} gets no gradient")
        parts = parameter.grad if is_stack(name, parameter) else parameter.grad.unsqueeze(0)
        silent = [index for index, part in enumerate(parts) if not part.abs().max() > 0]
        if silent:
            raise Refused(f"{name} gets no gradient for the experts {silent}")
        gradients[name] = parameter.grad.detach().clone()
    model.zero_grad(set_to_none=True)
    return output, gradients


class Choices(TorchDispatchMode):
    """Keeps what every top-k chose from: the routers' and the indexers' scores with their indices."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.topk.default:
            self.made.append((args[0].detach(), result[1]))
        return result

    def by_token(self, mask):
        """(scores [B, T, X], indices [B, T, k]) of the choices that are made once a token.

        The others, within groups of experts, only pick what is summed, which is continuous.
        """
        for scores, indices in self.made:
            if scores.ndim == 2 and scores.shape[0] == mask.numel():
                yield scores.view(*mask.shape, -1), indices.view(*mask.shape, -1)
            elif scores.ndim == 3 and scores.shape[:2] == mask.shape:
                yield scores, indices

    def close(self, mask, margin):
        """The tokens [B, T] of which some choice is decided by less than `margin` of the scores' spread."""
        found = torch.zeros_like(mask, dtype=torch.bool)
        for scores, indices in self.by_token(mask):
            k = indices.shape[-1]
            if k == scores.shape[-1]:
                continue
            # What a mask hides is minus infinity, or the lowest f32 or bf16.
            scores = scores.float().masked_fill(scores < -1e30, float("-inf"))
            real = scores[mask == 1]
            spread = real[real.isfinite()].std()
            ordered = scores.sort(dim=-1, descending=True).values
            gap = ordered[..., k - 1] - ordered[..., k]
            found |= gap.isfinite() & (gap < margin * spread) & (mask == 1)
        return found

    def same(self, other, mask):
        def of(choices):
            for scores, indices in choices.by_token(mask):
                chosen = torch.zeros_like(scores).scatter_(-1, indices, 1.0)
                yield chosen.masked_fill(scores < -1e30, 0.0)[mask == 1]
        return len(self.made) == len(other.made) and all(
            torch.equal(a, b) for a, b in zip(of(self), of(other), strict=True))


def choices_of(model, batch):
    with Choices() as choices:
        logits_of(model, batch)
    return choices


def settle_choices(case, folder, batch):
    """Replaces tokens until no router or indexer is near a tie, with and without the adapter."""
    generator = generator_of(case, "choices")
    models = [load_model(folder), load_adapter(case, folder)]
    mask, padding_id = batch["attention_mask"], padding_of(case.config)
    for _ in range(CHOICE_REPAIRS):
        close = sum(choices_of(model, batch).close(mask, NARROW_CHOICE_MARGIN if case.narrow else CHOICE_MARGIN)
                    for model in models)
        if not close.any():
            break
        for row in close.any(dim=1).nonzero()[:, 0].tolist():
            place = int(close[row].int().argmax())
            token = int(torch.randint(0, vocabulary_of(case.config), (1,), generator=generator))
            if token == padding_id:
                continue
            batch["input_ids"][row, place] = token
            if batch["labels"][row, place] != -100:
                batch["labels"][row, place] = token
    else:
        raise Refused(f"a choice is close after {CHOICE_REPAIRS} other tokens")
    if case.narrow:
        narrow = choices_of(load_model(folder, torch.bfloat16), batch)
        if not narrow.same(choices_of(models[0], batch), mask):
            raise Refused("the reference in bf16 chooses other experts")


def vocabulary_of(config):
    return config.get("text_config", config)["vocab_size"]


def padding_of(config):
    """The reference's, which may be the family's default."""
    return config_object(config).get_text_config().pad_token_id


def greedy(folder, ids, spread):
    model = load_model(folder)
    sequence = ids[:1, :GREEDY_PROMPT]
    for step in range(GREEDY_TOKENS):
        with torch.no_grad(), Choices() as choices:
            last = model(input_ids=sequence, use_cache=False).logits[0, -1]
        if choices.close(torch.ones_like(sequence), GREEDY_CHOICE_MARGIN).any():
            raise Refused(f"an expert is chosen by rounding at greedy step {step}; choose another seed")
        best = last.topk(2).values
        if best[0] - best[1] < 10 * TOLERANCE * spread:
            raise Refused(f"greedy step {step} is decided by {best[0] - best[1]:.2e}; choose another seed")
        sequence = torch.cat([sequence, last.argmax().view(1, 1)], dim=1)
    continuation = sequence[:, GREEDY_PROMPT:]
    if len(continuation.unique()) < GREEDY_DISTINCT:
        raise Refused(f"the greedy continuation repeats itself: {continuation.tolist()[0]}")
    return continuation


def expected_numbers(case, folder, batch):
    model = load_model(folder)
    output, gradients = loss_and_gradients(model, batch, lambda name: True, without_gradient(case))
    if not torch.equal(logits_of(load_whole_model(folder), batch), output.logits.detach()):
        raise Refused("the text model alone computes other logits than inside the whole")
    # Whatever state the forward left in the model (a grown dynamic base) stays behind with it.
    adapted = load_adapter(case, folder)
    adapted_output, adapted_gradients = loss_and_gradients(adapted, batch, lambda name: "lora_" in name)
    spread = float(output.logits[batch["attention_mask"] == 1].std())
    if spread < 1.0:
        raise Refused(f"the logits have standard deviation {spread:.3f}, which is below 1")
    numbers = {**batch, "logits": output.logits, "loss": output.loss,
               "adapter.logits": adapted_output.logits, "adapter.loss": adapted_output.loss,
               "greedy": greedy(folder, batch["input_ids"], spread)}
    numbers |= {f"hidden.{index}": value for index, value in enumerate(output.hidden_states)}
    numbers |= {f"dequant.{name}": value for name, value in dequantised(folder, model).items()}
    numbers |= {f"grad.{name}": value for name, value in gradients.items()}
    numbers |= {f"adapter.grad.{alone_name(name)}": value for name, value in adapted_gradients.items()}
    check_rounding(case, folder, batch, numbers, spread)
    if case.adapter_by_expert:
        gradients = {peft_name(name): value for name, value in adapted_gradients.items()}
        numbers = {name: value for name, value in numbers.items() if not name.startswith("adapter.grad.")}
        numbers |= {f"adapter.grad.{name}": value for name, value in by_expert(case, gradients).items()}
    return {name: value.detach().contiguous() for name, value in numbers.items()}, spread


def stored_tensors(folder):
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(path)
    return tensors


def dequantised(folder, model):
    """What the reference makes of each block-quantised tensor, under the name that released unquantised files use.

    In bf16 where that holds the values exactly.
    """
    stored = stored_tensors(folder)
    quantised = {name.removesuffix(end) for name in stored for end in ("_scale_inv", "_blocks") if name.endswith(end)}
    if not quantised:
        return {}
    values = revert_weight_conversion(empty_model(json.loads((folder / "config.json").read_text())),
                                      model.state_dict())
    chosen = {name: values[name].clone() for name in sorted(quantised) if name in values}
    return {name: value.bfloat16() if torch.equal(value.bfloat16().float(), value) else value
            for name, value in chosen.items()}


SOFTMAX = torch.nn.functional.softmax


def precise_softmax(scores, dim, dtype=None):
    """Stays in f64, where the mask's -1.8e308 would overflow the f32 softmax of the reference on padding rows."""
    return SOFTMAX(scores.clamp(min=torch.finfo(torch.float32).min), dim=dim)


def check_rounding(case, folder, batch, numbers, spread):
    """The same numbers with f64 products: what differs is rounding, which must be far below the tolerances."""
    real = batch["attention_mask"] == 1
    for loader, prefix, trainable, rename in (
            (load_model, "", lambda name: True, lambda name: name),
            (lambda folder: load_adapter(case, folder), "adapter.", lambda name: "lora_" in name, alone_name)):
        with unittest.mock.patch("torch.nn.functional.softmax", precise_softmax):
            output, gradients = loss_and_gradients(loader(folder).double(), batch, trainable, without_gradient(case))
        error = (output.logits - numbers[prefix + "logits"].double())[real].abs().max() / spread
        if error > TOLERANCE / 4:
            raise Refused(f"{prefix}logits are only good to {error:.1e} of their spread")
        for name, precise in gradients.items():
            error = (numbers[f"{prefix}grad.{rename(name)}"].double() - precise).norm() / precise.norm()
            if error > 1e-4:
                raise Refused(f"the gradient of {name} is only good to {error:.1e}")


def moved(model, batch, base, spread):
    """How far the logits of the real tokens are from `base`, in standard deviations."""
    real = batch["attention_mask"] == 1
    return float((logits_of(model, batch) - base)[real].abs().max()) / spread


@contextlib.contextmanager
def changed(parameter, value):
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.copy_(value)
    yield
    with torch.no_grad():
        parameter.copy_(before)


def changeable(model):
    """Parameters and stored buffers, stacked experts one by one."""
    stored = model.state_dict().keys()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name not in stored:
            continue
        parts = value.detach() if is_stack(name, value) else [value]
        for index, part in enumerate(parts):
            yield name, f"{name}[{index}]" if len(parts) > 1 else name, part


def check_effects(case, folder, batch, numbers, spread):
    """Every tensor, of the model and of the adapter, moves the logits."""
    for model, base, chosen in ((load_model(folder), numbers["logits"], lambda name: "lora_" not in name),
                                (load_adapter(case, folder), numbers["adapter.logits"], lambda name: "lora_" in name)):
        noise = generator_of(case, "effects")
        for name, label, parameter in changeable(model):
            if not chosen(name):
                continue
            if any(re.search(pattern, name) for pattern in case.without_effect):
                with changed(parameter, parameter + parameter.std() * torch.randn(parameter.shape, generator=noise)):
                    effect = moved(model, batch, base, spread)
                if effect > TOLERANCE / 10:
                    raise Refused(f"changing {label} does move the logits, by {effect:.1e} of their spread")
                continue
            # What only chooses, by rank, is exchanged for noise of its own spread.
            chooses = any(re.search(pattern, name) for pattern in case.chooses)
            other = parameter.std() * torch.randn(parameter.shape, generator=noise) if chooses else parameter * 1.1
            with changed(parameter, other):
                effect = moved(model, batch, base, spread)
            if effect < MINIMUM_EFFECT and any(name.endswith(end) for end in case.scale_invariant):
                random = parameter.std() * torch.randn(parameter.shape, generator=noise)
                with changed(parameter, parameter + 0.1 * random):
                    effect = moved(model, batch, base, spread)
            if effect < MINIMUM_EFFECT:
                raise Refused(f"changing {label} by a tenth moves the logits by {effect:.1e} of their spread only")


def pattern_value(patterns, name, default):
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", name)), default)


def check_merge(folder, batch, numbers, spread):
    """Adapters of stacked experts do what this function, and not only peft, takes their names and shapes to mean."""
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    if not any(".experts." in name for name in adapter):
        return
    model = load_model(folder)
    parameters = dict(model.named_parameters())
    targeted = [name for name in parameters if any(name == target or name.endswith("." + target)
                                                   for target in config["target_parameters"] or [])]
    for key in [key for key in adapter if "lora_A" in key]:
        module = text_name(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        name, part = adapted(module, parameters, targeted)
        parameter = parameters[name]
        label = name.removesuffix(".weight")
        rank = pattern_value(config["rank_pattern"], label, config["r"])
        alpha = pattern_value(config["alpha_pattern"], label, config["lora_alpha"])
        a, b = adapter[key], adapter[key.replace("lora_A", "lora_B")]
        if parameter.ndim == 3 and part is None:
            experts = parameter.shape[0]
            delta = torch.einsum("ore,eri->eoi", b.view(-1, rank, experts), a.view(experts, rank, -1))
            if getattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed", False):
                delta = delta.transpose(1, 2)
        else:
            delta = b @ a
        with torch.no_grad():
            place = parameter if part is None else parameter[part]
            place += alpha / (rank ** 0.5 if config["use_rslora"] else rank) * delta
    effect = moved(model, batch, numbers["adapter.logits"], spread)
    if effect > TOLERANCE / 4:
        raise Refused(f"the adapter merged by hand gives logits that differ by {effect:.1e} of their spread")


def with_edits(config, edits):
    result = copy.deepcopy(config)
    for path, value in edits:
        *parents, last = path.split(".")
        place = result
        for parent in parents:
            place = place[parent]
        if value is DROP:
            place.pop(last)
        else:
            place[last] = value
    return result


def check_config_edits(case, folder, batch, numbers, spread):
    """The named config fields are reached by this batch, and those to be ignored are."""
    state = load_model(folder).state_dict()

    def logits_by(config):
        model = text_model(empty_model(config))
        model.load_state_dict(state)
        model.tie_weights()
        return logits_of(model, batch)

    # Made in the same way: tensors that lie in a file may lie at other places of a vector's, and be summed in another order.
    unedited, real = logits_by(case.config), batch["attention_mask"] == 1
    for edits, must_move in [(edits, True) for edits in case.matters] + [(edits, False) for edits in case.ignored]:
        config = with_edits(case.config, edits)
        if config == case.config:
            raise Refused(f"the edit {edits} changes nothing in the config")
        effect = float((logits_by(config) - unedited)[real].abs().max()) / spread
        if must_move and effect < MINIMUM_EFFECT:
            raise Refused(f"the edit {edits} moves the logits by {effect:.1e} of their spread only")
        if not must_move and effect > 0:
            raise Refused(f"the edit {edits} moves the logits by {effect:.1e} of their spread")


def write_edits(path):
    """The edits of all cases: a field's path with its new value, or without one where the field is removed."""
    def listed(edits):
        return [{"field": field} | ({} if value is DROP else {"value": value}) for field, value in edits]

    cases = {case.name: {"matters": [listed(edits) for edits in case.matters],
                         "ignored": [listed(edits) for edits in case.ignored]} for case in CASES}
    lines = [f"{json.dumps(name)}: {json.dumps(edits)}" for name, edits in cases.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def folder_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_case(case, root):
    folder = root / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        write_model(case, folder)
        check_whole(folder)
        write_adapter(case, folder)
        batch = make_batch(case)
        settle_choices(case, folder, batch)
        numbers, spread = expected_numbers(case, folder, batch)
        check_merge(folder, batch, numbers, spread)
        if case.narrow:
            numbers["bf16.logits"] = logits_of(load_model(folder, torch.bfloat16), batch).contiguous()
        check_effects(case, folder, batch, numbers, spread)
        check_config_edits(case, folder, batch, numbers, spread)
        save_file(numbers, folder / "expected.safetensors")
        size = folder_bytes(folder)
        if size > MAXIMUM_FIXTURE_BYTES:
            raise Refused(f"the fixture takes {size} bytes, more than {MAXIMUM_FIXTURE_BYTES}")
    except Refused as reason:
        shutil.rmtree(folder)
        print(f"error: case {case.name} is refused: {reason}", file=sys.stderr)
        return False
    trained = int((batch["labels"][:, 1:] != -100).sum())
    print(f"{case.name:32} {size:7} bytes  logits std {spread:6.3f}  loss {float(numbers['loss']):7.4f}"
          f"  adapter loss {float(numbers['adapter.loss']):7.4f}  {trained} trained tokens", flush=True)
    return True


def sums_of(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_sums(root):
    lines = [f"{digest}  {name}\n" for name, digest in sums_of(root).items()]
    SUMS.write_text("".join(lines))


def tensors_agree(left, right):
    """Whether two files hold the same tensors, floats to a hundredth of the tolerance: processors round differently."""
    with safe_open(left, "pt") as a, safe_open(right, "pt") as b:
        if sorted(a.keys()) != sorted(b.keys()):
            return False
        for name in a.keys():
            x, y = a.get_tensor(name), b.get_tensor(name)
            if x.dtype != y.dtype or x.shape != y.shape:
                return False
            if not x.is_floating_point() and not torch.equal(x, y):
                return False
            scale = x.double().abs().max().clamp(min=1e-30)
            if x.is_floating_point() and (x.double() - y.double()).abs().max() / scale > TOLERANCE / 10:
                return False
    return True


def check(cases, root):
    """Regenerates and compares; bytes that differ only by rounding in expected.safetensors are counted, not refused."""
    recorded = {}
    for line in SUMS.read_text().splitlines():
        digest, name = line.split("  ", 1)
        recorded[name] = digest
    present = sums_of(root)
    wrong = [f"{name}: differs from {SUMS.name}" for name in sorted(recorded.keys() | present.keys())
             if recorded.get(name) != present.get(name)]
    rounded = 0
    with tempfile.TemporaryDirectory() as scratch:
        wrong += [f"{case.name}: refused" for case in cases if not write_case(case, Path(scratch))]
        fresh = sums_of(Path(scratch))
        names = {case.name for case in cases}
        for name in sorted(fresh.keys() | {name for name in present if name.split("/")[0] in names}):
            if fresh.get(name) == present.get(name):
                continue
            both = name in fresh and name in present
            if both and name.endswith("expected.safetensors") and tensors_agree(root / name, Path(scratch) / name):
                rounded += 1
                continue
            wrong.append(f"{name}: regenerated differently")
    for problem in wrong:
        print(problem, file=sys.stderr)
    print(f"{len(fresh)} files regenerated, {rounded} differ by rounding, {len(wrong)} problems")
    return not wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--out", type=Path, default=ROOT / "fixtures")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--edits", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.edits:
        write_edits(arguments.edits)
        return
    unknown = set(arguments.names) - {case.name for case in CASES}
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    cases = [case for case in CASES if not arguments.names or case.name in arguments.names]
    if arguments.check:
        sys.exit(0 if check(cases, arguments.out) else 1)
    refused = [case.name for case in cases if not write_case(case, arguments.out)]
    if arguments.out == ROOT / "fixtures":
        write_sums(arguments.out)
    total = folder_bytes(arguments.out)
    print(f"{len(cases) - len(refused)} cases written; {arguments.out.name}/ holds {total} bytes")
    if total > MAXIMUM_TOTAL_BYTES:
        sys.exit(f"error: the fixtures take {total} bytes, more than {MAXIMUM_TOTAL_BYTES}")
    if refused:
        sys.exit(f"error: {len(refused)} cases are refused: {', '.join(refused)}")


if __name__ == "__main__":
    main()
