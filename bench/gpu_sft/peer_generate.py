#!/usr/bin/env python3
"""Times token generation of transformers on the same random model as `pmetal bench infer`; prints one JSON object.

    bench/gpu_sft/peer_generate.py --config FILE [--prompt-tokens 128] [--new-tokens 128] [--cache dynamic|static]

With --cache static, transformers compiles the step and replays it as a CUDA graph.
"""
import argparse
import json
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", choices=["dynamic", "static"], default="dynamic")
    arguments = parser.parse_args()
    with open(arguments.config, encoding="utf-8") as file:
        fields = json.load(file)
    for name in ("torch_dtype", "dtype", "transformers_version", "architectures"):
        fields.pop(name, None)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    prompt = torch.randint(0, config.vocab_size, (1, arguments.prompt_tokens), device="cuda")

    def seconds(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        options = {"cache_implementation": "static"} if arguments.cache == "static" else {}
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            pad_token_id=0, **options,
        )
        torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.inference_mode():
        seconds(arguments.new_tokens)
        # The prompt and the first token are taken off.
        rounds = sorted(seconds(arguments.new_tokens) - seconds(1) for _ in range(arguments.rounds))
    rate = (arguments.new_tokens - 1) / rounds[len(rounds) // 2]
    print(json.dumps({"tokens_per_second": rate, "cache": arguments.cache, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
