//! DeepSeek V3.2: V3 whose queries look at chosen keys.

use pmetal_engine::device::RopePairing;

use super::{Family, deepseek, refuse};
use crate::error::{Error, Result};
use crate::models::config::Config;
use crate::models::spec::{IndexerSpec, Projection, Spec};

pub(super) const FAMILY: Family = Family { name: "DeepSeek V3.2", model_type: "deepseek_v32", read };

fn read(config: &Config) -> Result<Spec> {
    // The rotation of attention is always that of neighbours, and every layer is of one kind.
    config.pass_over(&["rope_interleave", "layer_types"]);
    refuse(config, "mlp_bias")?;
    let mut spec = deepseek::read("deepseek_v32", config, Some("mlp_layer_types"))?;
    if !config.has("max_position_embeddings") {
        spec.context_length = 163_840;
    }
    let indexer = IndexerSpec {
        heads: config.optional_size("index_n_heads")?.unwrap_or(64),
        width: config.optional_size("index_head_dim")?.unwrap_or(128),
        count: config.optional_size("index_topk")?.unwrap_or(2048),
        norm_epsilon: 1e-6,
    };
    for layer in &mut spec.layers {
        let Projection::Latent(latent) = &mut layer.attention.projection else { continue };
        if latent.query_rank.is_none() {
            return Err(Error::Config("`q_lora_rank` is null, keys are chosen by what it makes".to_owned()));
        }
        if indexer.width < latent.rotated_width {
            return Err(Error::Config(format!(
                "`index_head_dim` is {}, less than `qk_rope_head_dim` of {}",
                indexer.width, latent.rotated_width
            )));
        }
        latent.indexer = Some(indexer);
    }
    spec.ropes.iter_mut().for_each(|rope| rope.pairing = RopePairing::Neighbours);
    Ok(spec)
}
