//! Tensor names of llama.cpp in the naming of Hugging Face checkpoints.
//!
//! Source: `gguf-py/gguf/constants.py` and `tensor_mapping.py` of llama.cpp.

/// The architectures whose tensors can be read under Hugging Face names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GgufArchitecture {
    /// Llama and Mistral; query and key rows are stored in the order of interleaved rotary embeddings.
    Llama,
    /// Qwen 2 and 2.5.
    Qwen2,
    /// Qwen 3, dense.
    Qwen3,
}

impl GgufArchitecture {
    /// The architecture of a `general.architecture` value.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Llama, Self::Qwen2, Self::Qwen3].into_iter().find(|known| known.name() == name)
    }

    /// The value of `general.architecture`, which is also the prefix of the architecture's keys.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// Whether query and key rows need to be put back into half-split order.
    pub const fn permutes_rotary_rows(self) -> bool {
        matches!(self, Self::Llama)
    }
}

/// The Hugging Face name of a llama.cpp tensor name; `None` when the table has no counterpart.
pub fn hugging_face_name(architecture: GgufArchitecture, name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".to_owned()),
        "output_norm.weight" => return Some("model.norm.weight".to_owned()),
        "output.weight" => return Some("lm_head.weight".to_owned()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    // `01` and `+1` would give a second name to layer 1.
    if layer.parse::<u32>().ok()?.to_string() != layer {
        return None;
    }
    let (part, kind) = rest.rsplit_once('.')?;
    let (module, may_have_bias) = match part {
        "attn_norm" => ("input_layernorm", false),
        "ffn_norm" => ("post_attention_layernorm", false),
        "attn_q" => ("self_attn.q_proj", true),
        "attn_k" => ("self_attn.k_proj", true),
        "attn_v" => ("self_attn.v_proj", true),
        "attn_output" => ("self_attn.o_proj", true),
        "attn_q_norm" if architecture == GgufArchitecture::Qwen3 => ("self_attn.q_norm", false),
        "attn_k_norm" if architecture == GgufArchitecture::Qwen3 => ("self_attn.k_norm", false),
        "ffn_gate" => ("mlp.gate_proj", true),
        "ffn_up" => ("mlp.up_proj", true),
        "ffn_down" => ("mlp.down_proj", true),
        _ => return None,
    };
    match kind {
        "weight" => {}
        "bias" if may_have_bias => {}
        _ => return None,
    }
    Some(format!("model.layers.{layer}.{module}.{kind}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_table() {
        let llama = |name| hugging_face_name(GgufArchitecture::Llama, name);
        assert_eq!(llama("blk.12.attn_q.weight").as_deref(), Some("model.layers.12.self_attn.q_proj.weight"));
        assert_eq!(llama("blk.0.attn_k.bias").as_deref(), Some("model.layers.0.self_attn.k_proj.bias"));
        assert_eq!(
            llama("blk.0.ffn_norm.weight").as_deref(),
            Some("model.layers.0.post_attention_layernorm.weight")
        );
        for strange in
            ["blk.00.attn_q.weight", "blk.+1.attn_q.weight", "blk.0.attn_q", "blk.0.attn_norm.bias"]
        {
            assert_eq!(llama(strange), None, "{strange}");
        }
    }

    #[test]
    fn only_qwen3_has_query_and_key_norms() {
        let name = "blk.1.attn_q_norm.weight";
        assert_eq!(hugging_face_name(GgufArchitecture::Llama, name), None);
        assert_eq!(
            hugging_face_name(GgufArchitecture::Qwen3, name).as_deref(),
            Some("model.layers.1.self_attn.q_norm.weight")
        );
    }
}
