#!/usr/bin/env python3
"""Writes the fixtures: tiny all-random models with the numbers that transformers and peft compute from them.

    tools/make_fixtures.py                 write every case of fixture_cases.py under fixtures/, and fixtures.sha256 beside this file
    tools/make_fixtures.py NAME...         write these cases alone, keeping the sums of the others
    tools/make_fixtures.py --check         regenerate into a scratch folder and compare with what is committed

The reference reads the files that were written, in f32 on the CPU with eager attention. A case is refused when its
numbers could not catch a bug: a tensor or a named config field that does not move the logits, logits of a standard
deviation under 1, a greedy choice or a gradient too close to rounding.

Conventions of the numbers:
- `labels[:, 0]` has no predictor and is not counted; with left padding the first real token is not trained either,
  because its predictor is a padding position, whose value means nothing.
- positions count from the start of the row, also under left padding.
- `bf16.logits` are those of the same files with bf16 weights and activations: the error that a reader may have twice.
- `greedy` is one uncached forward per new token on a model whose RoPE state is fresh, so that a dynamic base is
  that of the current length.
"""
import argparse
import contextlib
import copy
import hashlib
import json
import os
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
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from fixture_cases import CASES, DROP

SUMS = Path(__file__).with_name("fixtures.sha256")
TOLERANCE = 1e-4  # of the logits' standard deviation: what a reader of the fixtures is held to
MINIMUM_EFFECT = 20 * TOLERANCE
GREEDY_PROMPT, GREEDY_TOKENS, GREEDY_DISTINCT = 8, 24, 6
MAXIMUM_FIXTURE_BYTES = 300_000
MAXIMUM_TOTAL_BYTES = 6_000_000
ROOT = Path(__file__).resolve().parent.parent


class Refused(Exception):
    """The case would let a bug pass."""


def generator_of(case, purpose):
    digest = hashlib.sha256(f"{case.name}/{purpose}/{case.seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))


def config_object(config):
    fields = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    return AutoConfig.for_model(config["model_type"], **copy.deepcopy(fields))


def empty_model(config):
    model = AutoModelForCausalLM.from_config(config_object(config), attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def random_tensor(name, shape, tied, generator):
    """Every tensor away from its initial value: norms not 1, biases not 0, matrices that keep activations near 1."""
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
    tied = case.config["tie_word_embeddings"]
    weights = {}
    for name, value in sorted(model.state_dict().items()):
        if tied and name == "lm_head.weight":
            continue
        weights[name] = random_tensor(name, value.shape, tied, generator).to(getattr(torch, case.storage)).contiguous()
    return weights


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


def load_model(folder, dtype=torch.float32):
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True)
    problems = {key: value for key, value in report.items() if value and key != "error_msgs"}
    if problems:
        raise Refused(f"the reference does not load its own files: {problems}")
    return model.eval()


def write_adapter(case, folder):
    """A PEFT folder with random A and B, holding nothing that depends on where or in which order it was written."""
    generator = generator_of(case, "adapter")
    model = get_peft_model(load_model(folder), LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **case.adapter))
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
    config["base_model_name_or_path"] = case.name
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(folder):
    model = PeftModel.from_pretrained(load_model(folder), folder / "adapter", is_trainable=True)
    stored = set(load_file(folder / "adapter" / "adapter_model.safetensors"))
    trainable = {peft_name(name) for name, value in model.named_parameters() if value.requires_grad}
    if stored != trainable:
        raise Refused(f"adapter tensors differ from the trainable ones: {sorted(stored ^ trainable)}")
    return model.eval()


def peft_name(parameter_name):
    return parameter_name.replace(".default.", ".")


def make_batch(case):
    generator = generator_of(case, "batch")
    vocabulary, padding_id = case.config["vocab_size"], case.config.get("pad_token_id")
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


def loss_and_gradients(model, batch, trainable):
    """Loss, logits, hidden states and gradients of the named parameters, from one forward and backward."""
    model.zero_grad(set_to_none=True)
    output = model(**batch, use_cache=False, output_hidden_states=True)
    output.loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if not trainable(name):
            continue
        if parameter.grad is None or not parameter.grad.abs().max() > 0:
            raise Refused(f"{name} gets no gradient")
        gradients[name] = parameter.grad.detach().clone()
    model.zero_grad(set_to_none=True)
    return output, gradients


def greedy(folder, ids, spread):
    model = load_model(folder)
    sequence = ids[:1, :GREEDY_PROMPT]
    for step in range(GREEDY_TOKENS):
        with torch.no_grad():
            last = model(input_ids=sequence, use_cache=False).logits[0, -1]
        best = last.topk(2).values
        if best[0] - best[1] < 10 * TOLERANCE * spread:
            raise Refused(f"greedy step {step} is decided by {best[0] - best[1]:.2e}; choose another seed")
        sequence = torch.cat([sequence, last.argmax().view(1, 1)], dim=1)
    continuation = sequence[:, GREEDY_PROMPT:]
    if len(continuation.unique()) < GREEDY_DISTINCT:
        raise Refused(f"the greedy continuation repeats itself: {continuation.tolist()[0]}")
    return continuation


def expected_numbers(folder, batch):
    model = load_model(folder)
    output, gradients = loss_and_gradients(model, batch, lambda name: True)
    # Whatever state the forward left in the model (a grown dynamic base) stays behind with it.
    adapted = load_adapter(folder)
    adapted_output, adapted_gradients = loss_and_gradients(adapted, batch, lambda name: "lora_" in name)
    spread = float(output.logits[batch["attention_mask"] == 1].std())
    if spread < 1.0:
        raise Refused(f"the logits have standard deviation {spread:.3f}, which is below 1")
    numbers = {**batch, "logits": output.logits, "loss": output.loss,
               "adapter.logits": adapted_output.logits, "adapter.loss": adapted_output.loss,
               "greedy": greedy(folder, batch["input_ids"], spread)}
    numbers |= {f"hidden.{index}": value for index, value in enumerate(output.hidden_states)}
    numbers |= {f"grad.{name}": value for name, value in gradients.items()}
    numbers |= {f"adapter.grad.{peft_name(name)}": value for name, value in adapted_gradients.items()}
    check_rounding(folder, batch, numbers, spread)
    return {name: value.detach().contiguous() for name, value in numbers.items()}, spread


SOFTMAX = torch.nn.functional.softmax


def precise_softmax(scores, dim, dtype=None):
    """Stays in f64, where the mask's -1.8e308 would overflow the f32 softmax of the reference on padding rows."""
    return SOFTMAX(scores.clamp(min=torch.finfo(torch.float32).min), dim=dim)


def check_rounding(folder, batch, numbers, spread):
    """The same numbers with f64 products: what differs is rounding, which must be far below the tolerances."""
    real = batch["attention_mask"] == 1
    for loader, prefix, trainable, rename in (
            (load_model, "", lambda name: True, lambda name: name),
            (load_adapter, "adapter.", lambda name: "lora_" in name, peft_name)):
        with unittest.mock.patch("torch.nn.functional.softmax", precise_softmax):
            output, gradients = loss_and_gradients(loader(folder).double(), batch, trainable)
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


def check_effects(case, folder, batch, numbers, spread):
    """Every tensor, of the model and of the adapter, moves the logits."""
    for model, base, chosen in ((load_model(folder), numbers["logits"], lambda name: True),
                                (load_adapter(folder), numbers["adapter.logits"], lambda name: "lora_" in name)):
        noise = generator_of(case, "effects")
        for name, parameter in model.named_parameters():
            if not chosen(name):
                continue
            with changed(parameter, parameter * 1.1):
                effect = moved(model, batch, base, spread)
            if effect < MINIMUM_EFFECT and any(name.endswith(end) for end in case.scale_invariant):
                random = parameter.std() * torch.randn(parameter.shape, generator=noise)
                with changed(parameter, parameter + 0.1 * random):
                    effect = moved(model, batch, base, spread)
            if effect < MINIMUM_EFFECT:
                raise Refused(f"changing {name} by a tenth moves the logits by {effect:.1e} of their spread only")


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
    for edits, must_move in [(edits, True) for edits in case.matters] + [(edits, False) for edits in case.ignored]:
        config = with_edits(case.config, edits)
        if config == case.config:
            raise Refused(f"the edit {edits} changes nothing in the config")
        model = empty_model(config)
        model.load_state_dict(state)
        effect = moved(model, batch, numbers["logits"], spread)
        if must_move and effect < MINIMUM_EFFECT:
            raise Refused(f"the edit {edits} moves the logits by {effect:.1e} of their spread only")
        if not must_move and effect > 0:
            raise Refused(f"the edit {edits} moves the logits by {effect:.1e} of their spread")


def folder_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_case(case, root):
    folder = root / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        write_model(case, folder)
        write_adapter(case, folder)
        batch = make_batch(case)
        numbers, spread = expected_numbers(folder, batch)
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
    arguments = parser.parse_args()
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
    write_sums(arguments.out)
    total = folder_bytes(arguments.out)
    print(f"{len(cases) - len(refused)} cases written; {arguments.out.name}/ holds {total} bytes")
    if total > MAXIMUM_TOTAL_BYTES:
        sys.exit(f"error: the fixtures take {total} bytes, more than {MAXIMUM_TOTAL_BYTES}")
    if refused:
        sys.exit(f"error: {len(refused)} cases are refused: {', '.join(refused)}")


if __name__ == "__main__":
    main()
