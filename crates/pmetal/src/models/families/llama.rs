//! Llama 2 and 3.x, and the many models that use their architecture.

use super::{Defaults, Family, attention_biases, change_dense, plain, without_windows};
use crate::error::Result;
use crate::models::config::Config;
use crate::models::spec::Spec;

pub(super) const FAMILY: Family =
    Family { name: "Llama 2, 3, 3.1, 3.2, 3.3 and what shares the architecture", model_type: "llama", read };

fn read(config: &Config) -> Result<Spec> {
    let mut spec = plain("llama", config, &Defaults::LLAMA)?;
    attention_biases(&mut spec, config, false)?;
    without_windows(&spec, config)?;
    let bias = config.flag("mlp_bias", false)?;
    change_dense(&mut spec, |dense| dense.bias = bias);
    Ok(spec)
}
