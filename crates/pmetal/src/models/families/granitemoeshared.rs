//! Granite with experts, and one for all tokens beside them, whose gate and up are one linear layer.

use super::{Family, granitemoe, shared_expert};
use crate::error::Result;
use crate::models::config::Config;
use crate::models::spec::{DenseNames, Spec};

pub(super) const FAMILY: Family =
    Family { name: "Granite 3, mixtures with shared experts", model_type: "granitemoeshared", read };

fn read(config: &Config) -> Result<Spec> {
    let width = config.optional_count("shared_intermediate_size")?.unwrap_or(0);
    granitemoe::mixture("granitemoeshared", config, |spec| {
        let mut shared = shared_expert(spec, "shared_mlp", width, None);
        shared.dense.names = DenseNames { inputs: &["input_linear"], output: "output_linear" };
        Ok((width > 0).then_some(shared))
    })
}
