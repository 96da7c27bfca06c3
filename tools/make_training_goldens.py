#!/usr/bin/env python3
"""Writes what torch and transformers compute for schedules, AdamW, clipping and cross-entropy, as small JSON files.

    tools/make_training_goldens.py            write crates/pmetal/tests/data/*.json
    tools/make_training_goldens.py --check    compare with what is committed

Floats are written so that they read back to the same f32 (values, gradients) or f64 (learning rates, sums).
"""
import argparse
import json
import os
import sys
import warnings
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
warnings.filterwarnings("ignore")

import torch
import transformers

OUT = Path(__file__).resolve().parent.parent / "crates" / "pmetal" / "tests" / "data"
SOURCE = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"


def learning_rates(name, base, steps, warm_up, options):
    """The rate that each of the `steps` optimizer steps uses, and the one left after the last."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=base)
    scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=warm_up, num_training_steps=steps,
                                           scheduler_specific_kwargs=options)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates, optimizer.param_groups[0]["lr"]


def schedules():
    table = [
        # name in transformers, base rate, steps, warm-up steps, options
        ("constant", 2e-4, 7, 0, {}),
        ("constant_with_warmup", 2e-4, 11, 4, {}),
        ("linear", 2e-4, 23, 0, {}),
        ("linear", 1e-3, 23, 5, {}),
        ("linear", 1e-3, 1, 0, {}),
        ("cosine", 2e-4, 23, 0, {}),
        ("cosine", 3e-5, 31, 1, {}),
        ("cosine", 3e-5, 31, 10, {}),
        ("cosine_with_min_lr", 2e-4, 29, 3, {"min_lr_rate": 0.1}),
        ("cosine_with_min_lr", 2e-4, 29, 0, {"min_lr_rate": 0.25}),
    ]
    cases = []
    for name, base, steps, warm_up, options in table:
        rates, final = learning_rates(name, base, steps, warm_up, options)
        cases.append({"name": name, "base_lr": base, "steps": steps, "warm_up_steps": warm_up,
                      "min_lr_ratio": options.get("min_lr_rate", 0.0), "lr": rates, "lr_after_last_step": final})
    return {"source": SOURCE, "cases": cases}


def fixed_gradients(shape, steps, generator):
    """Gradients from 1e-9 (where eps decides) to 10, one coordinate always zero, some zero in some steps."""
    scale = 10.0 ** torch.linspace(-9, 1, shape.numel()).view(shape)
    gradients = torch.randn((steps, *shape), generator=generator) * scale
    gradients[:, ..., 0].mul_((torch.arange(steps) % 3 != 0).float().view(-1, *[1] * (len(shape) - 1)))
    gradients.view(steps, -1)[:, shape.numel() // 2] = 0.0
    return gradients


def adamw():
    table = [
        # weight decay of the matrix (the vector has none), betas, eps, rates
        (0.1, (0.9, 0.999), 1e-8, [1e-2] * 50),
        (0.01, (0.9, 0.95), 1e-6, [1e-3 * (50 - step) / 50 for step in range(50)]),
    ]
    cases = []
    for weight_decay, betas, eps, rates in table:
        generator = torch.Generator().manual_seed(len(cases) + 1)
        start = {"matrix": torch.randn(5, 7, generator=generator), "vector": torch.randn(6, generator=generator)}
        gradients = {name: fixed_gradients(value.shape, len(rates), generator) for name, value in start.items()}
        parameters = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
        optimizer = torch.optim.AdamW(
            [{"params": [parameters["matrix"]], "weight_decay": weight_decay},
             {"params": [parameters["vector"]], "weight_decay": 0.0}],
            lr=rates[0], betas=betas, eps=eps, foreach=False, fused=False)
        after = {name: [] for name in start}
        for step, rate in enumerate(rates):
            for group in optimizer.param_groups:
                group["lr"] = rate
            for name, parameter in parameters.items():
                parameter.grad = gradients[name][step].clone()
            optimizer.step()
            for name, parameter in parameters.items():
                after[name].append(parameter.detach().flatten().tolist())
        cases.append({
            "betas": betas, "eps": eps, "lr": rates,
            "tensors": [{"name": name, "shape": list(start[name].shape),
                         "weight_decay": weight_decay if name == "matrix" else 0.0,
                         "start": start[name].flatten().tolist(),
                         "gradients": gradients[name].flatten(1).tolist(), "after": after[name]}
                        for name in start]})
    return {"source": SOURCE, "cases": cases}


def clipping():
    generator = torch.Generator().manual_seed(3)
    table = [
        # what it shows, scale of the gradients, maximum norm
        ("above the maximum", 3.0, 1.0), ("below the maximum", 0.01, 1.0), ("far above the maximum", 1e6, 0.3),
        ("all zero", 0.0, 1.0), ("tiny, where the added 1e-6 shows", 3e-6, 1e-6),
    ]
    cases = []
    for title, scale, maximum in table:
        shapes = [(3, 4), (5,), (1,), (2, 3)]
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
        before = [parameter.grad.flatten().tolist() for parameter in parameters]
        norm = torch.nn.utils.clip_grad_norm_(parameters, maximum, foreach=False)
        cases.append({"title": title, "max_norm": maximum, "total_norm": norm.item(), "gradients": before,
                      "clipped": [parameter.grad.flatten().tolist() for parameter in parameters]})
    return {"source": SOURCE, "cases": cases}


def cross_entropy():
    """Sums over rows [B, T] whose logits score the label one position later; gradients are of the sum."""
    generator = torch.Generator().manual_seed(4)
    table = [
        # what it shows, B, T, V, scale of the logits, share of ignored labels
        ("ordinary", 2, 5, 17, 2.0, 0.3), ("nothing ignored", 1, 4, 11, 1.0, 0.0),
        ("large logits", 2, 4, 13, 60.0, 0.25), ("everything ignored", 1, 3, 7, 1.0, 1.0),
        ("one trained token", 1, 2, 33, 3.0, 0.0),
    ]
    cases = []
    for title, rows, tokens, vocabulary, scale, ignored in table:
        logits = scale * torch.randn((rows, tokens, vocabulary), generator=generator)
        labels = torch.randint(0, vocabulary, (rows, tokens), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < ignored] = -100
        precise = logits.double().requires_grad_()
        loss = torch.nn.functional.cross_entropy(
            precise[:, :-1].reshape(-1, vocabulary), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum")
        loss.backward()
        cases.append({"title": title, "shape": [rows, tokens, vocabulary], "logits": logits.flatten().tolist(),
                      "labels": labels.flatten().tolist(), "loss_sum": loss.item(),
                      "trained_tokens": int((labels[:, 1:] != -100).sum()),
                      "gradients": precise.grad.float().flatten().tolist()})
    return {"source": SOURCE, "cases": cases}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wrong = []
    for name, make in (("schedules", schedules), ("adamw", adamw), ("clipping", clipping),
                       ("cross_entropy", cross_entropy)):
        text = json.dumps(make(), allow_nan=False).replace('{"', '\n{"').lstrip() + "\n"
        path = arguments.out / f"{name}.json"
        if arguments.check:
            if not path.exists() or path.read_text() != text:
                wrong.append(path.name)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(f"{path.name}: {path.stat().st_size} bytes")
    if wrong:
        sys.exit(f"error: regenerated differently: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
