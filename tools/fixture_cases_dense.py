"""Fixtures of the dense families beyond Llama, Mistral and Qwen; fixture_cases.py imports them, and its rules hold."""
import re

import torch

from fixture_cases import ATTENTION, BOTH, DROP, LEFT, QK_NORMED, RIGHT, Case, edited, lora, new_layout

# Gemma multiplies by one plus the weight, and the embedding by the square root of the width. The layers add more than
# the embedding brought, and the last norm has both signs, or a tied head would repeat the token that was just read.
GEMMA_GROW = [(r"post_\w+norm\.weight$", ("uniform", 0.0, 2.0)), (r"model\.norm\.weight$", ("uniform", -2.5, 1.0)),
              (r"norm\.weight$", ("uniform", -0.5, 0.5)), (r"embed_tokens", ("normal", 0.22))]
# What a norm follows is insensitive to scale, but for eps.
POST_NORMED = ["v_proj.weight", "o_proj.weight", "up_proj.weight", "down_proj.weight"]


def gemma2(**fields):
    config = {
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": 2.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 60],
        "final_logit_softcapping": 5.0, "head_dim": 12, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 32, "initializer_range": 0.02,
        "intermediate_size": 24, "max_position_embeddings": 128, "model_type": "gemma2", "num_attention_heads": 4,
        "num_hidden_layers": 3, "num_key_value_heads": 2, "pad_token_id": 0, "query_pre_attn_scalar": 5,
        "rms_norm_eps": 2e-02, "rope_theta": 700.0, "sliding_window": 7, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.4", "use_cache": True, "vocab_size": 64,
    }
    return edited(config, fields)


def gemma3_text(**fields):
    config = {
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 60],
        "final_logit_softcapping": None, "head_dim": 20, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 32,
        "initializer_range": 0.02, "intermediate_size": 24, "max_position_embeddings": 128,
        "model_type": "gemma3_text", "num_attention_heads": 2, "num_hidden_layers": 3, "num_key_value_heads": 1,
        "pad_token_id": 0, "query_pre_attn_scalar": 7, "rms_norm_eps": 1e-02, "rope_local_base_freq": 100,
        "rope_scaling": None, "rope_theta": 5000, "sliding_window": 7, "sliding_window_pattern": 2,
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 64,
    }
    return edited(config, fields)


def gemma3_saved(case, weights, generator):
    """The names that transformers 5 saves the multimodal model under."""
    moved = {re.sub(r"^model\.language_model\.", "language_model.model.", name): value
             for name, value in weights.items()}
    return {re.sub(r"^model\.(vision_tower|multi_modal_projector)\.", r"\1.", name): value
            for name, value in moved.items()}


def gemma3_released(case, weights, generator):
    """Released files have one level more in the names of the vision tower."""
    return {re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name): value
            for name, value in gemma3_saved(case, weights, generator).items()}


GEMMA_CASES = [
    Case("gemma2", gemma2(), lora(rank=2), tokens=25, seed=2, storage="bfloat16", narrow=True, padding=RIGHT,
         grow=GEMMA_GROW, scale_invariant=POST_NORMED,
         matters=[[("attn_logit_softcapping", DROP)], [("attn_logit_softcapping", None)],
                  [("final_logit_softcapping", DROP)], [("final_logit_softcapping", None)],
                  [("query_pre_attn_scalar", 12)], [("query_pre_attn_scalar", DROP)], [("sliding_window", 8)],
                  [("rms_norm_eps", DROP)], [("rope_theta", DROP)], [("hidden_activation", "gelu")],
                  [("layer_types", ["full_attention", "sliding_attention", "full_attention"])]],
         ignored=[[("hidden_act", "silu")], [("tie_word_embeddings", True)],
                  [("layer_types", ["sliding_attention", "full_attention", "sliding_attention"])]]),
    # Attention is not capped, the list of layers is the opposite of the habit, and biases are present.
    Case("gemma2-layer-types",
         edited(new_layout(gemma2(attention_bias=True, attn_logit_softcapping=None, final_logit_softcapping=4.0,
                                  num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=32,
                                  num_hidden_layers=2, query_pre_attn_scalar=24,
                                  layer_types=["full_attention", "sliding_attention"], sliding_window=5,
                                  tie_word_embeddings=True, use_bidirectional_attention=None)),
                {"hidden_act": DROP, "cache_implementation": DROP}),
         lora(rank=2, alpha=7, targets=["q_proj", "v_proj", "down_proj"], use_rslora=True), tokens=27, seed=1,
         storage="bfloat16", padding=LEFT, grow=GEMMA_GROW, scale_invariant=POST_NORMED,
         matters=[[("layer_types", None)], [("attn_logit_softcapping", DROP)], [("sliding_window", 6)],
                  [("query_pre_attn_scalar", 16)]]),
    # The exact GELU, where all released files have the tanh form.
    Case("gemma2-gelu",
         gemma2(hidden_activation="gelu", num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                hidden_size=24, intermediate_size=32, torch_dtype="float32"),
         lora(rank=2, targets=["o_proj", "gate_proj", "down_proj"]), tokens=23, seed=11, padding=BOTH, grow=GEMMA_GROW,
         scale_invariant=POST_NORMED, matters=[[("hidden_activation", "gelu_pytorch_tanh")]],
         ignored=[[("hidden_act", "silu")]]),
    Case("gemma3-text", gemma3_text(), lora(rank=2), tokens=27, storage="bfloat16", narrow=True, padding=RIGHT,
         grow=GEMMA_GROW, scale_invariant=POST_NORMED + QK_NORMED,
         matters=[[("rope_local_base_freq", DROP)], [("rope_theta", DROP)], [("sliding_window_pattern", 3)],
                  [("sliding_window", 8)], [("query_pre_attn_scalar", 20)], [("rms_norm_eps", DROP)],
                  [("rope_scaling", {"factor": 8.0, "rope_type": "linear"})], [("final_logit_softcapping", 4.0)]],
         # The reference keeps this field but never reads it.
         ignored=[[("attn_logit_softcapping", 1.0)]]),
    # An entry without a base takes that of the older field.
    Case("gemma3-text-local-base",
         edited(gemma3_text(rope_theta=DROP, rope_scaling=DROP, torch_dtype=DROP, num_hidden_layers=2),
                {"rope_local_base_freq": 30, "dtype": "bfloat16",
                 "rope_parameters": {"full_attention": {"rope_theta": 3000.0, "rope_type": "default"},
                                     "sliding_attention": {"rope_type": "default"}},
                 "transformers_version": "5.0.0"}),
         lora(rank=2, targets=ATTENTION), tokens=23, storage="bfloat16", padding=RIGHT, grow=GEMMA_GROW,
         scale_invariant=POST_NORMED + QK_NORMED,
         matters=[[("rope_local_base_freq", 200)], [("rope_parameters.full_attention.rope_theta", 100.0)]],
         ignored=[[("rope_theta", 50.0)]]),
    # The linear factor stretches the full layers alone; the list wins over the pattern of older files.
    Case("gemma3-text-new-layout",
         edited(gemma3_text(rope_theta=DROP, rope_local_base_freq=DROP, rope_scaling=DROP, torch_dtype=DROP,
                            sliding_window_pattern=DROP, cache_implementation=DROP, head_dim=16),
                {"_sliding_window_pattern": 6, "dtype": "bfloat16", "tie_word_embeddings": True,
                 "layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2,
                 "rope_parameters": {
                     "full_attention": {"factor": 4.0, "rope_theta": 3000.0, "rope_type": "linear"},
                     "sliding_attention": {"rope_theta": 60.0, "rope_type": "default"}},
                 "transformers_version": "5.23.0", "use_bidirectional_attention": False}),
         lora(rank=2, targets=ATTENTION, rank_pattern={"k_proj": 4}), tokens=25, storage="bfloat16",
         padding=LEFT, grow=GEMMA_GROW,
         scale_invariant=POST_NORMED + QK_NORMED,
         matters=[[("rope_parameters.full_attention.factor", 8.0)],
                  [("rope_parameters.full_attention.rope_theta", 60.0)],
                  [("rope_parameters.sliding_attention.rope_theta", 3000.0)],
                  [("layer_types", ["sliding_attention", "sliding_attention"])]],
         ignored=[[("_sliding_window_pattern", 2)], [("sliding_window_pattern", 2)]]),
    # The text config is as short as that of released files: heads, eps, scalar and both bases are the family's
    # defaults. The window is not taken from elsewhere, and six layers come before the first full one, hence the list.
    Case("gemma3",
         {"architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 60, "eoi_token_index": 61,
          "eos_token_id": [1, 59], "image_token_index": 62, "initializer_range": 0.02, "mm_tokens_per_image": 4,
          "model_type": "gemma3",
          "text_config": {"head_dim": 8, "hidden_size": 32, "intermediate_size": 24,
                          "layer_types": ["sliding_attention", "full_attention"], "model_type": "gemma3_text",
                          "num_hidden_layers": 2, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                          "sliding_window": 9, "vocab_size": 64},
          "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
          "vision_config": {"hidden_size": 16, "image_size": 16, "intermediate_size": 16,
                            "model_type": "siglip_vision_model", "num_attention_heads": 2, "num_hidden_layers": 1,
                            "patch_size": 8, "vision_use_head": False}},
         lora(rank=2), tokens=29, seed=2, storage="bfloat16", narrow=True, padding=RIGHT,
         grow=[(r"language_model\.norm\.weight$", ("uniform", -2.5, 1.0))] + GEMMA_GROW,
         release=gemma3_released,
         scale_invariant=POST_NORMED + QK_NORMED,
         matters=[[("text_config.rope_scaling", DROP)], [("text_config.sliding_window", 10)],
                  [("text_config.query_pre_attn_scalar", 8)], [("text_config.rope_theta", 10000.0)],
                  [("text_config.rope_local_base_freq", 1000000.0)], [("text_config.rms_norm_eps", 1e-2)]],
         ignored=[[("text_config.num_attention_heads", 8), ("text_config.num_key_value_heads", 4)],
                  [("text_config.query_pre_attn_scalar", 256)], [("text_config.rms_norm_eps", 1e-6)]]),
    # The folder as transformers 5 saves it, and the adapter that PEFT writes for the whole model.
    Case("gemma3-new-layout",
         {"architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 60, "dtype": "bfloat16",
          "eoi_token_index": 61, "image_token_index": 62, "initializer_range": 0.02, "mm_tokens_per_image": 4,
          "model_type": "gemma3",
          "text_config": edited(gemma3_text(), {
              "architectures": DROP, "cache_implementation": DROP, "rope_local_base_freq": DROP, "rope_scaling": DROP,
              "rope_theta": DROP, "sliding_window_pattern": DROP, "torch_dtype": DROP, "transformers_version": DROP,
              "_sliding_window_pattern": 6, "dtype": "bfloat16", "head_dim": 16, "num_hidden_layers": 2,
              "layer_types": ["full_attention", "sliding_attention"], "query_pre_attn_scalar": 11,
              "rope_parameters": {
                  "full_attention": {"factor": 8.0, "rope_theta": 4000.0, "rope_type": "linear"},
                  "sliding_attention": {"rope_theta": 90.0, "rope_type": "default"}},
              "tie_word_embeddings": True, "use_bidirectional_attention": False}),
          "tie_word_embeddings": True, "transformers_version": "5.23.0",
          "vision_config": {"attention_dropout": 0.0, "dtype": "bfloat16", "hidden_act": "gelu_pytorch_tanh",
                            "hidden_size": 16, "image_size": 16, "intermediate_size": 16, "layer_norm_eps": 1e-06,
                            "model_type": "siglip_vision_model", "num_attention_heads": 2, "num_channels": 3,
                            "num_hidden_layers": 1, "patch_size": 8, "vision_use_head": False}},
         lora(rank=2, targets=r".*\.language_model\..*\.(q_proj|v_proj|down_proj)"), tokens=23, seed=2,
         storage="bfloat16", padding=LEFT, adapts_whole=True,
         grow=[(r"language_model\.norm\.weight$", ("uniform", -2.5, 1.0))] + GEMMA_GROW,
         release=gemma3_saved,
         scale_invariant=POST_NORMED + QK_NORMED,
         matters=[[("text_config.rope_parameters.full_attention.factor", 1.0)],
                  [("text_config.rope_parameters.sliding_attention.rope_theta", 4000.0)],
                  [("text_config.sliding_window", 8)], [("text_config.query_pre_attn_scalar", 16)]],
         ignored=[[("text_config.attn_logit_softcapping", 1.0)]]),
]


# A last norm of both signs keeps a tied head from repeating the token that was just read.
SIGNED = (r"model\.norm\.weight$", ("uniform", -1.5, 1.5))
HEAD_NORMS = (r"(q|k)_norm\.weight$", ("uniform", 0.5, 1.5))


def cohere(**fields):
    config = {
        "architectures": ["CohereForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 5,
        "eos_token_id": 61, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
        "intermediate_size": 40, "layer_norm_eps": 2e-02, "logit_scale": 0.75, "max_position_embeddings": 128,
        "model_max_length": 256, "model_type": "cohere", "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 4, "pad_token_id": 0, "rope_theta": 800.0, "torch_dtype": "float16",
        "transformers_version": "4.40.0.dev0", "use_cache": True, "use_qk_norm": False, "vocab_size": 64,
    }
    return edited(config, fields)


def cohere2(**fields):
    config = {
        "architectures": ["Cohere2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 5,
        "cache_implementation": "hybrid", "eos_token_id": 61, "head_dim": 8, "hidden_act": "silu", "hidden_size": 32,
        "initializer_range": 0.02, "intermediate_size": 32, "layer_norm_eps": 2e-02, "layer_switch": 4,
        "logit_scale": 0.625, "max_position_embeddings": 128, "model_type": "cohere2", "num_attention_heads": 4,
        "num_hidden_layers": 3, "num_key_value_heads": 2, "order_of_interleaved_layers": "local_attn_first",
        "pad_token_id": 0, "position_embedding_type": "rope_gptj", "rope_scaling": None, "rope_theta": 300,
        "rotary_pct": 1.0, "sliding_window": 7, "sliding_window_pattern": 2, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.48.0.dev0", "use_cache": True,
        "use_embedding_sharing": True, "use_gated_activation": True, "use_parallel_block": True,
        "use_parallel_embedding": False, "vocab_size": 64,
    }
    return edited(config, fields)


COHERE_CASES = [
    # As in some released files, nothing says that the head is tied: it always is.
    Case("cohere", cohere(), lora(), tokens=29, storage="float16", narrow=True, padding=RIGHT, grow=[SIGNED],
         matters=[[("logit_scale", DROP)], [("layer_norm_eps", DROP)], [("rope_theta", DROP)],
                  [("rope_theta", 10000.0)]],
         ignored=[[("tie_word_embeddings", True)], [("model_max_length", 16)]]),
    # The norm of queries and keys has a row of weights for every head.
    Case("cohere-qk-norm",
         edited(new_layout(cohere(use_qk_norm=True, num_key_value_heads=2, attention_bias=True, torch_dtype="bfloat16",
                                  tie_word_embeddings=True)), {"model_max_length": DROP}),
         lora(rank=2, targets=["q_proj", "k_proj", "up_proj"], use_rslora=True), tokens=27, seed=1,
         storage="bfloat16", padding=LEFT, grow=[SIGNED, HEAD_NORMS], scale_invariant=QK_NORMED,
         matters=[[("layer_norm_eps", DROP)], [("rope_parameters.rope_theta", 500000.0)]]),
    # A bias on keys without RoPE shifts all scores alike and would have no effect: hence none here.
    # Local layers first: with a window and RoPE; every second layer sees everything and has no positions.
    Case("cohere2", cohere2(), lora(rank=2), tokens=27, storage="bfloat16", narrow=True, padding=RIGHT, grow=[SIGNED],
         matters=[[("sliding_window_pattern", DROP)], [("sliding_window", 8)], [("rope_theta", DROP)],
                  [("logit_scale", DROP)], [("layer_norm_eps", DROP)]],
         ignored=[[("head_dim", DROP)], [("layer_switch", 2)], [("rotary_pct", 0.5)], [("use_parallel_block", False)],
                  [("position_embedding_type", "rope")]]),
    Case("cohere2-layer-types",
         edited(new_layout(cohere2(num_hidden_layers=2, num_key_value_heads=1, sliding_window=5,
                                   layer_types=["full_attention", "sliding_attention"],
                                   intermediate_size=40, head_dim=12)),
                {"cache_implementation": DROP, "sliding_window_pattern": DROP}),
         lora(targets=ATTENTION + ["down_proj"], alpha_pattern={"o_proj": 9}), tokens=25, storage="bfloat16",
         padding=LEFT, grow=[SIGNED],
         matters=[[("layer_types", None)], [("sliding_window", 6)], [("rope_parameters.rope_theta", 10000.0)]],
         ignored=[[("sliding_window_pattern", 2)]]),
]


def granite(**fields):
    config = {
        "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.1,
        "attention_multiplier": 0.2, "bos_token_id": 0, "embedding_multiplier": 3.0, "eos_token_id": 0,
        "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 40,
        "logits_scaling": 1.5, "max_position_embeddings": 128, "mlp_bias": False, "model_type": "granite",
        "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "pad_token_id": 0,
        "residual_multiplier": 0.6, "rms_norm_eps": 2e-02, "rope_scaling": None, "rope_theta": 700.0,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.47.0.dev0",
        "use_cache": True, "vocab_size": 64,
    }
    return edited(config, fields)


MULTIPLIERS = ["attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier"]

def own_head(case, weights, generator):
    """A head beside the embedding, which the config says is the head."""
    table = weights["model.embed_tokens.weight"]
    return weights | {"lm_head.weight": torch.randn(table.shape, generator=generator, dtype=table.dtype) / 2}


GRANITE_CASES = [
    # The reference ties what the file has once, whatever the config says of the rest.
    Case("granite-head-of-its-own", granite(torch_dtype="float32"), lora(rank=2), tokens=21, padding=RIGHT,
         padding_id_in_text=True, grow=[SIGNED], release=own_head),
    # One id begins, ends and pads, and occurs in the text.
    Case("granite", granite(), lora(), tokens=29, storage="bfloat16", narrow=True, padding=RIGHT,
         padding_id_in_text=True, grow=[SIGNED],
         matters=[[(name, DROP)] for name in MULTIPLIERS] + [[("rms_norm_eps", DROP)], [("rope_theta", DROP)]],
         ignored=[[("attention_dropout", 0.0)]]),
    Case("granite-untied-bias",
         new_layout(granite(attention_bias=True, mlp_bias=True, tie_word_embeddings=False, torch_dtype="float32",
                            attention_multiplier=0.45, embedding_multiplier=1.75, logits_scaling=0.6,
                            residual_multiplier=0.8, head_dim=12, num_attention_heads=2, num_key_value_heads=1),
                    rope_type="linear", factor=3.0),
         lora(rank=2, alpha=6, use_rslora=True, rank_pattern={"gate_proj": 4}), tokens=21, padding=LEFT,
         matters=[[(name, DROP)] for name in MULTIPLIERS] + [[("rope_parameters.factor", 1.0)]]),
]


def phi3(**fields):
    config = {
        "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
        "embd_pdrop": 0.0, "eos_token_id": 62, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
        "intermediate_size": 32, "max_position_embeddings": 64, "model_type": "phi3", "num_attention_heads": 2,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "original_max_position_embeddings": 64, "pad_token_id": 62,
        "resid_pdrop": 0.0, "rms_norm_eps": 2e-02, "rope_scaling": None, "rope_theta": 900.0, "sliding_window": 7,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.43.3", "use_cache": True,
        "vocab_size": 64,
    }
    return edited(config, fields)


FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
LONG = [1.1, 1.5, 2.0, 3.0, 4.5, 6.0, 8.0, 9.0]
SHORT = [1.0, 1.15, 1.3, 1.6, 1.7, 1.9, 2.1, 2.3]

PHI3_CASES = [
    Case("phi3", phi3(num_attention_heads=4, num_key_value_heads=4), lora(targets=FUSED), tokens=29,
         storage="bfloat16", narrow=True, padding=RIGHT,
         matters=[[("sliding_window", 8)], [("sliding_window", None)], [("rope_theta", DROP)],
                  [("rms_norm_eps", DROP)]],
         ignored=[[("original_max_position_embeddings", 8)], [("max_position_embeddings", 16)]]),
    # Two thirds of the tokens lie beyond the original length; the greedy continuation crosses it.
    Case("phi3-longrope",
         phi3(original_max_position_embeddings=12, sliding_window=262144, rope_theta=10000.0,
              rope_scaling={"long_factor": LONG, "short_factor": SHORT, "type": "longrope"}),
         lora(rank=2, targets=["qkv_proj", "down_proj"]), tokens=31, storage="bfloat16",
         padding=LEFT,
         matters=[[("rope_scaling", None)], [("original_max_position_embeddings", 31)],
                  [("original_max_position_embeddings", 13)], [("max_position_embeddings", 128)],
                  [("rope_scaling.long_factor", SHORT)]],
         ignored=[[("rope_scaling.short_factor", LONG)], [("rope_scaling.original_max_position_embeddings", 40)]]),
    Case("phi3-longrope-short",
         edited(new_layout(phi3(original_max_position_embeddings=16, sliding_window=None, num_key_value_heads=1,
                                head_dim=16),
                           rope_type="longrope", long_factor=LONG, short_factor=SHORT, partial_rotary_factor=1.0,
                           original_max_position_embeddings=16), {"attention_bias": DROP}),
         lora(targets=FUSED, rank_pattern={"qkv_proj": 5}), tokens=15, seed=1, storage="bfloat16",
         padding=BOTH,
         matters=[[("rope_parameters.short_factor", LONG)], [("max_position_embeddings", 16)],
                  [("rope_parameters.attention_factor", 1.0)]],
         ignored=[[("rope_parameters.long_factor", SHORT)]]),
    # Three quarters of every head turn; the odd fields of released files are not read.
    Case("phi4-mini",
         phi3(original_max_position_embeddings=12, sliding_window=262144, partial_rotary_factor=0.75,
              tie_word_embeddings=True, num_key_value_heads=1, intermediate_size=40, full_attn_mod=1,
              interpolate_factor=1, lm_head_bias=False, mlp_bias=False,
              rope_scaling={"long_factor": LONG[:6], "short_factor": SHORT[:6], "type": "longrope"}),
         lora(rank=2, targets=FUSED), tokens=23, storage="bfloat16", padding=RIGHT, grow=[SIGNED],
         matters=[[("rope_scaling.long_factor", SHORT[:6])], [("max_position_embeddings", 12)],
                  [("rope_scaling", None)], [("rope_scaling", None), ("partial_rotary_factor", DROP)]],
         ignored=[[("rope_scaling.short_factor", LONG[:6])], [("lm_head_bias", True), ("mlp_bias", True)]]),
]


def olmo2(**fields):
    config = {
        "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 60,
        "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 40,
        "max_position_embeddings": 128, "model_type": "olmo2", "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 4, "pad_token_id": 61, "rms_norm_eps": 2e-02, "rope_scaling": None, "rope_theta": 900,
        "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.47.0.dev0",
        "use_cache": False, "vocab_size": 64,
    }
    return edited(config, fields)


OLMO2_CASES = [
    Case("olmo2", olmo2(torch_dtype="bfloat16"), lora(rank=2), tokens=27, storage="bfloat16", narrow=True,
         padding=RIGHT, scale_invariant=POST_NORMED + QK_NORMED,
         matters=[[("rms_norm_eps", DROP)], [("rope_theta", DROP)]]),
    # Fewer keys than queries: both norms still span all heads of their projection.
    Case("olmo2-grouped",
         new_layout(olmo2(num_key_value_heads=2, attention_bias=True, intermediate_size=32, torch_dtype="bfloat16")),
         lora(rank=2, targets=["k_proj", "o_proj", "gate_proj"], use_rslora=True), tokens=27, storage="bfloat16",
         padding=LEFT, scale_invariant=POST_NORMED + QK_NORMED,
         matters=[[("rms_norm_eps", DROP)], [("rope_parameters.rope_theta", 10000.0)]]),
]


def smollm3(**fields):
    config = {
        "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 60, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
        "intermediate_size": 32, "layer_types": ["full_attention"] * 3, "max_position_embeddings": 128,
        "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 0, 1], "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2,
        "pad_token_id": 59, "pretraining_tp": 2, "rms_norm_eps": 2e-02, "rope_scaling": None, "rope_theta": 5000.0,
        "sliding_window": None, "torch_dtype": "bfloat16", "transformers_version": "4.54.0.dev0", "use_cache": False,
        "use_sliding_window": False, "vocab_size": 64,
    }
    return edited(config, fields)


SMOLLM3_CASES = [
    # In the list a 1 means RoPE; the interval would leave RoPE to all three layers.
    Case("smollm3", smollm3(), lora(rank=2), tokens=27, storage="bfloat16", narrow=True, padding=RIGHT, grow=[SIGNED],
         matters=[[("no_rope_layers", [0, 1, 0])], [("no_rope_layers", None)], [("no_rope_layers", DROP)],
                  [("rope_theta", DROP)], [("rms_norm_eps", DROP)]],
         ignored=[[("no_rope_layer_interval", 2)], [("max_window_layers", 0)], [("tie_word_embeddings", True)],
                  [("sliding_window", 3)]]),
    # The interval decides, and with windows the layers without RoPE are those that slide.
    Case("smollm3-window",
         edited(new_layout(smollm3(no_rope_layers=DROP, layer_types=DROP, no_rope_layer_interval=2, num_hidden_layers=2,
                                   num_key_value_heads=1, mlp_bias=True, sliding_window=7,
                                   use_sliding_window=True, tie_word_embeddings=False)),
                {"max_window_layers": DROP, "pretraining_tp": DROP}),
         lora(targets=["q_proj", "v_proj", "gate_proj"], layers_to_transform=[1]), tokens=25, storage="bfloat16",
         padding=LEFT,
         matters=[[("no_rope_layer_interval", DROP)], [("sliding_window", 8)], [("use_sliding_window", False)],
                  [("layer_types", ["sliding_attention", "full_attention"])]]),
]


def glm4(**fields):
    config = {
        "architectures": ["Glm4ForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
        "eos_token_id": [58, 59, 60], "head_dim": 16, "hidden_act": "silu", "hidden_size": 32,
        "initializer_range": 0.02, "intermediate_size": 32, "max_position_embeddings": 128, "model_type": "glm4",
        "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 1, "pad_token_id": 58,
        "partial_rotary_factor": 0.75, "rms_norm_eps": 2e-02, "rope_theta": 900.0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.52.0.dev0", "use_cache": True, "vocab_size": 64,
    }
    return edited(config, fields)


GLM4_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
GLM4_POST_NORMED = ["v_proj.weight", "o_proj.weight", "down_proj.weight", "gate_up_proj.weight"]

GLM4_CASES = [
    Case("glm4", glm4(), lora(targets=GLM4_LINEAR, rank=2), tokens=25, storage="bfloat16", narrow=True, padding=RIGHT,
         scale_invariant=GLM4_POST_NORMED,
         matters=[[("partial_rotary_factor", DROP)], [("partial_rotary_factor", 1.0)], [("rope_theta", DROP)],
                  [("rms_norm_eps", DROP)]]),
    # Five elements of a head are three pairs, whose wavelengths are those of five.
    Case("glm4-odd-rotary", glm4(head_dim=10, partial_rotary_factor=0.5),
         lora(targets=GLM4_LINEAR, rank=2), tokens=21, seed=3, storage="bfloat16", padding=RIGHT,
         scale_invariant=GLM4_POST_NORMED, matters=[[("partial_rotary_factor", 0.6)], [("partial_rotary_factor", 0.4)]]),
    # Half of every head turns, which is also the default of files that do not say it.
    Case("glm4-no-bias",
         edited(new_layout(glm4(attention_bias=False, num_key_value_heads=2, head_dim=12,
                                partial_rotary_factor=DROP), partial_rotary_factor=0.5), {}),
         lora(targets=["q_proj", "gate_up_proj", "down_proj"], alpha_pattern={"down_proj": 8}), tokens=27,
         storage="bfloat16", padding=LEFT, scale_invariant=GLM4_POST_NORMED,
         matters=[[("rope_parameters.partial_rotary_factor", 1.0)], [("rope_parameters.rope_theta", 10000.0)]],
         ignored=[[("rope_parameters.partial_rotary_factor", DROP)]]),
]

DENSE_CASES = (GEMMA_CASES + COHERE_CASES + GRANITE_CASES + PHI3_CASES + OLMO2_CASES + SMOLLM3_CASES + GLM4_CASES)
