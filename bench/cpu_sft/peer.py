#!/usr/bin/env python3
"""The peer of the CPU fine-tuning benchmark: one LoRA step of transformers + peft, timed on the CPU.

Work: a decoder built from a config with random weights, LoRA on its seven projections, a fixed batch of random tokens
that are all trained, forward, backward, clipping off, AdamW. Prints one JSON line on stdout; talk goes to stderr.
Where peft is not installed (or with --adapter plain) a hand-written LoRA linear of equal work takes its place.
"""
import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time

# Before torch is imported: an accelerator that is present must not take part.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="config.json of the model; weights are random")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32", help="dtype of the frozen weights")
    parser.add_argument("--adapter-dtype", choices=["f32", "model"], default="f32",
                        help="f32 is what peft does by default; model puts A and B in the dtype of the weights")
    parser.add_argument("--autocast", action="store_true", help="run forward under torch.autocast(bfloat16)")
    parser.add_argument("--adapter", choices=["auto", "peft", "plain"], default="auto")
    parser.add_argument("--peft-path", help="folder that holds the package peft, put in front of sys.path")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32.0)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.steps < 5:
        parser.error("--steps: a median needs at least 5 timed steps")
    return arguments


def cpu_model():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def bf16_features():
    """The bf16 instructions that the CPU names, without which its bf16 products are emulated."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("flags"):
                    flags = set(line.split())
                    return sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"})
    except OSError:
        pass
    return []


def build_model(arguments, torch, transformers):
    with open(arguments.config, encoding="utf-8") as file:
        raw = json.load(file)
    model_type = raw.pop("model_type")
    for name in ("torch_dtype", "dtype", "transformers_version", "architectures"):
        raw.pop(name, None)
    raw["use_cache"] = False
    config = transformers.AutoConfig.for_model(model_type, **raw)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    if next(model.parameters()).dtype != dtype:
        model = model.to(dtype)
    return model


def plain_lora(model, arguments, torch):
    """y = W x + (alpha / rank) B A x with W frozen, in the arithmetic of peft's linear layer."""

    class PlainLoraLinear(torch.nn.Module):
        def __init__(self, base, adapter_dtype):
            super().__init__()
            self.base = base
            self.scale = arguments.alpha / arguments.rank
            self.lora_a = torch.nn.Linear(base.in_features, arguments.rank, bias=False, dtype=adapter_dtype)
            self.lora_b = torch.nn.Linear(arguments.rank, base.out_features, bias=False, dtype=adapter_dtype)
            torch.nn.init.zeros_(self.lora_b.weight)

        def forward(self, x):
            result = self.base(x)
            update = self.lora_b(self.lora_a(x.to(self.lora_a.weight.dtype))) * self.scale
            return (result + update).to(result.dtype)

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    places = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if name in TARGETS and isinstance(child, torch.nn.Linear)
    ]
    for module, name, child in places:
        dtype = child.weight.dtype if arguments.adapter_dtype == "model" else torch.float32
        setattr(module, name, PlainLoraLinear(child, dtype))
    return model


def add_adapter(model, arguments, torch):
    """Returns the model with trainable adapters, which implementation was used, and its version."""
    if arguments.peft_path:
        sys.path.insert(0, arguments.peft_path)
    if arguments.adapter != "plain":
        try:
            import peft
        except ImportError as error:
            if arguments.adapter == "peft" or arguments.peft_path:
                sys.exit(f"error: the package peft cannot be imported: {error}")
            print(f"peft cannot be imported ({error}); using the hand-written LoRA linear", file=sys.stderr)
        else:
            config = peft.LoraConfig(r=arguments.rank, lora_alpha=arguments.alpha, lora_dropout=0.0,
                                     target_modules=TARGETS, task_type="CAUSAL_LM")
            model = peft.get_peft_model(model, config, autocast_adapter_dtype=arguments.adapter_dtype == "f32")
            return model, "peft", peft.__version__
    return plain_lora(model, arguments, torch), "plain", None


def timed_steps(model, batch, arguments, torch):
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-4, weight_decay=0.0, fused=True)
    seconds, losses = [], []
    for step in range(arguments.warm_up + arguments.steps):
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=arguments.autocast):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        elapsed = time.perf_counter() - started
        losses.append(float(loss.detach()))
        warm = step < arguments.warm_up
        print(f"step {step}{' (warm-up)' if warm else ''}: {elapsed:.3f} s, loss {losses[-1]:.4f}", file=sys.stderr)
        if not warm:
            seconds.append(elapsed)
    return seconds, losses, sum(parameter.numel() for parameter in trainable)


def main():
    arguments = parse_arguments()
    import torch
    import transformers

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    model = build_model(arguments, torch, transformers)
    model, adapter, peft_version = add_adapter(model, arguments, torch)
    model.train()
    batch = torch.randint(0, model.config.vocab_size, (arguments.batch, arguments.length))
    seconds, losses, trainable = timed_steps(model, batch, arguments, torch)
    median = statistics.median(seconds)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({
        "peer": "transformers+peft" if adapter == "peft" else "transformers+plain-lora",
        "adapter": adapter,
        "dtype": arguments.dtype,
        "adapter_dtype": "f32" if arguments.adapter_dtype == "f32" else arguments.dtype,
        "autocast": arguments.autocast,
        "attention": "sdpa",
        "batch": arguments.batch,
        "length": arguments.length,
        "rank": arguments.rank,
        "alpha": arguments.alpha,
        "trainable_parameters": trainable,
        "tokens_per_second": arguments.batch * arguments.length / median,
        "step_seconds_median": median,
        "step_seconds": [round(value, 4) for value in seconds],
        "first_loss": losses[0],
        "last_loss": losses[-1],
        # getrusage counts KiB on Linux and bytes on macOS.
        "peak_rss_bytes": peak_kib if sys.platform == "darwin" else peak_kib * 1024,
        "threads": arguments.threads,
        "cpu_model": cpu_model(),
        "cpu_features": bf16_features(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft_version,
        "python": platform.python_version(),
    }))


if __name__ == "__main__":
    main()
