//! DeepSeek V3: latent attention, and experts in groups that are chosen with a correction.

use pmetal_engine::device::RopePairing;
use pmetal_engine::ops::{Gate, Groups};

use super::{Defaults, Family, attention_biases, experts, field_of, layers_of_kind, plain, shared_expert};
use crate::error::{Error, Result};
use crate::models::config::Config;
use crate::models::rope::{Rope, RopeKind, RopeScaling};
use crate::models::spec::{FeedForwardSpec, LatentSpec, Projection, Spec};

pub(super) const V3: Family = Family {
    name: "DeepSeek V3, R1",
    model_type: "deepseek_v3",
    read: |config| read("deepseek_v3", config, None),
};

/// A model whose sparse layers a list of the given field may name.
pub(super) fn read(family: &'static str, config: &Config, kinds_field: Option<&str>) -> Result<Spec> {
    let unturned = config.optional_size("qk_nope_head_dim")?.unwrap_or(128);
    let turned = config.optional_size("qk_rope_head_dim")?.unwrap_or(64);
    // What transformers writes there is the width of the rotation, which has a field of its own.
    config.get("head_dim");
    let defaults = Defaults {
        vocabulary: Some(129_280),
        width: Some(7168),
        inner: Some(18_432),
        layers: Some(61),
        heads: Some(128),
        head_width: Some(turned),
        context_length: 4096,
        theta: 10_000.0,
        ..Defaults::LLAMA
    };
    let mut spec = plain(family, config, &defaults)?;
    set_attention(&mut spec, config, [unturned, turned])?;
    let count = field_of(config, ["n_routed_experts", "num_local_experts"]);
    let mut part = experts(config, count, 256, 8)?;
    part.width = config.optional_size("moe_intermediate_size")?.unwrap_or(2048);
    part.wide_router = true;
    part.correction = true;
    part.router.gate = Gate::Sigmoid;
    part.router.normalise = config.flag("norm_topk_prob", true)?.then_some(1e-20);
    part.router.scale = config.positive("routed_scaling_factor", 2.5)? as f32;
    let count = config.optional_size("n_group")?.unwrap_or(8);
    let chosen = config.optional_size("topk_group")?.unwrap_or(4);
    if !part.count.is_multiple_of(count) || part.count / count < 2 || chosen > count {
        return Err(Error::Config(format!(
            "`n_group` is {count} and `topk_group` {chosen}, for `n_routed_experts` of {}",
            part.count
        )));
    }
    part.router.groups = Some(Groups { count, chosen });
    let width = part.width * config.optional_size("n_shared_experts")?.unwrap_or(1);
    part.shared = Some(shared_expert(&spec, "mlp.shared_experts", width, None));
    // Constants of the family, which its code does not read.
    config.pass_over(&[
        "moe_layer_freq",
        "scoring_func",
        "topk_method",
        "ep_size",
        "aux_loss_alpha",
        "output_router_logits",
        "router_aux_loss_coef",
        "qk_head_dim",
        "seq_aux",
    ]);
    spec.further_layers = config.optional_count("num_nextn_predict_layers")?.unwrap_or(1);
    let dense = config.optional_count("first_k_dense_replace")?.unwrap_or(3);
    let layers = spec.layers.len();
    let sparse = match kinds_field {
        Some(field) => layers_of_kind(config, field, ["sparse", "dense"], layers, |index| index >= dense)?,
        None => (0..layers).map(|index| index >= dense).collect(),
    };
    for (layer, _) in spec.layers.iter_mut().zip(sparse).filter(|(_, sparse)| *sparse) {
        layer.feed_forward = FeedForwardSpec::Experts(Box::new(part.clone()));
    }
    Ok(spec)
}

fn set_attention(spec: &mut Spec, config: &Config, [unturned, turned]: [usize; 2]) -> Result<()> {
    attention_biases(spec, config, false)?;
    let absent = !config.has("q_lora_rank");
    let query_rank = if absent { Some(1536) } else { config.optional_size("q_lora_rank")? };
    let key_value_rank = config.optional_size("kv_lora_rank")?.unwrap_or(512);
    let latent =
        LatentSpec { query_rank, key_value_rank, rotated_width: turned, norm_epsilon: 1e-6, indexer: None };
    let value_width = config.optional_size("v_head_dim")?.unwrap_or(128);
    let pairing = match config.flag("rope_interleave", true)? {
        true => RopePairing::Neighbours,
        false => RopePairing::Halves,
    };
    let kind = RopeKind { width: turned, pairing, context_length: 4096, ..RopeKind::LLAMA };
    let rope = Rope::from_config(config, kind)?;
    let mut scale = ((unturned + turned) as f64).powf(-0.5);
    if rope.scaling != RopeScaling::None {
        scale *= Rope::magnitude(config)?.powi(2);
    }
    spec.ropes = vec![rope];
    for layer in &mut spec.layers {
        let attention = &mut layer.attention;
        attention.key_value_heads = attention.query_heads;
        (attention.head_width, attention.value_width) = (unturned + turned, value_width);
        attention.projection = Projection::Latent(latent);
        attention.scale = scale as f32;
    }
    Ok(())
}
