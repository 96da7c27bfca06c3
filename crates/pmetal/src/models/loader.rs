//! From a checkpoint to a [`Decoder`]: every tensor that the configuration needs is there in its shape, and
//! every tensor that is there was needed.

pub(crate) mod stored;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use pmetal_engine::ops::{ExpertLinear, Linear};
use pmetal_engine::{Category, DType, Device, Parameter, Tensor, Weight};
use pmetal_formats::checkpoint::Checkpoint;

use self::stored::StoredNames;
use super::config::Config;
use super::decoder::{Decoder, TokenRun};
use super::families;
use super::inputs::AngleCache;
use super::layer::{Layer, Named, Source, read_norm};
use super::spec::{FeedForwardSpec, LayerSpec, Spec};
use crate::error::{Error, Result};

pub use self::stored::check;
use crate::lora::experts::ExpertMatrix;

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
    let (spec, mut notes) = (spec_of(checkpoint, config)?, Vec::new());
    check(checkpoint, &spec, &mut notes)?;
    let source = CheckpointSource { checkpoint, names: StoredNames::of(checkpoint), device, options };
    Ok(LoadedModel { decoder: build(&source, spec, device, options.dtype, base)?, notes })
}

/// What a checkpoint is by its configuration and, where that ties the head to the embedding, by its tensors: transformers
/// leaves a head that differs from the embedding as it is.
///
/// # Errors
/// As [`families::read`]; what reading the two returns.
pub(crate) fn spec_of(checkpoint: &Checkpoint, config: &Config) -> Result<Spec> {
    let mut spec = families::read(config)?;
    spec.tied_head = spec.tied_head && !StoredNames::of(checkpoint).has_head_of_its_own()?;
    Ok(spec)
}

/// Loads the tensors that a specification needs, whatever else the checkpoint holds.
///
/// # Errors
/// What reading the files returns; out of memory.
pub(crate) fn load_spec(
    checkpoint: &Checkpoint,
    spec: Spec,
    device: &Device,
    dtype: DType,
) -> Result<Decoder> {
    let options = LoadOptions { dtype, train_all: false };
    let source = CheckpointSource { checkpoint, names: StoredNames::of(checkpoint), device, options };
    build(&source, spec, device, options.dtype, BaseStorage::Typed)
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
    let names = StoredNames::of(checkpoint);
    let source = CheckpointSource { checkpoint, names, device: decoder.device(), options };
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
    let original = decoder.loss_through(run, labels, |index| Layer::read(source, spec, index))?;
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

struct CheckpointSource<'a> {
    checkpoint: &'a Checkpoint,
    names: StoredNames<'a>,
    device: &'a Device,
    options: LoadOptions,
}

impl CheckpointSource<'_> {
    fn f32(&self, name: &str, shape: &[usize], category: Category) -> Result<Tensor> {
        let mut pieces = self.names.pieces(name, shape).into_iter();
        let mut values = match pieces.next() {
            Some(piece) => self.checkpoint.read_f32(&piece.name)?,
            None => Vec::new(),
        };
        for piece in pieces {
            values.extend(self.checkpoint.read_f32(&piece.name)?);
        }
        Ok(Tensor::from_slice(self.device, category, shape, &values)?)
    }

    fn trained(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        Ok(Weight::Trainable(Parameter::new(name, self.f32(name, shape, Category::Parameters)?)))
    }
}

impl Source for CheckpointSource<'_> {
    fn matrix(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        match self.options.train_all {
            true => self.trained(name, shape),
            false => self.frozen(name, shape),
        }
    }

    fn frozen(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        use pmetal_formats::DType as Stored;
        let pieces = self.names.pieces(name, shape);
        let types = pieces.iter().map(|piece| self.checkpoint.info(&piece.name).map(|info| info.dtype));
        // Parts of several types are widened and rounded like blocks.
        let stored = types.reduce(|all, one| all.filter(|_| all == one)).flatten();
        let target = match stored {
            Some(Stored::Bf16) => DType::Bf16,
            Some(Stored::F16) => DType::F16,
            Some(Stored::F32) => DType::F32,
            _ => self.options.dtype,
        };
        // Products on other devices read one type; a CPU widens what it reads.
        let target = if self.device.is_host() { target } else { self.options.dtype };
        if target == DType::F32 {
            return Ok(Weight::Frozen(self.f32(name, shape, Category::Weights)?));
        }
        let mut weight = Tensor::scratch(self.device, Category::Weights, target, shape)?;
        let same =
            matches!((stored, target), (Some(Stored::Bf16), DType::Bf16) | (Some(Stored::F16), DType::F16));
        if same {
            weight.read_from(|bytes| {
                let mut rest = bytes;
                pieces.iter().try_for_each(|piece| {
                    let size = piece.shape.iter().product::<usize>() * target.bytes();
                    let (own, others) = std::mem::take(&mut rest).split_at_mut(size);
                    rest = others;
                    self.checkpoint.read_into(&piece.name, own)
                })
            })?;
        } else {
            let values = self.f32(name, shape, Category::Workspace)?;
            self.device.kernels().convert(&values, &mut weight);
        }
        Ok(Weight::Frozen(weight))
    }

    fn vector(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        if self.options.train_all {
            return self.trained(name, shape);
        }
        self.constant(name, shape)
    }

    fn constant(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        Ok(Weight::Frozen(self.f32(name, shape, Category::Weights)?))
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

    fn uniform(&self, name: &str, shape: &[usize], trained: bool) -> Result<Tensor> {
        let key = pmetal_engine::random::RandomKey {
            seed: self.seed,
            step: 0,
            stream: pmetal_engine::random::stream_of(name),
        };
        let inputs = shape.last().copied().unwrap_or(1);
        let bound = (3.0 / inputs as f32).sqrt();
        let target = match (trained, self.device.is_host()) {
            (true, _) => DType::F32,
            (false, true) => self.stored,
            (false, false) => self.options.dtype,
        };
        let category = if trained { Category::Parameters } else { Category::Weights };
        let mut values = Tensor::scratch(self.device, category, target, shape)?;
        self.device.kernels().uniform(key, bound, &mut values);
        Ok(values)
    }
}

impl Source for RandomSource<'_> {
    fn matrix(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        Ok(self.weight(name, self.uniform(name, shape, self.options.train_all)?))
    }

    fn frozen(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        Ok(Weight::Frozen(self.uniform(name, shape, false)?))
    }

    fn vector(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        let value = if name.ends_with(".bias") { 0.0 } else { 1.0 };
        let category = if self.options.train_all { Category::Parameters } else { Category::Weights };
        let values = vec![value; shape.iter().product()];
        Ok(self.weight(name, Tensor::from_slice(self.device, category, shape, &values)?))
    }

    fn constant(&self, _: &str, shape: &[usize]) -> Result<Weight> {
        Ok(Weight::Frozen(Tensor::zeros(self.device, Category::Weights, DType::F32, shape)?))
    }
}

/// One tensor that a decoder needs.
pub(super) struct Need {
    /// Its name in the checkpoint of a causal language model.
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
}

impl Need {
    /// Number of its elements.
    pub(super) fn elements(&self) -> u128 {
        self.shape.iter().map(|&size| size as u128).product()
    }
}

/// Collects what is asked for and gives nothing.
#[derive(Default)]
struct Listing {
    needs: RefCell<Vec<Need>>,
}

impl Listing {
    fn note(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        self.needs.borrow_mut().push(Need { name: name.to_owned(), shape: shape.to_vec() });
        Ok(Weight::Frozen(Tensor::zeros(&Device::cpu(), Category::Workspace, DType::F32, &[0])?))
    }
}

impl Source for Listing {
    fn matrix(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        self.note(name, shape)
    }

    fn frozen(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        self.note(name, shape)
    }

    fn vector(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        self.note(name, shape)
    }

    fn constant(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        self.note(name, shape)
    }
}

/// The weights outside of the layers.
struct Outer {
    embedding: Weight,
    final_norm: super::layer::Norm,
    head: Option<Weight>,
}

impl Outer {
    fn read(source: &dyn Source, spec: &Spec) -> Result<Self> {
        let table = [spec.vocabulary, spec.width];
        let head = (!spec.tied_head).then(|| source.matrix(HEAD, &table)).transpose()?;
        let final_norm = read_norm(source, spec, "model.norm.weight", &[spec.width])?;
        Ok(Self { embedding: source.matrix(EMBEDDING, &table)?, final_norm, head })
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

const LISTED: &str = "invariant: a listing gives weights without elements";

/// Every tensor that a decoder needs.
pub(super) fn needs(spec: &Spec) -> Vec<Need> {
    let listing = Listing::default();
    Outer::read(&listing, spec).expect(LISTED);
    for index in 0..spec.layers.len() {
        Layer::read(&listing, spec, index).expect(LISTED);
    }
    listing.needs.into_inner()
}

/// Module path and shape \[N, D\] of every linear layer inside the decoder layers.
pub fn linear_shapes(spec: &Spec) -> Vec<(String, [usize; 2])> {
    let mut shapes = Vec::new();
    for index in 0..spec.layers.len() {
        let listing = Listing::default();
        let layer = Layer::read(&listing, spec, index).expect(LISTED);
        let needs = listing.needs.into_inner();
        for name in layer.modules().into_iter().flat_map(|module| module.names.iter()) {
            let weight = format!("{name}.weight");
            let need = needs.iter().find(|need| need.name == weight);
            shapes.extend(need.map(|need| (name.clone(), [need.shape[0], need.shape[1]])));
        }
    }
    shapes
}

/// The layers that choose experts, with their shapes \[N, D\].
pub fn router_shapes(spec: &Spec) -> Vec<(String, [usize; 2])> {
    let router = |(index, layer): (usize, &LayerSpec)| {
        let FeedForwardSpec::Experts(part) = &layer.feed_forward else { return None };
        Some((format!("model.layers.{index}.{}", part.router_path), [part.count, spec.width]))
    };
    spec.layers.iter().enumerate().filter_map(router).collect()
}

/// The weights of a causal language model that a checkpoint stores as blocks of codes.
pub(crate) fn packed_weights(checkpoint: &Checkpoint) -> BTreeSet<String> {
    use pmetal_formats::DType as Stored;
    let is_packed = |name: &&str| {
        let stored = checkpoint.info(name).map(|info| info.dtype);
        matches!(stored, Some(Stored::Fp8Blocks | Stored::Mxfp4))
    };
    let names = StoredNames::of(checkpoint);
    checkpoint.names().filter(is_packed).map(|name| names.alone(&stored::stacked_name(name))).collect()
}

/// The matrices of experts inside the decoder layers.
pub fn expert_matrices(spec: &Spec) -> Vec<ExpertMatrix> {
    let mut matrices = Vec::new();
    for (index, layer) in spec.layers.iter().enumerate() {
        let FeedForwardSpec::Experts(part) = &layer.feed_forward else { continue };
        let matrix = |name: &str, features, inputs| ExpertMatrix {
            name: format!("model.layers.{index}.{}.{name}", part.path),
            sizes: [part.count, features, inputs],
            swapped: part.swapped_adapters,
            transposed: part.transposed,
        };
        matrices.push(matrix("gate_up_proj", 2 * part.width, spec.width));
        matrices.push(matrix("down_proj", spec.width, part.width));
    }
    matrices
}

fn build(
    source: &dyn Source,
    spec: Spec,
    device: &Device,
    dtype: DType,
    base: BaseStorage,
) -> Result<Decoder> {
    let layers = (0..spec.layers.len())
        .map(|index| {
            let mut layer = Layer::read(source, &spec, index)?;
            if base == BaseStorage::Fp8 {
                for module in layer.modules_mut() {
                    module.group.quantise()?;
                }
            }
            layer.pack(dtype)?;
            Ok(Arc::new(layer))
        })
        .collect::<Result<Vec<_>>>()?;
    let Outer { embedding, final_norm, head } = Outer::read(source, &spec)?;
    Ok(Decoder {
        embedding,
        final_norm,
        head,
        layers,
        device: device.clone(),
        angle_cache: AngleCache::default(),
        dtype,
        spec,
    })
}

/// The module path of a weight.
fn module_of(weight: &str) -> &str {
    weight.strip_suffix(".weight").unwrap_or(weight)
}

impl Decoder {
    /// Every linear layer inside the decoder layers, by the module path that checkpoints use; the output head
    /// is not among them.
    pub fn linears(&self) -> Vec<(String, &Linear)> {
        let modules = self.layers.iter().flat_map(|layer| layer.modules());
        modules.flat_map(|module| module.names.iter().cloned().zip(module.group.layers())).collect()
    }

    /// Lets `change` replace parts of every linear layer inside the decoder layers.
    ///
    /// # Errors
    /// The first error of `change`.
    pub fn change_linears(&mut self, mut change: impl FnMut(&str, &mut Linear) -> Result<()>) -> Result<()> {
        for layer in &mut self.layers {
            let layer = Arc::make_mut(layer);
            for module in layer.modules_mut() {
                for (name, linear) in module.names.iter().zip(module.group.layers_mut()) {
                    change(name, linear)?;
                }
            }
            layer.pack(self.dtype)?;
        }
        Ok(())
    }

    /// The layers that choose experts, by their module paths.
    pub fn routers(&self) -> Vec<(String, &Linear)> {
        let routers = self.layers.iter().filter_map(|layer| layer.router());
        routers.map(|(weight, linear)| (module_of(weight).to_owned(), linear)).collect()
    }

    /// Lets `change` replace parts of every layer that chooses experts.
    ///
    /// # Errors
    /// The first error of `change`.
    pub fn change_routers(&mut self, mut change: impl FnMut(&str, &mut Linear) -> Result<()>) -> Result<()> {
        let routers = self.layers.iter_mut().filter_map(|layer| Arc::make_mut(layer).router_mut());
        routers.into_iter().try_for_each(|(weight, linear)| change(module_of(&weight), linear))
    }

    /// Every linear layer of the decoder layers that may have an adapter.
    pub(crate) fn adaptable(&self) -> impl Iterator<Item = (String, &Linear)> {
        self.linears().into_iter().chain(self.routers())
    }

    /// Every matrix of experts, by the name of its parameter.
    pub fn expert_linears(&self) -> Vec<(&str, &ExpertLinear)> {
        let modules = self.layers.iter().flat_map(|layer| layer.expert_modules());
        modules.map(|module| (&*module.name, &module.layer)).collect()
    }

    /// The names and sizes of these, in the same order.
    pub fn expert_matrices(&self) -> Vec<ExpertMatrix> {
        expert_matrices(&self.spec)
    }

    /// Lets `change` replace parts of every matrix of experts.
    ///
    /// # Errors
    /// The first error of `change`.
    pub fn change_expert_linears(
        &mut self,
        mut change: impl FnMut(&str, &mut ExpertLinear) -> Result<()>,
    ) -> Result<()> {
        let layers = self.layers.iter_mut().map(Arc::make_mut);
        layers.flat_map(|layer| layer.expert_modules_mut()).try_for_each(|module| {
            change(&module.name.clone(), &mut module.layer)?;
            Ok(module.layer.pack(self.dtype)?)
        })
    }

    /// Every weight of the base model by the name that checkpoints use, tied ones once.
    pub fn weights(&self) -> Vec<(String, &Weight)> {
        let mut weights = vec![(EMBEDDING.to_owned(), &self.embedding)];
        weights.extend(self.head.as_ref().map(|head| (HEAD.to_owned(), head)));
        for (name, linear) in self.linears() {
            weights.push((format!("{name}.weight"), &linear.weight));
            weights.extend(linear.bias.as_ref().map(|bias| (format!("{name}.bias"), bias)));
        }
        let others = self.layers.iter().flat_map(|layer| layer.other_weights());
        weights.extend(others.map(|(name, weight)| (name.to_owned(), weight)));
        let Named { name, weight } = &self.final_norm.weight;
        weights.push((name.to_string(), weight));
        weights
    }

    /// Columns that the adapters of all layers keep for each token: their ranks, those of experts for each that a token goes to.
    pub fn adapter_columns(&self) -> usize {
        let linears = self.adaptable().filter_map(|(_, linear)| linear.lora.as_ref());
        let ranks: usize = linears.map(|lora| lora.a.shape()[0]).sum();
        let of_experts = self.layers.iter().map(|layer| {
            let FeedForwardSpec::Experts(part) = &layer.spec.feed_forward else { return 0 };
            let adapters = layer.expert_modules().filter_map(|module| module.layer.lora.as_ref());
            part.router.choices * adapters.map(|lora| lora.a.shape()[1]).sum::<usize>()
        });
        ranks + of_experts.sum::<usize>()
    }

    /// Everything that is trained: parameters of the base model, then those of adapters, in a fixed order.
    pub fn parameters(&self) -> Vec<Arc<Parameter>> {
        let own = self.weights().into_iter().filter_map(|(_, weight)| weight.parameter().cloned());
        let adapters = self
            .adaptable()
            .filter_map(|(_, linear)| linear.lora.as_ref())
            .flat_map(|lora| [&lora.a, &lora.b].map(|weight| weight.parameter().cloned()));
        let of_experts = self
            .expert_linears()
            .into_iter()
            .filter_map(|(_, linear)| linear.lora.as_ref())
            .flat_map(|lora| [&lora.a, &lora.b].map(|weight| weight.parameter().cloned()));
        own.chain(adapters.flatten()).chain(of_experts.flatten()).collect()
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
