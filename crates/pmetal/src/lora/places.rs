//! Where adapter files have the text model: alone, or inside a whole multimodal model.
//!
//! Everything else here speaks of modules as a text model by itself has them.

use std::collections::BTreeSet;

use pmetal_engine::ops::{ExpertLinear, Linear};
use pmetal_formats::adapter::{AdapterConfig, LoraShape, ModuleNames, TargetMatcher};

use crate::error::Result;
use crate::models::Decoder;
use crate::models::loader::stored::{ALONE, path_at, place_among, places};

const PREFIX: &str = "base_model.model.";

/// The name of a tensor in the file of an adapter for a model that has its text model there.
pub(super) fn tensor_at(place: &str, name: &str) -> String {
    match name.strip_prefix(PREFIX) {
        Some(path) => format!("{PREFIX}{}", path_at(place, path)),
        None => name.to_owned(),
    }
}

/// Where a file with tensors of these names has the text model.
pub(super) fn place_of(names: &BTreeSet<&str>) -> &'static str {
    place_among(names.iter().filter_map(|name| name.strip_prefix(PREFIX)))
}

/// Which modules and parameters a configuration means, in a model that has its text model at a place.
pub(super) struct Targets {
    matcher: TargetMatcher,
    place: &'static str,
}

impl Targets {
    pub(super) fn new(config: &AdapterConfig, place: &'static str) -> Result<Self> {
        Ok(Self { matcher: config.matcher()?, place })
    }

    /// The adapter of a linear layer.
    pub(super) fn target(&self, module: &str) -> Option<LoraShape> {
        self.matcher.target(&path_at(self.place, module), true, false)
    }

    /// The adapter of a layer that chooses experts, which PEFT has as a parameter.
    pub(super) fn router(&self, module: &str) -> Option<LoraShape> {
        self.parameter(&format!("{module}.weight"))
    }

    /// The adapter of a parameter.
    pub(super) fn parameter(&self, name: &str) -> Option<LoraShape> {
        self.matcher.parameter(&path_at(self.place, name))
    }
}

/// The configuration that is written beside a decoder's adapters. All linear layers are those of the decoder, named as PEFT does
/// when it saves: it counts some routers too. Where PEFT has a whole model, whose other parts have layers of the same names, or
/// the given configuration speaks of another place, every adapted layer is named in full, so that no other is meant.
///
/// # Errors
/// When a pattern of the configuration does not compile.
pub fn config_to_write(decoder: &Decoder, config: &AdapterConfig) -> Result<AdapterConfig> {
    let (place, linears, mut config) = (decoder.spec.place, decoder.linears(), config.clone());
    if config.target_modules == ModuleNames::AllLinear {
        let adapted = linears.iter().filter(|(_, linear)| linear.lora.is_some());
        let ends: BTreeSet<&str> = adapted.filter_map(|(module, _)| module.rsplit('.').next()).collect();
        config.target_modules = ModuleNames::List(ends.into_iter().map(str::to_owned).collect());
    }
    let here = Targets::new(&config, place)?;
    let is_meant =
        |(module, linear): &(String, &Linear)| here.target(module).is_some() == linear.lora.is_some();
    if place == ALONE && linears.iter().all(is_meant) {
        return Ok(config);
    }
    let anywhere = places().map(|place| Targets::new(&config, place)).collect::<Result<Vec<_>>>()?;
    let module = |(module, linear): (String, &Linear)| {
        linear.lora.as_ref()?;
        Some((path_at(place, &module), anywhere.iter().find_map(|targets| targets.target(&module))?))
    };
    let parameter = |(name, linear): (&str, &ExpertLinear)| {
        linear.lora.as_ref()?;
        Some((path_at(place, name), anywhere.iter().find_map(|targets| targets.parameter(name))?))
    };
    let modules: Vec<(String, LoraShape)> = linears.into_iter().filter_map(module).collect();
    let router = |(module, linear): (String, &Linear)| {
        linear.lora.as_ref()?;
        let shape = anywhere.iter().find_map(|targets| targets.router(&module))?;
        Some((path_at(place, &format!("{module}.weight")), shape))
    };
    let routers = decoder.routers().into_iter().filter_map(router);
    let parameters: Vec<(String, LoraShape)> =
        decoder.expert_linears().into_iter().filter_map(parameter).chain(routers).collect();
    let names = |all: &[(String, LoraShape)]| all.iter().map(|(name, _)| name.clone()).collect();
    let shapes = modules.iter().chain(&parameters);
    let ranks = shapes.clone().filter(|(_, shape)| shape.rank != config.r);
    let alphas = shapes.filter(|(_, shape)| shape.alpha != config.lora_alpha);
    Ok(AdapterConfig {
        target_modules: ModuleNames::List(names(&modules)),
        target_parameters: names(&parameters),
        rank_pattern: ranks.map(|(name, shape)| (name.clone(), shape.rank)).collect(),
        alpha_pattern: alphas.map(|(name, shape)| (name.clone(), shape.alpha)).collect(),
        exclude_modules: None,
        layers_to_transform: None,
        layers_pattern: Vec::new(),
        ..config
    })
}
