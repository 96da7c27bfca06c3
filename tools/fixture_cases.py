"""The table of fixtures: one Case per folder under fixtures/.

`config` is written as config.json word for word, in the layout that released checkpoints of the family use (old:
`rope_theta` + `rope_scaling` + `torch_dtype`; new: `rope_parameters` + `dtype`). Sizes are tiny; the values that a
careless reader would hard-code (eps, theta, head width, window) are unlike their defaults.
"""
from collections.abc import Callable
from dataclasses import dataclass, field

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = ATTENTION + ["gate_proj", "up_proj", "down_proj"]


@dataclass
class Case:
    """One fixture. Edits are lists of (dotted path, value); the value DROP removes the key."""

    name: str
    config: dict
    adapter: dict
    tokens: int = 37
    # Per row: (padding on the left, padding on the right). Row 0 must start with 8 real tokens.
    padding: list = field(default_factory=lambda: [(0, 0), (0, 5)])
    storage: str = "float32"
    shards: int = 1
    seed: int = 0
    # Config edits that must move the logits: the proof that the sequence reaches the feature.
    matters: list = field(default_factory=list)
    # Config edits that must leave the logits alone: fields that a reader has to ignore.
    ignored: list = field(default_factory=list)
    # Tensors that a following norm makes insensitive to scale; they are perturbed at random instead.
    scale_invariant: list = field(default_factory=list)
    # Stores the adapter under the names of before transformers 5, one an expert.
    adapter_by_expert: bool = False
    # Lets the padding id of the config occur as an ordinary token.
    padding_id_in_text: bool = False
    # Also writes the logits of the reference in bf16.
    narrow: bool = False
    # (regular expression of names, distribution), first match wins, before the generator's own rules:
    # ("normal", std), ("uniform", low, high), ("matrix", gain[, dimension that is summed over]).
    grow: list = field(default_factory=list)
    # Takes (case, weights by the reference's own saved names, generator) to the tensors of a released file.
    release: Callable | None = None
    # Writes the adapter of the whole multimodal model, whose names say `language_model`; else that of its text model.
    adapts_whole: bool = False
    # Names of tensors that stay f32 whatever the storage.
    keeps_float32: list = field(default_factory=list)
    # Names of tensors, each with the reason, that get no gradient, that do not even have an effect on the logits,
    # and names of those that only choose, by rank.
    without_gradient: dict = field(default_factory=dict)
    without_effect: dict = field(default_factory=dict)
    chooses: list = field(default_factory=list)


DROP = object()


def lora(rank=3, alpha=5, targets=None, **others):
    return dict(r=rank, lora_alpha=alpha, target_modules=targets or ALL_LINEAR, **others)


def llama(**fields):
    """The keys of a Llama config in the old layout."""
    config = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
        "intermediate_size": 40, "max_position_embeddings": 128, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "torch_dtype": "float32", "transformers_version": "4.45.0", "use_cache": True, "vocab_size": 64,
    }
    return edited(config, fields)


def mistral(**fields):
    config = {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 40, "initializer_range": 0.02, "intermediate_size": 40,
        "max_position_embeddings": 128, "model_type": "mistral", "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-02, "rope_theta": 1000.0, "sliding_window": 7,
        "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.34.0",
        "use_cache": True, "vocab_size": 64,
    }
    return edited(config, fields)


def qwen2(**fields):
    config = {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 61, "eos_token_id": 62,
        "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 40,
        "max_position_embeddings": 128, "max_window_layers": 1, "model_type": "qwen2", "num_attention_heads": 4,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 2e-02, "rope_theta": 1000000.0,
        "sliding_window": 9, "tie_word_embeddings": True, "torch_dtype": "float32",
        "transformers_version": "4.40.1", "use_cache": True, "use_sliding_window": False, "vocab_size": 64,
    }
    return edited(config, fields)


def qwen3(**fields):
    config = {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 61,
        "eos_token_id": 62, "head_dim": 32, "hidden_act": "silu", "hidden_size": 48, "initializer_range": 0.02,
        "intermediate_size": 32, "max_position_embeddings": 128, "max_window_layers": 2, "model_type": "qwen3",
        "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-02,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "torch_dtype": "float32", "transformers_version": "4.51.0", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 64,
    }
    return edited(config, fields)


def edited(config, fields):
    result = dict(config)
    for name, value in fields.items():
        if value is DROP:
            result.pop(name, None)
        else:
            result[name] = value
    return result


def new_layout(config, **rope_parameters):
    """The same config as transformers 5 writes it: `rope_parameters`, `dtype`, no `rope_theta`/`rope_scaling`."""
    result = dict(config)
    theta = result.pop("rope_theta")
    result.pop("rope_scaling", None)
    result["dtype"] = result.pop("torch_dtype")
    result["transformers_version"] = "5.23.0"
    result["rope_parameters"] = {"rope_theta": theta, "rope_type": "default", **rope_parameters}
    return dict(sorted(result.items()))


QK_NORMED = ["self_attn.q_proj.weight", "self_attn.k_proj.weight"]
LEFT = [(0, 0), (6, 0)]
RIGHT = [(0, 0), (0, 5)]
BOTH = [(0, 0), (4, 0), (0, 7)]

LLAMA_CASES = [
    # Llama 2 files name no rope_theta at all: 10000 is the family's default.
    Case("llama2", edited(llama(num_attention_heads=4, num_key_value_heads=4, torch_dtype="float16", pad_token_id=0,
                                transformers_version="4.31.0.dev0"),
                          {"rope_theta": DROP, "attention_bias": DROP, "mlp_bias": DROP, "attention_dropout": DROP}),
         lora(), tokens=29, narrow=True, padding=RIGHT, storage="float16",
         matters=[[("rope_theta", 500000.0)]], ignored=[[("rope_theta", 10000.0)]]),
    Case("llama2-bias-head-dim",
         new_layout(llama(attention_bias=True, mlp_bias=True, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
                          rms_norm_eps=3e-02, rope_theta=300.0)),
         lora(rank=4, alpha=6, use_rslora=True), tokens=27, padding=LEFT, matters=[[("rms_norm_eps", 1e-5)]]),
    # The id that pads also ends turns and occurs in the text; its embedding row gets no input gradient.
    Case("llama-tied-mqa-pad-is-eos",
         llama(num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=2,
               rope_theta=100000, torch_dtype="bfloat16"),
         lora(targets=["q_proj", "v_proj"]), tokens=33, padding=LEFT, storage="bfloat16", padding_id_in_text=True),
    # Where a file holds both layouts, the older one counts, and what belongs to another type of rotation does not.
    Case("llama-rope-both-layouts",
         llama(rope_theta=700.0, head_dim=12,
               rope_scaling={"factor": 3.0, "rope_type": "linear", "low_freq_factor": 1.0, "attention_factor": 2.0},
               rope_parameters={"rope_theta": 90.0, "rope_type": "linear", "factor": 2.0}),
         lora(rank=2), tokens=21, padding=RIGHT, matters=[[("rope_scaling.factor", 2.0)], [("rope_theta", 90.0)]],
         ignored=[[("rope_parameters", DROP)], [("rope_scaling.attention_factor", DROP)]]),
    Case("llama31-rope",
         llama(head_dim=32, intermediate_size=24, eos_token_id=[2, 3, 4],
               rope_scaling={"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                             "original_max_position_embeddings": 32, "rope_type": "llama3"}),
         lora(rank=2, rank_pattern={"q_proj": 4, "layers.1.mlp.down_proj": 1},
              alpha_pattern={"v_proj": 9, "down_proj": 2}),
         shards=2, seed=1, tokens=35, narrow=True, padding=RIGHT,
         matters=[[("rope_scaling", None)], [("rope_scaling.factor", 32.0)]]),
    Case("llama32-rope-tied",
         new_layout(llama(head_dim=32, intermediate_size=24, tie_word_embeddings=True), rope_type="llama3", factor=32.0,
                    high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=32),
         lora(targets=r".*\.layers\.[01]\.(self_attn\.(q|o)_proj|mlp\.(up|down)_proj)"), seed=1, tokens=35,
         padding=LEFT, matters=[[("rope_parameters.factor", 8.0)]]),
    Case("llama-rope-linear",
         llama(rope_theta=10000.0, rope_scaling={"factor": 4.0, "type": "linear"}),
         lora(layers_to_transform=[1]), padding=RIGHT, matters=[[("rope_scaling", None)]]),
    # Longer than max_position_embeddings, so that the base grows; the greedy continuation crosses the border.
    Case("llama-rope-dynamic",
         llama(rope_theta=10000.0, max_position_embeddings=20, rope_scaling={"factor": 2.0, "type": "dynamic"}),
         lora(), padding=LEFT, matters=[[("rope_scaling", None)]]),
    Case("llama-rope-dynamic-new-layout",
         new_layout(llama(rope_theta=2000.0, max_position_embeddings=24), rope_type="dynamic", factor=3.0),
         lora(targets=ATTENTION), tokens=41, padding=RIGHT, matters=[[("rope_parameters.factor", 1.0)]]),
    Case("llama-rope-yarn",
         llama(rope_theta=10000.0, max_position_embeddings=128,
               rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32, "type": "yarn"}),
         lora(),
         narrow=True, padding=RIGHT, matters=[[("rope_scaling", None)], [("rope_scaling.attention_factor", 1.0)]]),
    Case("llama-rope-yarn-mscale",
         new_layout(llama(rope_theta=100.0), rope_type="yarn", factor=4.0, beta_fast=2.0, beta_slow=1.0, mscale=1.0,
                    mscale_all_dim=0.5, original_max_position_embeddings=32),
         lora(), padding=LEFT,
         matters=[[("rope_parameters.mscale", DROP)], [("rope_parameters.beta_fast", DROP)]]),
    Case("llama-rope-yarn-no-truncate",
         llama(rope_theta=1000.0, head_dim=32, intermediate_size=24, max_position_embeddings=64,
               rope_scaling={"attention_factor": 1.25, "beta_fast": 1.5, "beta_slow": 0.25, "factor": 2.0,
                             "original_max_position_embeddings": 32, "rope_type": "yarn", "truncate": False}),
         lora(rank=2), tokens=35, padding=RIGHT, seed=1,
         matters=[[("rope_scaling.truncate", True)], [("rope_scaling.attention_factor", DROP)]]),
    # Beyond the original length the long factors apply to all positions; the attention factor comes from the ratio.
    Case("llama-rope-longrope",
         llama(rope_theta=10000.0, max_position_embeddings=64,
               rope_scaling={"long_factor": [1.1, 1.5, 2.0, 3.0, 4.5, 6.0, 8.0, 9.0],
                             "original_max_position_embeddings": 16,
                             "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.6, 1.8], "type": "longrope"}),
         lora(), padding=LEFT, matters=[[("rope_scaling.attention_factor", 1.0)], [("rope_scaling", None)]]),
    Case("llama-rope-longrope-short",
         new_layout(llama(rope_theta=10000.0, max_position_embeddings=64), rope_type="longrope", attention_factor=1.19,
                    factor=4.0, original_max_position_embeddings=16,
                    long_factor=[1.1, 1.5, 2.0, 3.0, 4.5, 6.0, 8.0, 9.0],
                    short_factor=[1.0, 1.15, 1.3, 1.6, 1.7, 1.9, 2.1, 2.3]),
         lora(), tokens=15, padding=BOTH, seed=1, matters=[[("rope_parameters.attention_factor", DROP)]]),
]

MISTRAL_CASES = [
    Case("mistral-window", mistral(head_dim=12, hidden_size=32), lora(rank=2, use_rslora=True), seed=1, tokens=31,
         narrow=True, padding=LEFT,
         matters=[[("sliding_window", None)], [("sliding_window", 8)], [("sliding_window", 6)]]),
    Case("mistral-no-window", new_layout(mistral(sliding_window=None, num_key_value_heads=1)), lora(), tokens=33,
         padding=RIGHT, ignored=[[("sliding_window", 33)]]),
]

QWEN2_CASES = [
    # The window of a config that does not use it is shorter than the sequence, and must be ignored.
    Case("qwen2-tied", qwen2(torch_dtype="bfloat16"), lora(), seed=3, tokens=33,
         narrow=True, padding=RIGHT, storage="bfloat16",
         matters=[[("rms_norm_eps", 1e-6)], [("use_sliding_window", True)]], ignored=[[("sliding_window", 3)]]),
    Case("qwen2-window", qwen2(use_sliding_window=True, num_hidden_layers=3, intermediate_size=24,
                               tie_word_embeddings=False),
         lora(rank=2, targets=["k_proj", "o_proj", "gate_proj"]), seed=1, tokens=25, narrow=True, padding=LEFT,
         matters=[[("max_window_layers", 0)], [("max_window_layers", 2)], [("sliding_window", 10)]]),
    # The explicit list wins over max_window_layers, which says the opposite.
    Case("qwen2-layer-types",
         new_layout(qwen2(use_sliding_window=True, num_hidden_layers=3, intermediate_size=24,
                          layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
         lora(rank=2), tokens=25, padding=BOTH,
         matters=[[("layer_types", None)]], ignored=[[("max_window_layers", 3)]]),
    Case("qwen2-yarn",
         qwen2(tie_word_embeddings=False, rope_theta=10000.0, num_attention_heads=2, num_key_value_heads=1,
               rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32, "type": "yarn"}),
         lora(), padding=RIGHT, matters=[[("rope_scaling", None)]]),
]

QWEN3_CASES = [
    Case("qwen3", qwen3(intermediate_size=24), lora(rank=2, targets=["q_proj", "k_proj", "up_proj"]), seed=1, tokens=17,
         padding=LEFT, scale_invariant=QK_NORMED, matters=[[("rms_norm_eps", 1e-6)]]),
    Case("qwen3-bias-untied",
         new_layout(qwen3(attention_bias=True, tie_word_embeddings=False, hidden_size=32, head_dim=16,
                          num_attention_heads=4, num_key_value_heads=2)),
         lora(rank=2, alpha=7, use_rslora=True, rank_pattern={"up_proj": 5}), tokens=23, seed=1,
         narrow=True, padding=RIGHT,
         scale_invariant=QK_NORMED),
    Case("qwen3-window",
         qwen3(use_sliding_window=True, sliding_window=5, max_window_layers=1, hidden_size=32, head_dim=16),
         lora(), seed=3, tokens=31, narrow=True, padding=BOTH, scale_invariant=QK_NORMED,
         matters=[[("use_sliding_window", False)], [("sliding_window", 6)]]),
    Case("qwen3-yarn-layer-types",
         new_layout(qwen3(hidden_size=32, head_dim=16, use_sliding_window=True, sliding_window=11,
                          layer_types=["sliding_attention", "full_attention"]),
                    rope_type="yarn", factor=4.0, original_max_position_embeddings=32, rope_theta=10000.0),
         lora(targets=ATTENTION), tokens=35, padding=LEFT, scale_invariant=QK_NORMED,
         matters=[[("rope_parameters.factor", 2.0)], [("layer_types", None)]]),
]

CASES = LLAMA_CASES + MISTRAL_CASES + QWEN2_CASES + QWEN3_CASES

# Written by what is above, hence the place of these imports.
from fixture_cases_dense import DENSE_CASES  # noqa: E402
from fixture_cases_experts import EXPERT_CASES  # noqa: E402

CASES += DENSE_CASES + EXPERT_CASES
