"""Names of adapters of experts: those that peft gives to stacked experts, and the older ones of one expert each.

Peft adapts a stack of X experts by A [X * R, in] with the rows of an expert together and B [out, R * X] with the
columns of a rank together. Adapters of before transformers 5 name every expert; peft reads them as one of twice the
rank for gate and up together, of whose B only two blocks are not zero.
"""
import re

# The parameter that a module declares first is adapted by the wrapper nearest to it, `experts.base_layer`.
STACKED = re.compile(r"(?P<layer>.*)\.mlp\.experts(?P<inner>\.base_layer)?\.lora_(?P<side>[AB])\.weight")
ONE_EXPERT = re.compile(r"(?P<layer>.*)\.(?:block_sparse_moe|mlp)\.experts\.(?P<expert>\d+)\.(?P<leaf>\w+)")
# The older names of gate, up and down, with the module that holds them.
BY_EXPERT = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
             "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj")}
GATES, UPS = {"w1", "gate_proj"}, {"w3", "up_proj"}


def split_by_expert(tensors, model_type, experts, rank):
    """Peft's tensors (or their gradients) of stacked experts as one tensor an expert and projection."""
    module, gate, up, down = BY_EXPERT[model_type]
    result = {}
    for name, value in tensors.items():
        match = STACKED.fullmatch(name)
        if match is None:
            result[name] = value
            continue
        for expert in range(experts):
            if match["side"] == "A":
                rows = value.reshape(experts, -1, value.shape[1])[expert]
                parts = rows.split(rank) if match["inner"] else [rows]
            else:
                columns = value.reshape(value.shape[0], -1, experts)[..., expert]
                half = len(columns) // 2
                parts = [columns[:half, :rank], columns[half:, rank:]] if match["inner"] else [columns]
            for leaf, part in zip((gate, up) if match["inner"] else (down,), parts, strict=True):
                where = f"{match['layer']}.{module}.experts.{expert}.{leaf}.lora_{match['side']}.weight"
                result[where] = part.contiguous().clone()
    return result


def adapted(module, parameters, targeted):
    """The parameter's name and the part of it (None: all) that the adapter called `module` is added to."""
    if module + ".weight" in parameters:
        return module + ".weight", None
    match = ONE_EXPERT.fullmatch(module)
    if match:
        stack = f"{match['layer']}.mlp.experts." + ("gate_up_proj" if match["leaf"] in GATES | UPS else "down_proj")
        expert, half = int(match["expert"]), parameters[stack].shape[1] // 2
        rows = slice(0, half) if match["leaf"] in GATES else slice(half, None) if match["leaf"] in UPS else slice(None)
        return stack, (expert, rows)
    owner = re.sub(r"(\.base_layer)+$", "", module)
    own = [name for name in targeted if name.rpartition(".")[0] == owner]
    return own[len(own) - 1 - module.count(".base_layer")], None
