"""The cases of families with experts, and of those that came with them: gated delta-net and sparse attention.

model.safetensors has the names and shapes of released files (one tensor an expert where these have that), while the
gradients have those of the reference, which stacks experts: `experts.gate_up_proj` [X, 2F, D], gate rows first.
"""
import re

import torch

from fixture_cases import ATTENTION, BOTH, DROP, LEFT, QK_NORMED, RIGHT, Case, edited, lora, new_layout

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Experts see inputs of norm weights around 1; a wide router makes choices that rounding does not reach.
ROUTER = (r"\.(gate|router)\.weight$", ("matrix", 1.5))


def mixtral(**fields):
    config = {
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 24, "initializer_range": 0.02, "intermediate_size": 14,
        "max_position_embeddings": 128, "model_type": "mixtral", "num_attention_heads": 4, "num_experts_per_tok": 2,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": False,
        "rms_norm_eps": 1e-02, "rope_theta": 1000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.36.0.dev0",
        "use_cache": True, "vocab_size": 64,
    }
    return edited(config, fields)


MIXTRAL_CASES = [
    Case("mixtral", mixtral(), lora(rank=2, targets=ATTENTION, target_parameters=EXPERTS), tokens=23, narrow=True,
         padding=RIGHT, grow=[ROUTER],
         matters=[[("num_experts_per_tok", 1)], [("num_experts_per_tok", 3)], [("rms_norm_eps", 1e-5)]],
         ignored=[[("router_aux_loss_coef", 1.0)]]),
    Case("mixtral-window",
         new_layout(mixtral(sliding_window=7, num_local_experts=6, num_experts_per_tok=3, intermediate_size=10,
                            head_dim=10, num_key_value_heads=1, torch_dtype="bfloat16")),
         lora(rank=3, alpha=4, use_rslora=True, targets=["q_proj", "v_proj"],
              target_parameters=["mlp.experts.down_proj"]),
         tokens=25, padding=BOTH, storage="bfloat16", grow=[ROUTER],
         matters=[[("sliding_window", None)], [("sliding_window", 8)], [("num_experts_per_tok", 2)]]),
    # The loss and all gradients hold the loss that balances experts; padding has no part in it.
    Case("mixtral-balance",
         mixtral(output_router_logits=True, router_aux_loss_coef=0.6, num_local_experts=5, num_experts_per_tok=2,
                 intermediate_size=10),
         lora(rank=2, targets=["q_proj", "v_proj"], target_parameters=EXPERTS), tokens=23, seed=3, padding=BOTH,
         grow=[ROUTER], matters=[[("num_experts_per_tok", 1)]]),
    # All linear layers are, to PEFT, the router's weight too, as a parameter.
    Case("mixtral-all-linear",
         mixtral(num_local_experts=5, hidden_size=16, intermediate_size=10, num_attention_heads=2,
                 num_key_value_heads=1),
         lora(rank=2, targets="all-linear"), tokens=21, seed=1, padding=RIGHT, grow=[ROUTER],
         matters=[[("num_experts_per_tok", 3)]]),
    # Most adapters of this family were made when every expert had linears of its own.
    Case("mixtral-adapter-by-expert",
         mixtral(num_local_experts=3, hidden_size=16, intermediate_size=10, num_attention_heads=2,
                 num_key_value_heads=1, torch_dtype="bfloat16"),
         lora(rank=2, targets=["q_proj", "o_proj", "w1", "w2", "w3"]), tokens=21, padding=LEFT, storage="bfloat16",
         adapter_by_expert=True, grow=[ROUTER], matters=[[("num_experts_per_tok", 3)]]),
]


def qwen3_moe(**fields):
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 61, "decoder_sparse_step": 1, "eos_token_id": 62, "head_dim": 16, "hidden_act": "silu",
        "hidden_size": 24, "initializer_range": 0.02, "intermediate_size": 20, "max_position_embeddings": 128,
        "max_window_layers": 3, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 10,
        "norm_topk_prob": True, "num_attention_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
        "num_hidden_layers": 3, "num_key_value_heads": 1, "output_router_logits": False, "rms_norm_eps": 1e-02,
        "rope_scaling": None, "rope_theta": 2000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.51.0", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 64,
    }
    return edited(config, fields)


QWEN3_MOE_CASES = [
    # peft 0.21 takes every gate, up or down projection of this family for the experts', so the dense layer has none.
    Case("qwen3-moe", qwen3_moe(mlp_only_layers=[1], torch_dtype="bfloat16"),
         lora(rank=2, targets=ATTENTION, target_parameters=EXPERTS), tokens=21, narrow=True, padding=LEFT,
         storage="bfloat16", scale_invariant=QK_NORMED, grow=[ROUTER],
         matters=[[("norm_topk_prob", False)], [("num_experts_per_tok", 1)], [("rms_norm_eps", 1e-6)]],
         ignored=[[("max_window_layers", 0)]]),
    # Transformers 5 writes num_local_experts where released files say num_experts. The window is that of every layer.
    Case("qwen3-moe-sparse-step",
         new_layout(qwen3_moe(norm_topk_prob=False, decoder_sparse_step=2, attention_bias=True, num_experts=DROP,
                              num_local_experts=6, num_experts_per_tok=3, use_sliding_window=True, sliding_window=6,
                              tie_word_embeddings=True)),
         lora(rank=2, alpha=3, targets=["k_proj", "o_proj"], target_parameters=["mlp.experts.gate_up_proj"],
              rank_pattern={"mlp.experts.gate_up_proj": 3}, alpha_pattern={"k_proj": 7}),
         tokens=27, seed=4, padding=BOTH, scale_invariant=QK_NORMED, grow=[ROUTER],
         matters=[[("norm_topk_prob", True)], [("use_sliding_window", False)], [("sliding_window", 7)]],
         ignored=[[("max_window_layers", 1)]]),
    Case("qwen3-moe-adapter-by-expert",
         qwen3_moe(num_experts=3, num_hidden_layers=2, hidden_size=16, head_dim=8, moe_intermediate_size=6),
         lora(rank=2, targets=["v_proj", "gate_proj", "up_proj", "down_proj"]), tokens=19, padding=RIGHT,
         adapter_by_expert=True, scale_invariant=QK_NORMED, grow=[ROUTER], matters=[[("norm_topk_prob", False)]]),
]


def qwen2_moe(**fields):
    """The keys of Qwen1.5-MoE: no qkv_bias (true is the default), no mlp_only_layers."""
    config = {
        "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 61,
        "decoder_sparse_step": 1, "eos_token_id": 61, "hidden_act": "silu", "hidden_size": 24,
        "initializer_range": 0.02, "intermediate_size": 20, "max_position_embeddings": 128, "max_window_layers": 1,
        "model_type": "qwen2_moe", "moe_intermediate_size": 10, "norm_topk_prob": False, "num_attention_heads": 4,
        "num_experts": 5, "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_key_value_heads": 2,
        "output_router_logits": False, "rms_norm_eps": 1e-02, "rope_theta": 2000.0, "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 14, "sliding_window": 5, "tie_word_embeddings": False,
        "torch_dtype": "float32", "transformers_version": "4.39.0.dev0", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 64,
    }
    return edited(config, fields)


QWEN2_MOE_CASES = [
    Case("qwen2-moe", qwen2_moe(), lora(rank=2, targets=ATTENTION + ["shared_expert_gate"], target_parameters=EXPERTS),
         tokens=21, narrow=True, padding=RIGHT, grow=[ROUTER],
         matters=[[("norm_topk_prob", True)], [("num_experts_per_tok", 1)], [("use_sliding_window", True)]],
         ignored=[[("sliding_window", 3)], [("max_window_layers", 2)]]),
    # Every other layer below max_window_layers slides: 0 and 2 of these.
    Case("qwen2-moe-window",
         qwen2_moe(norm_topk_prob=True, use_sliding_window=True, max_window_layers=3, num_hidden_layers=4,
                   mlp_only_layers=[0, 2], qkv_bias=False, hidden_size=20, num_attention_heads=2,
                   num_key_value_heads=1, num_experts=4, tie_word_embeddings=True),
         lora(rank=2, use_rslora=True, targets=["q_proj", "v_proj"], target_parameters=["mlp.experts.down_proj"]),
         tokens=25, padding=LEFT, grow=[ROUTER],
         matters=[[("use_sliding_window", False)], [("sliding_window", 6)], [("max_window_layers", 2)],
                  [("norm_topk_prob", False)]],
         ignored=[[("max_window_layers", 4)]]),
    Case("qwen2-moe-layer-types",
         new_layout(qwen2_moe(use_sliding_window=True, max_window_layers=0, num_hidden_layers=3, hidden_size=20,
                              num_attention_heads=2, num_key_value_heads=1, num_experts=4, decoder_sparse_step=2,
                              mlp_only_layers=[], qkv_bias=True, shared_expert_intermediate_size=8,
                              layer_types=["full_attention", "sliding_attention", "sliding_attention"])),
         lora(rank=1, targets=["o_proj"], target_parameters=EXPERTS), tokens=23, seed=1, padding=BOTH,
         grow=[ROUTER],
         matters=[[("layer_types", None)], [("norm_topk_prob", True)]], ignored=[[("max_window_layers", 3)]]),
]


def gpt_oss(**fields):
    """The keys of gpt-oss: no torch_dtype, two names for the number of chosen experts."""
    config = {
        "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 62,
        "experts_per_token": 2, "head_dim": 16, "hidden_act": "silu", "hidden_size": 32, "initial_context_length": 16,
        "initializer_range": 0.02, "intermediate_size": 32, "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 128, "model_type": "gpt_oss", "num_attention_heads": 4, "num_experts_per_tok": 2,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 3, "output_router_logits": False,
        "pad_token_id": 63, "rms_norm_eps": 1e-02,
        "rope_scaling": {"beta_fast": 3.0, "beta_slow": 0.5, "factor": 8.0, "original_max_position_embeddings": 16,
                         "rope_type": "yarn", "truncate": False},
        "rope_theta": 1500, "router_aux_loss_coef": 0.9, "sliding_window": 6, "swiglu_limit": 1.25,
        "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True, "vocab_size": 64,
    }
    return edited(config, fields)


def mxfp4(case, weights, generator):
    """Experts in blocks of 32 e2m1 numbers, low nibble first, along the width that is summed over, each block with
    the exponent of a power of two: `*_blocks` [X, rows, width / 32, 16] and `*_scales` [X, rows, width / 32]."""
    packed = {}
    for name, value in weights.items():
        if not name.endswith((".gate_up_proj", ".down_proj")):
            packed[name] = value
            continue
        experts, width, rows = value.shape
        shape = (experts, rows, width // 32)
        packed[name + "_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
        # Codes of equal chance have an rms of 2.9.
        packed[name + "_scales"] = torch.randint(122, 126, shape, generator=generator).to(torch.uint8)
    return packed


MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": [
    "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}
GPT_OSS = [ROUTER, (r"\.sinks$|_bias$", ("normal", 0.5)), (r"\.(gate_up|down)_proj$", ("matrix", 1.5, 1))]
PACKED = {r"\.experts\.(gate_up|down)_proj$": "stored in blocks of four bits, frozen"}

GPT_OSS_CASES = [
    # As transformers 5 saves the dequantised model. Gate and up columns alternate.
    Case("gpt-oss",
         new_layout(gpt_oss(torch_dtype="bfloat16", intermediate_size=12, hidden_size=24, rope_scaling=DROP,
                            head_dim=16, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4),
                    **gpt_oss()["rope_scaling"]),
         lora(rank=2, targets=ATTENTION, target_parameters=EXPERTS), tokens=27, padding=RIGHT, storage="bfloat16",
         narrow=True, grow=GPT_OSS,
         matters=[[("rope_parameters.truncate", True)], [("swiglu_limit", 7.0)], [("sliding_window", 7)],
                  [("layer_types", ["full_attention", "full_attention"])], [("num_experts_per_tok", 1)],
                  [("rope_parameters.factor", 32.0)]],
         ignored=[[("experts_per_token", 3)], [("initial_context_length", 4096)]]),
    Case("gpt-oss-mxfp4",
         gpt_oss(quantization_config=MXFP4, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64),
         lora(rank=2, targets=ATTENTION), tokens=23, padding=LEFT, storage="bfloat16", grow=GPT_OSS,
         release=mxfp4, without_gradient=PACKED,
         matters=[[("rope_scaling.truncate", True)], [("swiglu_limit", 7.0)], [("rope_scaling.attention_factor", 1.0)]],
         ignored=[[("experts_per_token", 3)]]),
    # No list of layer types: even layers slide.
    Case("gpt-oss-no-lists",
         gpt_oss(layer_types=DROP, swiglu_alpha=0.9, attention_bias=False, intermediate_size=10, hidden_size=20,
                 num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=3, head_dim=8,
                 tie_word_embeddings=True, pad_token_id=None),
         lora(rank=2, alpha=3, use_rslora=True, targets=["q_proj", "o_proj"],
              target_parameters=["mlp.experts.down_proj"]),
         tokens=23, padding=BOTH, grow=GPT_OSS,
         matters=[[("swiglu_alpha", 1.702)], [("layer_types", ["full_attention"] * 3)], [("swiglu_limit", 7.0)]]),
]


def granitemoe(**fields):
    """The keys of Granite 3's mixtures of experts; dropout is for training only."""
    config = {
        "architectures": ["GraniteMoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.1,
        "attention_multiplier": 0.45, "bos_token_id": 0, "embedding_multiplier": 3.5, "eos_token_id": 0,
        "hidden_act": "silu", "hidden_size": 24, "initializer_range": 0.02, "intermediate_size": 10,
        "logits_scaling": 0.6, "max_position_embeddings": 128, "model_type": "granitemoe", "num_attention_heads": 4,
        "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 5,
        "output_router_logits": False, "pad_token_id": 0, "residual_multiplier": 0.7, "rms_norm_eps": 1e-02,
        "rope_scaling": None, "rope_theta": 3000, "router_aux_loss_coef": 0.001, "tie_word_embeddings": True,
        "torch_dtype": "float32", "transformers_version": "4.46.0.dev0", "use_cache": True, "vocab_size": 64,
    }
    return edited(config, fields)


GRANITE_EXPERTS = ["block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"]
MULTIPLIERS = ["attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"]

GRANITEMOE_CASES = [
    Case("granitemoe", granitemoe(embedding_multiplier=0.7, residual_multiplier=0.9),
         lora(rank=2, targets=ATTENTION, target_parameters=GRANITE_EXPERTS), tokens=23, narrow=True, padding=RIGHT,
         grow=[ROUTER],
         matters=[[(name, 1.0)] for name in MULTIPLIERS] + [[(name, DROP)] for name in MULTIPLIERS]
         + [[("num_experts_per_tok", 3)]]),
    Case("granitemoe-untied",
         new_layout(granitemoe(tie_word_embeddings=False, attention_bias=True, num_local_experts=4,
                               num_experts_per_tok=3, hidden_size=20, num_attention_heads=2, num_key_value_heads=1,
                               logits_scaling=0.8, attention_multiplier=0.2, torch_dtype="bfloat16")),
         lora(rank=3, targets=["v_proj"], target_parameters=GRANITE_EXPERTS[:1], use_rslora=True), tokens=25,
         padding=LEFT, storage="bfloat16", seed=1, grow=[ROUTER],
         matters=[[(name, 1.0)] for name in MULTIPLIERS]),
]


def granitemoeshared(**fields):
    return granitemoe(**{"architectures": ["GraniteMoeSharedForCausalLM"], "model_type": "granitemoeshared",
                         "shared_intermediate_size": 9, "transformers_version": "4.50.0.dev0"} | fields)


GRANITEMOESHARED_CASES = [
    Case("granitemoeshared", granitemoeshared(embedding_multiplier=0.7, residual_multiplier=0.9),
         lora(rank=2, targets=["q_proj", "input_linear", "output_linear"], target_parameters=GRANITE_EXPERTS),
         tokens=23, seed=1, narrow=True, padding=RIGHT, grow=[ROUTER],
         matters=[[(name, 1.0)] for name in MULTIPLIERS] + [[("num_experts_per_tok", 3)], [("rms_norm_eps", 1e-5)]]),
    # All experts with the exact GELU.
    Case("granitemoeshared-gelu",
         new_layout(granitemoeshared(tie_word_embeddings=False, attention_bias=True, num_local_experts=4,
                                     num_experts_per_tok=3, hidden_size=20, num_attention_heads=2,
                                     num_key_value_heads=1, logits_scaling=0.8, attention_multiplier=0.2,
                                     shared_intermediate_size=12, hidden_act="gelu")),
         lora(rank=3, targets=["output_linear"], target_parameters=GRANITE_EXPERTS[:1], use_rslora=True), tokens=25,
         padding=LEFT, seed=10,
         grow=[ROUTER, (r"gate_up_proj$|shared_mlp\.\w+_linear\.weight$|experts\.down_proj$", ("matrix", 2.0))],
         matters=[[("hidden_act", "silu")], [("num_experts_per_tok", 2)]]),
]


def llama4_text(**fields):
    config = {
        "architectures": ["Llama4ForCausalLM"], "attention_bias": False, "attention_chunk_size": 7,
        "attention_dropout": 0.0, "attn_scale": 0.4, "attn_temperature_tuning": True, "bos_token_id": 1,
        "eos_token_id": [2, 3], "floor_scale": 5, "head_dim": 10, "hidden_act": "silu", "hidden_size": 24,
        "initializer_range": 0.02, "interleave_moe_layer_step": 2, "intermediate_size": 8,
        "intermediate_size_mlp": 18, "max_position_embeddings": 256, "model_type": "llama4_text",
        "no_rope_layers": [1, 0, 1], "num_attention_heads": 2, "num_experts_per_tok": 1, "num_hidden_layers": 3,
        "num_key_value_heads": 1, "num_local_experts": 4, "output_router_logits": False, "pad_token_id": 0,
        "rms_norm_eps": 2e-02,
        "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 32, "rope_type": "llama3"},
        "rope_theta": 500.0, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
        "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.51.0.dev0",
        "use_cache": True, "use_qk_norm": True, "vocab_size": 64,
    }
    return edited(config, fields)


def llama4(**fields):
    """The keys of Llama 4 Scout's folder, which names the text model's fields under text_config."""
    text = llama4_text(**fields)
    for name in ("architectures", "tie_word_embeddings", "transformers_version"):
        del text[name]
    return {
        "architectures": ["Llama4ForConditionalGeneration"], "boi_token_index": 50, "eoi_token_index": 51,
        "image_token_index": 52, "model_type": "llama4", "text_config": text, "tie_word_embeddings": False,
        "torch_dtype": text["torch_dtype"], "transformers_version": "4.51.0.dev0",
        "vision_config": {
            "attention_dropout": 0.0, "hidden_act": "gelu", "hidden_size": 8, "image_size": 4,
            "initializer_range": 0.02, "intermediate_size": 32, "model_type": "llama4_vision_model",
            "multi_modal_projector_bias": False, "norm_eps": 1e-05, "num_attention_heads": 2, "num_channels": 3,
            "num_hidden_layers": 1, "patch_size": 2, "pixel_shuffle_ratio": 0.5, "projector_dropout": 0.0,
            "projector_input_dim": 8, "projector_output_dim": 8, "rope_theta": 10000, "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default", "vision_output_dim": 8},
    }


LLAMA4 = [ROUTER, (r"\.experts\.(gate_up|down)_proj$", ("matrix", 1.5, 1))]
LLAMA4_EXPERTS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
LLAMA4_NORMED = [f"layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 2) for name in "qk"]

LLAMA4_CASES = [
    # Dense, mixture, dense; the one in the middle has no positions.
    Case("llama4-text", llama4_text(), lora(rank=2, target_parameters=LLAMA4_EXPERTS), tokens=25, padding=LEFT,
         scale_invariant=LLAMA4_NORMED, grow=LLAMA4,
         matters=[[("attention_chunk_size", 8)], [("attention_chunk_size", 64)], [("floor_scale", 8192)],
                  [("attn_scale", 0.1)], [("attn_temperature_tuning", False)], [("use_qk_norm", False)],
                  [("no_rope_layers", [1, 1, 1])], [("rope_scaling.factor", 16.0)], [("rope_scaling", None)],
                  [("num_experts_per_tok", 2)], [("rms_norm_eps", 1e-5)]]),
    # As in Scout, the factors of llama3 leave no band between, and every layer is a mixture.
    Case("llama4-multimodal",
         llama4(interleave_moe_layer_step=1, num_local_experts=3, intermediate_size=6, no_rope_layers=[1, 1, 0],
                hidden_size=20, torch_dtype="bfloat16", floor_scale=3,
                rope_scaling={"factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
                              "original_max_position_embeddings": 32, "rope_type": "llama3"}),
         lora(rank=2, use_rslora=True, targets=["q_proj", "o_proj", "up_proj"],
              target_parameters=LLAMA4_EXPERTS[:1]),
         tokens=25, narrow=True, padding=RIGHT, storage="bfloat16", grow=LLAMA4,
         scale_invariant=[f"layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "qk"],
         matters=[[("text_config.attention_chunk_size", 64)], [("text_config.floor_scale", 8192)],
                  [("text_config.rope_scaling", None)], [("text_config.no_rope_layers", [1, 1, 1])]],
         ignored=[[("image_token_index", 7)]]),
    # As in Maverick no norm of queries and keys; lists that contradict the intervals win.
    Case("llama4-text-lists",
         new_layout(llama4_text(use_qk_norm=False, no_rope_layers=[], no_rope_layer_interval=2, moe_layers=[0, 2],
                                layer_types=["full_attention", "full_attention", "chunked_attention"],
                                num_experts_per_tok=2, attention_bias=True, tie_word_embeddings=True,
                                attn_temperature_tuning=False, hidden_size=20, num_local_experts=3,
                                interleave_moe_layer_step=1, intermediate_size=6, pad_token_id=None)),
         lora(rank=2, targets=["v_proj", "gate_proj"], target_parameters=LLAMA4_EXPERTS[1:]), tokens=23, seed=3,
         padding=BOTH, grow=LLAMA4,
         without_effect={r"layers\.1\.self_attn\.k_proj\.bias": "without positions, the same for all keys of a query"},
         matters=[[("layer_types", None)], [("use_qk_norm", True)], [("no_rope_layer_interval", 4)],
                  [("attn_temperature_tuning", True)], [("num_experts_per_tok", 1)]],
         ignored=[[("interleave_moe_layer_step", 2)], [("floor_scale", 2)]]),
]


def deepseek_v3(**fields):
    """The keys of DeepSeek V3 without its quantization_config: some, like scoring_func, only say what always holds."""
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
        "hidden_size": 24, "initializer_range": 0.02, "intermediate_size": 20, "kv_lora_rank": 10,
        "max_position_embeddings": 256, "model_type": "deepseek_v3", "moe_intermediate_size": 6, "moe_layer_freq": 1,
        "n_group": 4, "n_routed_experts": 8, "n_shared_experts": 2, "norm_topk_prob": True, "num_attention_heads": 2,
        "num_experts_per_tok": 3, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_nextn_predict_layers": 1,
        "q_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "rms_norm_eps": 3e-02,
        "rope_scaling": {"beta_fast": 4, "beta_slow": 1, "factor": 10, "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 16, "type": "yarn"},
        "rope_theta": 1000, "routed_scaling_factor": 1.7, "scoring_func": "sigmoid", "tie_word_embeddings": False,
        "topk_group": 2, "topk_method": "noaux_tc", "torch_dtype": "float32", "transformers_version": "4.33.1",
        "use_cache": True, "v_head_dim": 9, "vocab_size": 64,
    }
    return edited(config, fields)


def with_prediction_layer(case, weights, generator):
    """Adds the layer after the last one, which predicts the token after the next and has the tables once more."""
    last, width = case.config["num_hidden_layers"] - 1, case.config["hidden_size"]
    first, extra = f"model.layers.{last}.", f"model.layers.{last + 1}."
    more = {extra + name.removeprefix(first): torch.randn(value.shape, generator=generator)
            for name, value in weights.items() if name.startswith(first)}
    for name, shape in (("enorm.weight", [width]), ("hnorm.weight", [width]), ("eh_proj.weight", [width, 2 * width]),
                        ("shared_head.norm.weight", [width])):
        more[extra + name] = torch.randn(shape, generator=generator)
    more[extra + "embed_tokens.weight"] = weights["model.embed_tokens.weight"]
    more[extra + "shared_head.head.weight"] = weights["lm_head.weight"]
    return weights | {name: value.clone() for name, value in more.items()}


def fp8(case, weights, generator):
    """Linears in eight bits with a factor a block, called its inverse: gates, tables and norms stay as they are."""
    rows, columns = case.config["quantization_config"]["weight_block_size"]
    packed = {}
    for name, value in weights.items():
        packed[name] = value
        if not re.search(r"_proj(_with_mqa)?\.weight$|\.w(k|q_b)\.weight$", name) or "weights_proj" in name:
            continue
        blocks = value.reshape(value.shape[0] // rows, rows, value.shape[1] // columns, columns)
        scales = blocks.abs().amax(dim=(1, 3)) / 448.0
        packed[name] = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn).reshape(value.shape)
        packed[name + "_scale_inv"] = scales
    return packed


def fp8_config(rows, columns):
    return {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [rows, columns]}


CORRECTION = r"e_score_correction_bias$"
# A correction as wide as the scores' own spread: it changes choices without making them for all tokens alike.
DEEPSEEK = [ROUTER, (CORRECTION, ("normal", 0.15)), (r"q_a_proj\.weight|kv_a_proj_with_mqa\.weight", ("matrix", 1.5)),
            (r"q_b_proj\.weight", ("matrix", 1.5))]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
EIGHT_BITS = {r"_proj(_with_mqa)?(\.weight)?$": "stored in eight bits, frozen"}
NORMED_LATENT = ["q_a_proj.weight"]

DEEPSEEK_CASES = [
    Case("deepseek-v3", deepseek_v3(), lora(rank=2, targets=LATENT, target_parameters=EXPERTS), tokens=25,
         padding=RIGHT, grow=DEEPSEEK, release=with_prediction_layer, keeps_float32=[CORRECTION],
         chooses=[CORRECTION], scale_invariant=NORMED_LATENT,
         matters=[[("n_group", 2)], [("topk_group", 4)], [("norm_topk_prob", False)], [("routed_scaling_factor", 2.5)],
                  [("num_experts_per_tok", 4)], [("rope_scaling", None)], [("rope_scaling.mscale_all_dim", 0.0)],
                  [("rope_scaling.mscale", 0.5)], [("rope_scaling.factor", 40)], [("rms_norm_eps", 1e-6)],
                  [("rope_interleave", False)]],
         ignored=[[("scoring_func", "softmax")], [("moe_layer_freq", 2)], [("num_nextn_predict_layers", 0)]]),
    Case("deepseek-v3-no-q-lora",
         new_layout(deepseek_v3(q_lora_rank=None, n_group=1, topk_group=1, n_routed_experts=5, norm_topk_prob=False,
                                attention_bias=True, rope_interleave=False, n_shared_experts=1,
                                first_k_dense_replace=0, num_experts_per_tok=2, torch_dtype="bfloat16",
                                num_nextn_predict_layers=0, kv_lora_rank=12, v_head_dim=6)),
         lora(rank=2, use_rslora=True, targets=["q_proj", "kv_b_proj"], target_parameters=EXPERTS[1:]), tokens=23,
         seed=1, narrow=True, padding=LEFT, storage="bfloat16", grow=DEEPSEEK, keeps_float32=[CORRECTION],
         chooses=[CORRECTION],
         matters=[[("rope_interleave", True)], [("norm_topk_prob", True)], [("rope_parameters.rope_theta", 10000)]]),
    # Released blocks are of 128 x 128; these are not square, so that rows and columns cannot be taken for each other.
    Case("deepseek-v3-fp8",
         deepseek_v3(quantization_config=fp8_config(4, 8), kv_lora_rank=16, q_lora_rank=16, moe_intermediate_size=8,
                     n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, v_head_dim=8,
                     qk_nope_head_dim=8, intermediate_size=16, num_nextn_predict_layers=0, n_shared_experts=1,
                     torch_dtype="bfloat16"),
         lora(rank=2, targets=LATENT), tokens=23, padding=LEFT, storage="bfloat16", grow=DEEPSEEK, release=fp8,
         keeps_float32=[CORRECTION, "_scale_inv$"], chooses=[CORRECTION], scale_invariant=NORMED_LATENT,
         without_gradient=EIGHT_BITS, matters=[[("topk_group", 2)], [("rope_scaling", None)]]),
]


def deepseek_v32(**fields):
    return deepseek_v3(**{
        "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "index_head_dim": 12,
        "index_n_heads": 4, "index_topk": 6, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "n_shared_experts": 1, "transformers_version": "4.44.2"} | fields)


INDEXER = r"\.indexer\."
INDEXED = DEEPSEEK + [(r"indexer\.(wq_b|wk|weights_proj)\.weight$", ("matrix", 1.5)),
                      (r"indexer\.k_norm\.bias$", ("normal", 0.5))]
UNTRAINED = {INDEXER: "the indexer runs without gradients: its scores only choose keys"}

DEEPSEEK_V32_CASES = [
    Case("deepseek-v32", deepseek_v32(num_nextn_predict_layers=0), lora(rank=2, targets=LATENT), tokens=25,
         padding=LEFT, narrow=True, grow=INDEXED, keeps_float32=[CORRECTION], chooses=[CORRECTION, INDEXER],
         without_gradient=UNTRAINED, scale_invariant=NORMED_LATENT,
         matters=[[("index_topk", 7)], [("index_topk", 64)], [("rope_scaling", None)], [("topk_group", 2)],
                  [("norm_topk_prob", False)], [("rms_norm_eps", 1e-6)]],
         ignored=[[("moe_layer_freq", 2)]]),
    Case("deepseek-v32-bias",
         new_layout(deepseek_v32(attention_bias=True, index_topk=9, index_head_dim=8, torch_dtype="bfloat16",
                                 norm_topk_prob=False, n_group=1, num_hidden_layers=2, first_k_dense_replace=1,
                                 mlp_layer_types=["sparse", "dense"], tie_word_embeddings=True, q_lora_rank=10,
                                 num_nextn_predict_layers=0)),
         lora(rank=2, alpha=3, use_rslora=True, targets=["q_b_proj", "kv_a_proj_with_mqa"],
              target_parameters=EXPERTS),
         tokens=27, seed=1, padding=BOTH, storage="bfloat16", grow=INDEXED, keeps_float32=[CORRECTION],
         chooses=[CORRECTION, INDEXER], without_gradient=UNTRAINED, scale_invariant=NORMED_LATENT,
         matters=[[("index_topk", 8)], [("index_topk", 64)], [("norm_topk_prob", True)]],
         ignored=[[("first_k_dense_replace", 2)]]),
]


def delta_net(**fields):
    """What Qwen3-Next and Qwen3.5 have in common."""
    return {
        "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 62, "full_attention_interval": 2,
        "head_dim": 16, "hidden_act": "silu", "hidden_size": 24, "initializer_range": 0.02, "intermediate_size": 14,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 6, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_value_head_dim": 5, "max_position_embeddings": 256,
        "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-02,
        "use_cache": True, "vocab_size": 64,
    } | fields


def qwen3_next(**fields):
    config = delta_net(
        architectures=["Qwen3NextForCausalLM"], bos_token_id=61, decoder_sparse_step=1, mlp_only_layers=[],
        model_type="qwen3_next", moe_intermediate_size=6, norm_topk_prob=True, num_experts=4, num_experts_per_tok=2,
        output_router_logits=False, partial_rotary_factor=0.5, rope_scaling=None, rope_theta=500,
        router_aux_loss_coef=0.001, shared_expert_intermediate_size=7, tie_word_embeddings=False,
        torch_dtype="float32", transformers_version="4.57.0.dev0", use_sliding_window=False)
    return edited(dict(sorted(config.items())), fields)


def qwen3_5_text(**fields):
    """The keys of the text_config of Qwen3.5, whose RoPE has three positions, all the same for text."""
    config = delta_net(
        attn_output_gate=True, dtype="float32", layer_types=["linear_attention", "full_attention"],
        mamba_ssm_dtype="float32", mlp_only_layers=[], model_type="qwen3_5_text", mtp_num_hidden_layers=1,
        mtp_use_dedicated_embeddings=False,
        rope_parameters={"mrope_interleaved": True, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5,
                         "rope_theta": 500, "rope_type": "default"})
    return edited(dict(sorted(config.items())), fields)


def qwen3_5(**fields):
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"], "image_token_id": 56, "model_type": "qwen3_5",
        "text_config": qwen3_5_text(**fields), "tie_word_embeddings": False, "transformers_version": "4.57.0.dev0",
        "video_token_id": 57,
        "vision_config": {
            "deepstack_visual_indexes": [], "depth": 1, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 8,
            "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 8, "model_type": "qwen3_5",
            "num_heads": 2, "num_position_embeddings": 4, "out_hidden_size": fields.get("hidden_size", 24),
            "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2},
        "vision_end_token_id": 54, "vision_start_token_id": 53,
    }


def qwen3_5_moe_text(**fields):
    """The same with experts: their text_config has no intermediate_size, and mlp_only_layers that nobody reads."""
    config = qwen3_5_text(
        **{"intermediate_size": DROP, "model_type": "qwen3_5_moe_text", "moe_intermediate_size": 6, "num_experts": 4,
           "num_experts_per_tok": 2, "output_router_logits": False, "router_aux_loss_coef": 0.001,
           "shared_expert_intermediate_size": 7} | fields)
    return dict(sorted(config.items()))


def qwen3_5_moe(**fields):
    config = qwen3_5()
    vision = config["vision_config"] | {"model_type": "qwen3_5_moe"}
    return config | {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe",
                     "text_config": qwen3_5_moe_text(**fields), "vision_config": vision}


def with_mtp(case, weights, generator):
    """Adds some of the tensors that predict further tokens, which the text model leaves alone."""
    width = case.config.get("text_config", case.config)["hidden_size"]
    shapes = {"mtp.fc.weight": [width, 2 * width], "mtp.norm.weight": [width],
              "mtp.pre_fc_norm_embedding.weight": [width], "mtp.pre_fc_norm_hidden.weight": [width],
              "mtp.layers.0.input_layernorm.weight": [width], "mtp.layers.0.self_attn.k_proj.weight": [16, width]}
    return weights | {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def stacked_with_mtp(case, weights, generator):
    """Experts in one tensor, where transformers saves one by one, and what predicts further tokens, with an expert."""
    result = {name: value for name, value in weights.items() if ".experts." not in name}
    for layer in sorted({name.split(".experts.")[0] for name in weights if ".experts." in name}):
        count = len([name for name in weights if name.startswith(layer) and name.endswith(".up_proj.weight")
                     and ".experts." in name])
        parts = [[weights[f"{layer}.experts.{expert}.{part}_proj.weight"] for expert in range(count)]
                 for part in ("gate", "up", "down")]
        gates, ups, downs = map(torch.stack, parts)
        result |= {f"{layer}.experts.gate_up_proj": torch.cat([gates, ups], dim=1), f"{layer}.experts.down_proj": downs}
    mtp = {"mtp.layers.0.mlp.experts.down_proj": torch.randn((2, 24, 6), generator=generator)}
    return with_mtp(case, result, generator) | mtp


# Norms multiply by one more than their weight, but for the delta-net's own.
DELTA = [ROUTER, (r"layernorm\.weight$|[qk]_norm\.weight$|^model\.norm\.weight$", ("uniform", -0.5, 0.5)),
         (r"A_log$", ("uniform", -2.0, 0.5)), (r"dt_bias$", ("normal", 0.5)),
         (r"conv1d\.weight$", ("matrix", 1.5)), (r"in_proj_\w+\.weight$", ("matrix", 1.2))]
NEXT_PROJECTIONS = ATTENTION + ["in_proj_qkvz", "in_proj_ba", "out_proj"]
DELTA_PROJECTIONS = ATTENTION + ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

DELTA_CASES = [
    # Longer than one chunk of 64.
    Case("qwen3-next", qwen3_next(), lora(rank=2, targets=NEXT_PROJECTIONS, target_parameters=EXPERTS), tokens=70,
         seed=1, padding=[(0, 3)], grow=DELTA, release=with_mtp, scale_invariant=["k_proj.weight"],
         matters=[[("partial_rotary_factor", DROP)], [("partial_rotary_factor", 1.0)], [("norm_topk_prob", False)],
                  [("rms_norm_eps", 1e-6)], [("rope_theta", 10000000)]]),
    Case("qwen3-next-lists",
         new_layout(qwen3_next(layer_types=["full_attention", "linear_attention", "linear_attention"],
                               num_hidden_layers=3, mlp_only_layers=[1], norm_topk_prob=False, attention_bias=True,
                               tie_word_embeddings=True, partial_rotary_factor=DROP, linear_conv_kernel_dim=3,
                               linear_num_key_heads=1, linear_num_value_heads=3, hidden_size=20, torch_dtype="bfloat16",
                               full_attention_interval=DROP, num_experts=3, linear_key_head_dim=8),
                    partial_rotary_factor=0.25),
         lora(rank=2, alpha=3, use_rslora=True, targets=["in_proj_qkvz", "q_proj", "shared_expert_gate"],
              target_parameters=EXPERTS[:1]),
         tokens=23, seed=1, padding=BOTH, storage="bfloat16", narrow=True, grow=DELTA,
         scale_invariant=["k_proj.weight"],
         matters=[[("norm_topk_prob", True)], [("rope_parameters.partial_rotary_factor", 0.5)]]),
    Case("qwen3-5-multimodal", qwen3_5(), lora(rank=2, targets=DELTA_PROJECTIONS + MLP), tokens=25, padding=LEFT,
         narrow=True, grow=DELTA, release=with_mtp, scale_invariant=["k_proj.weight"],
         matters=[[("text_config.rms_norm_eps", 1e-6)], [("text_config.rope_parameters.rope_theta", 10000000)],
                  [("text_config.rope_parameters.partial_rotary_factor", 1.0)]],
         ignored=[[("text_config.rope_parameters.mrope_section", [1, 1, 2])], [("image_token_id", 5)],
                  [("text_config.full_attention_interval", 4)]]),
    Case("qwen3-5-text",
         qwen3_5_text(architectures=["Qwen3_5ForCausalLM"], tie_word_embeddings=True, layer_types=DROP,
                      full_attention_interval=3, num_hidden_layers=3, attention_bias=True, hidden_size=20,
                      linear_num_key_heads=1, linear_num_value_heads=3, linear_conv_kernel_dim=2, dtype="bfloat16",
                      transformers_version="5.23.0"),
         lora(rank=2, use_rslora=True, targets=["in_proj_a", "in_proj_qkv", "v_proj", "up_proj"]), tokens=67,
         padding=[(0, 0)], storage="bfloat16", grow=DELTA, scale_invariant=["k_proj.weight"],
         matters=[[("rope_parameters.partial_rotary_factor", 0.25)], [("rms_norm_eps", 1e-6)]]),
]

QWEN3_5_MOE_CASES = [
    # Released files stack experts, under the name of the text part; the adapter is that of the whole model.
    Case("qwen3-5-moe-multimodal", qwen3_5_moe(),
         lora(rank=2, targets=rf".*\.language_model\..*\.({'|'.join(DELTA_PROJECTIONS)})", target_parameters=EXPERTS),
         tokens=25, padding=LEFT, narrow=True, grow=DELTA, release=stacked_with_mtp, adapts_whole=True,
         scale_invariant=["k_proj.weight"],
         matters=[[("text_config.num_experts_per_tok", 1)], [("text_config.rms_norm_eps", 1e-6)],
                  [("text_config.rope_parameters.partial_rotary_factor", 1.0)],
                  [("text_config.rope_parameters.rope_theta", 10000000)]],
         ignored=[[("text_config.mlp_only_layers", [0])], [("text_config.router_aux_loss_coef", 1.0)],
                  [("text_config.rope_parameters.mrope_section", [1, 1, 2])], [("image_token_id", 5)]]),
    # As transformers saves the text model; the fields that Qwen3-Next has besides say nothing.
    Case("qwen3-5-moe-text",
         qwen3_5_moe_text(architectures=["Qwen3_5MoeForCausalLM"], tie_word_embeddings=True, layer_types=DROP,
                          full_attention_interval=3, num_hidden_layers=3, attention_bias=True, hidden_size=20,
                          linear_num_key_heads=1, linear_num_value_heads=3, linear_conv_kernel_dim=2,
                          dtype="bfloat16", transformers_version="5.23.0", num_experts=3, norm_topk_prob=False,
                          decoder_sparse_step=2, intermediate_size=9),
         lora(rank=2, use_rslora=True, targets=["in_proj_a", "q_proj", "shared_expert_gate"],
              target_parameters=EXPERTS[1:]),
         tokens=67, seed=1, padding=[(0, 0)], storage="bfloat16", grow=DELTA, scale_invariant=["k_proj.weight"],
         matters=[[("rope_parameters.partial_rotary_factor", 0.25)], [("num_experts_per_tok", 3)]],
         ignored=[[("norm_topk_prob", True)], [("decoder_sparse_step", 1)], [("intermediate_size", 14)]]),
]

EXPERT_CASES = (MIXTRAL_CASES + QWEN3_MOE_CASES + QWEN2_MOE_CASES + GPT_OSS_CASES + GRANITEMOE_CASES
                + GRANITEMOESHARED_CASES + LLAMA4_CASES + DEEPSEEK_CASES + DEEPSEEK_V32_CASES + DELTA_CASES
                + QWEN3_5_MOE_CASES)
