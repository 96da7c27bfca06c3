//! From a checkpoint to a [`Decoder`]: every tensor that the configuration needs is there in its shape, and
//! every tensor that is there was needed.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use pmetal_engine::ops::{Linear, LinearGroup};
use pmetal_engine::{Category, DType, Device, Parameter, Tensor, Weight};
use pmetal_formats::checkpoint::Checkpoint;

use super::config::Config;
use super::decoder::{Decoder, Layer, TokenRun};
use super::families;
use super::inputs::AngleCache;
use super::spec::{FeedForwardSpec, LayerSpec, Spec};
use crate::error::{Error, Faults, Result};

/// How weights come into memory.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// Type of activations; block-quantised weights are expanded to it.
    pub dtype: DType,
    /// Whether all weights are trained, in f32.
    pub train_all: bool,
}

/// How the frozen matrices of decoder layers are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BaseStorage {
    /// In the type of activations on a GPU, as stored on a CPU.
    Typed,
    /// In eight bits (e4m3) with a scale for each output, where sizes are multiples of 16.
    Fp8,
}

/// A model with what was learnt about its files on the way.
pub struct LoadedModel {
    /// The decoder.
    pub decoder: Decoder,
    /// Lines for the user: tensors that were passed over knowingly.
    pub notes: Vec<String>,
}

/// Loads a checkpoint whose configuration was parsed already.
///
/// # Errors
/// [`Error::Config`] for a configuration that is not computed; [`Error::Checkpoint`] listing every tensor that is
/// missing, has another shape or is left over; what reading the files returns; out of memory. Nothing is
/// allocated for a tensor before its shape in the file was compared with the configuration.
pub fn load(
    checkpoint: &Checkpoint,
    config: &Config,
    device: &Device,
    options: LoadOptions,
) -> Result<LoadedModel> {
    load_base(checkpoint, config, device, options, BaseStorage::Typed)
}

/// [`load`] with a choice of how frozen matrices are kept. A layer is rounded before the next is read.
///
/// # Errors
/// As [`load`]; where the device has no products of 8-bit floats.
pub fn load_base(
    checkpoint: &Checkpoint,
    config: &Config,
    device: &Device,
    options: LoadOptions,
    base: BaseStorage,
) -> Result<LoadedModel> {
    let spec = families::read(config)?;
    let mut notes = Vec::new();
    check(checkpoint, &spec, &mut notes)?;
    let source = CheckpointSource { checkpoint, device, options };
    Ok(LoadedModel { decoder: build(&source, spec, device, options.dtype, base)?, notes })
}

/// The mean loss of a run by a decoder and by the checkpoint's own weights, which are read again one layer at a time.
/// Adapters of the decoder count in the first alone.
///
/// # Errors
/// What reading the files returns; out of memory.
pub fn losses_beside_checkpoint(
    decoder: &Decoder,
    checkpoint: &Checkpoint,
    run: &TokenRun,
    labels: &[i32],
) -> Result<[f64; 2]> {
    let options = LoadOptions { dtype: decoder.dtype, train_all: false };
    let source = CheckpointSource { checkpoint, device: decoder.device(), options };
    losses_beside(decoder, &source, run, labels)
}

/// [`losses_beside_checkpoint`] for a decoder of [`random_base`].
///
/// # Errors
/// As [`losses_beside_checkpoint`].
pub fn losses_beside_random(
    decoder: &Decoder,
    config: &Config,
    seed: u64,
    run: &TokenRun,
    labels: &[i32],
) -> Result<[f64; 2]> {
    let options = LoadOptions { dtype: decoder.dtype, train_all: false };
    let source = RandomSource { device: decoder.device(), options, stored: stored_type(config)?, seed };
    losses_beside(decoder, &source, run, labels)
}

fn losses_beside(decoder: &Decoder, source: &dyn Source, run: &TokenRun, labels: &[i32]) -> Result<[f64; 2]> {
    let spec = &decoder.spec;
    let original = decoder.loss_through(run, labels, |index| {
        read_layer(source, &spec.layers[index], spec.width, &format!("model.layers.{index}"))
    })?;
    Ok([decoder.mean_loss(run, labels)?, original])
}

/// A model of random weights, for benchmarks: normal numbers would be no better than these uniform ones.
/// Matrices have the type that the configuration gives for the checkpoint, so that memory is what it would be.
///
/// # Errors
/// [`Error::Config`]; out of memory.
pub fn random(config: &Config, device: &Device, options: LoadOptions, seed: u64) -> Result<Decoder> {
    random_base(config, device, options, BaseStorage::Typed, seed)
}

/// [`random`] with a choice of how frozen matrices are kept.
///
/// # Errors
/// As [`random`]; where the device has no products of 8-bit floats.
pub fn random_base(
    config: &Config,
    device: &Device,
    options: LoadOptions,
    base: BaseStorage,
    seed: u64,
) -> Result<Decoder> {
    let spec = families::read(config)?;
    let stored = stored_type(config)?;
    build(&RandomSource { device, options, stored, seed }, spec, device, options.dtype, base)
}

/// The type of a checkpoint's matrices by its configuration; f32, as in transformers, where it says nothing.
fn stored_type(config: &Config) -> Result<DType> {
    // Newer writers call the field `dtype`.
    let name = config.text("dtype", "")?;
    let name = if name.is_empty() { config.text("torch_dtype", "float32")? } else { name };
    match name.as_str() {
        "float32" => Ok(DType::F32),
        "bfloat16" => Ok(DType::Bf16),
        "float16" => Ok(DType::F16),
        other => Err(Error::Config(format!(
            "`dtype` is \"{other}\", random weights can be \"float32\", \"bfloat16\" or \"float16\""
        ))),
    }
}

/// Where the weights of a decoder come from.
trait Source {
    /// A matrix, or the embedding.
    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Weight>;
    /// A norm's weight or a bias, in f32.
    fn vector(&self, name: &str, width: usize) -> Result<Weight>;
}

struct CheckpointSource<'a> {
    checkpoint: &'a Checkpoint,
    device: &'a Device,
    options: LoadOptions,
}

impl CheckpointSource<'_> {
    fn f32(&self, name: &str, shape: &[usize], category: Category) -> Result<Tensor> {
        let values = self.checkpoint.read_f32(name)?;
        Ok(Tensor::from_slice(self.device, category, shape, &values)?)
    }

    fn trained(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        Ok(Weight::Trainable(Parameter::new(name, self.f32(name, shape, Category::Parameters)?)))
    }
}

impl Source for CheckpointSource<'_> {
    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Weight> {
        if self.options.train_all {
            return self.trained(name, &shape);
        }
        use pmetal_formats::DType as Stored;
        let stored = self.checkpoint.info(name).map(|info| info.dtype);
        let target = match stored {
            Some(Stored::Bf16) => DType::Bf16,
            Some(Stored::F16) => DType::F16,
            Some(Stored::F32) => DType::F32,
            _ => self.options.dtype,
        };
        // Products on other devices read one type; a CPU widens what it reads.
        let target = if self.device.is_host() { target } else { self.options.dtype };
        if target == DType::F32 {
            return Ok(Weight::Frozen(self.f32(name, &shape, Category::Weights)?));
        }
        let mut weight = Tensor::scratch(self.device, Category::Weights, target, &shape)?;
        let same =
            matches!((stored, target), (Some(Stored::Bf16), DType::Bf16) | (Some(Stored::F16), DType::F16));
        if same {
            weight.read_from(|bytes| self.checkpoint.read_into(name, bytes))?;
        } else {
            let values = self.f32(name, &shape, Category::Workspace)?;
            self.device.kernels().convert(&values, &mut weight);
        }
        Ok(Weight::Frozen(weight))
    }

    fn vector(&self, name: &str, width: usize) -> Result<Weight> {
        if self.options.train_all {
            return self.trained(name, &[width]);
        }
        Ok(Weight::Frozen(self.f32(name, &[width], Category::Weights)?))
    }
}

struct RandomSource<'a> {
    device: &'a Device,
    options: LoadOptions,
    stored: DType,
    seed: u64,
}

impl RandomSource<'_> {
    fn weight(&self, name: &str, value: Tensor) -> Weight {
        match self.options.train_all {
            true => Weight::Trainable(Parameter::new(name, value)),
            false => Weight::Frozen(value),
        }
    }
}

impl Source for RandomSource<'_> {
    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Weight> {
        let key = pmetal_engine::random::RandomKey {
            seed: self.seed,
            step: 0,
            stream: pmetal_engine::random::stream_of(name),
        };
        let bound = (3.0 / shape[1] as f32).sqrt();
        let target = match (self.options.train_all, self.device.is_host()) {
            (true, _) => DType::F32,
            (false, true) => self.stored,
            (false, false) => self.options.dtype,
        };
        let category = if self.options.train_all { Category::Parameters } else { Category::Weights };
        let mut values = Tensor::scratch(self.device, category, target, &shape)?;
        self.device.kernels().uniform(key, bound, &mut values);
        Ok(self.weight(name, values))
    }

    fn vector(&self, name: &str, width: usize) -> Result<Weight> {
        let value = if name.ends_with(".bias") { 0.0 } else { 1.0 };
        let category = if self.options.train_all { Category::Parameters } else { Category::Weights };
        Ok(self.weight(name, Tensor::from_slice(self.device, category, &[width], &vec![value; width])?))
    }
}

/// One tensor that a decoder needs: its name without a prefix, and its shape.
type Need = (String, Vec<usize>);

/// The projections of a layer: name, inputs, outputs, bias.
fn projections(spec: &LayerSpec, width: usize) -> [(&'static str, usize, usize, bool); 7] {
    let attention = &spec.attention;
    let FeedForwardSpec { width: inner, bias, .. } = spec.feed_forward;
    let queries = attention.query_heads * attention.head_width;
    let keys = attention.key_value_heads * attention.head_width;
    [
        ("self_attn.q_proj", width, queries, attention.input_bias),
        ("self_attn.k_proj", width, keys, attention.input_bias),
        ("self_attn.v_proj", width, keys, attention.input_bias),
        ("self_attn.o_proj", queries, width, attention.output_bias),
        ("mlp.gate_proj", width, inner, bias),
        ("mlp.up_proj", width, inner, bias),
        ("mlp.down_proj", inner, width, bias),
    ]
}

/// Module path and shape \[N, D\] of every linear layer inside the decoder layers.
pub fn linear_shapes(spec: &Spec) -> Vec<(String, [usize; 2])> {
    let each = spec.layers.iter().enumerate();
    each.flat_map(|(index, layer)| {
        projections(layer, spec.width)
            .map(|(name, inputs, outputs, _)| (format!("model.layers.{index}.{name}"), [outputs, inputs]))
    })
    .collect()
}

/// Every tensor that a decoder needs.
fn needs(spec: &Spec) -> impl Iterator<Item = Need> {
    let width = spec.width;
    let table = vec![spec.vocabulary, width];
    let mut outer = vec![
        ("model.embed_tokens.weight".to_owned(), table.clone()),
        ("model.norm.weight".to_owned(), vec![width]),
    ];
    if !spec.tied_head {
        outer.push(("lm_head.weight".to_owned(), table));
    }
    let layers = spec.layers.iter().enumerate().flat_map(move |(index, layer)| {
        let mut names: Vec<Need> = Vec::new();
        let prefix = format!("model.layers.{index}");
        for (name, inputs, outputs, bias) in projections(layer, width) {
            names.push((format!("{prefix}.{name}.weight"), vec![outputs, inputs]));
            if bias {
                names.push((format!("{prefix}.{name}.bias"), vec![outputs]));
            }
        }
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            names.push((format!("{prefix}.{norm}.weight"), vec![width]));
        }
        if layer.attention.head_norm {
            for norm in ["q_norm", "k_norm"] {
                let shape = vec![layer.attention.head_width];
                names.push((format!("{prefix}.self_attn.{norm}.weight"), shape));
            }
        }
        names
    });
    outer.into_iter().chain(layers)
}

/// Buffers that old checkpoints carry and that follow from the configuration.
fn is_derived(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || name.ends_with(".attn.masked_bias")
}

/// Compares a checkpoint's tensors with what a specification needs.
///
/// # Errors
/// [`Error::Checkpoint`] listing what is missing, has another shape or is left over.
pub fn check(checkpoint: &Checkpoint, spec: &Spec, notes: &mut Vec<String>) -> Result<()> {
    let mut faults = Faults::default();
    let mut left: BTreeSet<&str> = checkpoint.names().collect();
    for (name, shape) in needs(spec) {
        match checkpoint.info(&name) {
            None => faults.add(format!("tensor `{name}` {shape:?} is missing")),
            Some(info) if info.shape != shape => {
                faults.add(format!("tensor `{name}` has shape {:?}, the config needs {shape:?}", info.shape));
            }
            Some(_) => {}
        }
        left.remove(name.as_str());
    }
    if spec.tied_head && left.remove("lm_head.weight") {
        notes.push("lm_head.weight is passed over: the config ties the head to the embedding".to_owned());
    }
    for name in left.into_iter().filter(|name| !is_derived(name)) {
        faults.add(format!("tensor `{name}` is not used by model type `{}`", spec.family));
    }
    faults.into_result(checkpoint.path())
}

fn build(
    source: &dyn Source,
    spec: Spec,
    device: &Device,
    dtype: DType,
    base: BaseStorage,
) -> Result<Decoder> {
    let (width, vocabulary) = (spec.width, spec.vocabulary);
    let layers = spec
        .layers
        .iter()
        .enumerate()
        .map(|(index, layer)| {
            let mut layer = read_layer(source, layer, width, &format!("model.layers.{index}"))?;
            if base == BaseStorage::Fp8 {
                for group in layer.groups_mut() {
                    group.quantise()?;
                }
            }
            layer.pack(dtype)?;
            Ok(Arc::new(layer))
        })
        .collect::<Result<Vec<_>>>()?;
    let head =
        if spec.tied_head { None } else { Some(source.matrix("lm_head.weight", [vocabulary, width])?) };
    Ok(Decoder {
        embedding: source.matrix("model.embed_tokens.weight", [vocabulary, width])?,
        final_norm: source.vector("model.norm.weight", width)?,
        head,
        layers,
        device: device.clone(),
        angle_cache: AngleCache::default(),
        dtype,
        spec,
    })
}

/// A layer that is not packed yet.
fn read_layer(source: &dyn Source, spec: &LayerSpec, width: usize, prefix: &str) -> Result<Layer> {
    let linear = |(name, inputs, outputs, bias): (&str, usize, usize, bool)| -> Result<Linear> {
        let weight = source.matrix(&format!("{prefix}.{name}.weight"), [outputs, inputs])?;
        let bias = bias.then(|| source.vector(&format!("{prefix}.{name}.bias"), outputs)).transpose()?;
        Ok(Linear { weight, bias, lora: None })
    };
    let norm = |name: &str, width: usize| source.vector(&format!("{prefix}.{name}.weight"), width);
    let head_norm = |name: &str| {
        let width = spec.attention.head_width;
        spec.attention.head_norm.then(|| norm(&format!("self_attn.{name}"), width)).transpose()
    };
    let [query, key, value, output, gate, up, down] = projections(spec, width).map(linear);
    Ok(Layer {
        spec: spec.clone(),
        input_norm: norm("input_layernorm", width)?,
        projection: LinearGroup::new(vec![query?, key?, value?]),
        output: LinearGroup::new(vec![output?]),
        query_norm: head_norm("q_norm")?,
        key_norm: head_norm("k_norm")?,
        post_attention_norm: norm("post_attention_layernorm", width)?,
        gate_up: LinearGroup::new(vec![gate?, up?]),
        down: LinearGroup::new(vec![down?]),
    })
}

impl Layer {
    /// The groups of linear layers, in the order of [`projections`].
    fn groups(&self) -> [&LinearGroup; 4] {
        [&self.projection, &self.output, &self.gate_up, &self.down]
    }

    fn groups_mut(&mut self) -> [&mut LinearGroup; 4] {
        [&mut self.projection, &mut self.output, &mut self.gate_up, &mut self.down]
    }

    fn pack(&mut self, dtype: DType) -> Result<()> {
        for group in self.groups_mut() {
            group.pack(dtype)?;
        }
        Ok(())
    }
}

impl Decoder {
    /// Every linear layer inside the decoder layers, by the module path that checkpoints use; the output head
    /// is not among them.
    pub fn linears(&self) -> Vec<(String, &Linear)> {
        let each = self.layers.iter().enumerate();
        each.flat_map(|(index, layer)| {
            let names = projections(&layer.spec, self.spec.width).map(|projection| projection.0);
            names
                .into_iter()
                .zip(layer.groups().into_iter().flat_map(LinearGroup::layers))
                .map(move |(name, linear)| (format!("model.layers.{index}.{name}"), linear))
        })
        .collect()
    }

    /// Lets `change` replace parts of every linear layer inside the decoder layers.
    ///
    /// # Errors
    /// The first error of `change`.
    pub fn change_linears(&mut self, mut change: impl FnMut(&str, &mut Linear) -> Result<()>) -> Result<()> {
        for (index, layer) in self.layers.iter_mut().enumerate() {
            let layer = Arc::make_mut(layer);
            let names = projections(&layer.spec, self.spec.width).map(|projection| projection.0);
            let linears = layer.groups_mut().into_iter().flat_map(LinearGroup::layers_mut);
            for (name, linear) in names.into_iter().zip(linears) {
                change(&format!("model.layers.{index}.{name}"), linear)?;
            }
            layer.pack(self.dtype)?;
        }
        Ok(())
    }

    /// Every weight of the base model by the name that checkpoints use, tied ones once.
    pub fn weights(&self) -> Vec<(String, &Weight)> {
        let mut weights = vec![
            ("model.embed_tokens.weight".to_owned(), &self.embedding),
            ("model.norm.weight".to_owned(), &self.final_norm),
        ];
        weights.extend(self.head.as_ref().map(|head| ("lm_head.weight".to_owned(), head)));
        for (name, linear) in self.linears() {
            weights.push((format!("{name}.weight"), &linear.weight));
            weights.extend(linear.bias.as_ref().map(|bias| (format!("{name}.bias"), bias)));
        }
        for (index, layer) in self.layers.iter().enumerate() {
            let prefix = format!("model.layers.{index}");
            weights.push((format!("{prefix}.input_layernorm.weight"), &layer.input_norm));
            weights.push((format!("{prefix}.post_attention_layernorm.weight"), &layer.post_attention_norm));
            for (name, norm) in [("q_norm", &layer.query_norm), ("k_norm", &layer.key_norm)] {
                weights.extend(norm.as_ref().map(|norm| (format!("{prefix}.self_attn.{name}.weight"), norm)));
            }
        }
        weights
    }

    /// Everything that is trained: parameters of the base model, then those of adapters, in a fixed order.
    pub fn parameters(&self) -> Vec<Arc<Parameter>> {
        let own = self.weights().into_iter().filter_map(|(_, weight)| weight.parameter().cloned());
        let adapters = self
            .linears()
            .into_iter()
            .filter_map(|(_, linear)| linear.lora.as_ref())
            .flat_map(|lora| [&lora.a, &lora.b].map(|weight| weight.parameter().cloned()));
        own.chain(adapters.flatten()).collect()
    }
}

/// Opens a folder or a GGUF file and reads its configuration.
///
/// # Errors
/// What reading the files returns; [`Error::Config`].
pub fn open(path: &Path) -> Result<(Checkpoint, Config)> {
    let checkpoint = Checkpoint::open(path)?;
    let config = Config::new(checkpoint.config()?)?;
    Ok((checkpoint, config))
}
