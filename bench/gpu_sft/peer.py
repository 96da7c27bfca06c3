#!/usr/bin/env python3
"""The peer of the GPU fine-tuning benchmark: LoRA steps of transformers + peft on one GPU, timed by the wall clock.

Work: a decoder built from a config with random bf16 weights, LoRA on its seven projections with f32 adapters under
autocast, random tokens that are all trained, sdpa attention, clipping, fused AdamW, the optimizer in the step time.
Prints one JSON line on stdout; talk goes to stderr.
"""
import argparse
import json
import statistics
import time

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7)
    arguments = parser.parse_args()

    import peft
    import torch
    import transformers

    with open(arguments.config, encoding="utf-8") as file:
        raw = json.load(file)
    model_type = raw.pop("model_type")
    for name in ("torch_dtype", "dtype", "transformers_version", "architectures"):
        raw.pop(name, None)
    raw["use_cache"] = False
    config = transformers.AutoConfig.for_model(model_type, **raw)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    if arguments.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    adapter = peft.LoraConfig(r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules=TARGETS, lora_dropout=0.0)
    model = peft.get_peft_model(model, adapter)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    model.train()
    seconds = []
    for step in range(arguments.warm_up + arguments.steps):
        tokens = torch.randint(0, config.vocab_size, (arguments.batch, arguments.length), device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        if step >= arguments.warm_up:
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    print(json.dumps({
        "tokens_per_second": arguments.batch * arguments.length / median,
        "step_seconds_median": median,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "loss": float(loss),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }))


if __name__ == "__main__":
    main()
