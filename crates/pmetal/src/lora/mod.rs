//! Low-rank adapters: attaching them to a decoder, reading and writing them in PEFT's format, and merging
//! them into the weights.

mod by_expert;
pub mod experts;
pub mod fuse;
mod places;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use pmetal_engine::ops::{Linear, Lora};
use pmetal_engine::random::{RandomKey, stream_of};
use pmetal_engine::{Category, DType, Parameter, Tensor, Weight};
use pmetal_formats::adapter::{AdapterConfig, LoraShape};
use pmetal_formats::safetensors::SafetensorsFile;

use self::experts::{ExpertMatrix, ExpertPart, ExpertParts, Stored};
pub use self::places::config_to_write;
use self::places::{Targets, place_of, tensor_at};
use crate::error::{Error, Faults, Result};
use crate::models::loader::stored::ALONE;
use crate::models::{Decoder, Spec, loader};

/// Names of the two files of an adapter folder.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// See [`CONFIG_FILE`].
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// Adds fresh, trainable adapters to every linear layer that the configuration targets, with PEFT's
/// initialisation: A uniform in +-1/sqrt(D) (Kaiming with a = sqrt 5), B zero. Returns the modules' names.
///
/// # Errors
/// [`Error::Usage`] when nothing is targeted; out of memory.
pub fn attach(decoder: &mut Decoder, config: &AdapterConfig, seed: u64) -> Result<Vec<String>> {
    let device = decoder.device().clone();
    let mut names = Vec::new();
    let matcher = Targets::new(config, ALONE)?;
    let mut attach = |module: &str, linear: &mut Linear, shape: Option<LoraShape>| -> Result<()> {
        let Some(shape) = shape else { return Ok(()) };
        let (features, width) = dimensions(linear);
        let key = RandomKey { seed, step: 0, stream: stream_of(module) };
        let bound = 1.0 / (width as f32).sqrt();
        let values: Vec<f32> =
            (0..(shape.rank * width) as u64).map(|i| (2.0 * key.uniform(i) - 1.0) * bound).collect();
        let a = Tensor::from_slice(&device, Category::Parameters, &[shape.rank, width], &values)?;
        let b = Tensor::zeros(&device, Category::Parameters, DType::F32, &[features, shape.rank])?;
        linear.lora = Some(Lora {
            a: Weight::Trainable(Parameter::new(key_of(module, "A"), a)),
            b: Weight::Trainable(Parameter::new(key_of(module, "B"), b)),
            scale: shape.scale as f32,
            dropout: config.lora_dropout as f32,
            stream: stream_of(module),
        });
        names.push(module.to_owned());
        Ok(())
    };
    decoder.change_linears(|module, linear| attach(module, linear, matcher.target(module)))?;
    decoder.change_routers(|module, linear| attach(module, linear, matcher.router(module)))?;
    names.extend(experts::attach(decoder, &matcher, seed)?);
    if names.is_empty() {
        return Err(Error::Usage(format!(
            "target modules {} match none of the model's linear layers",
            config.target_modules
        )));
    }
    Ok(names)
}

/// The two halves of one module's adapter.
pub struct AdapterPart {
    /// R.
    pub rank: usize,
    /// s.
    pub scale: f64,
    /// A \[R, D\].
    pub a: Vec<f32>,
    /// B \[N, R\].
    pub b: Vec<f32>,
}

/// What an adapter folder holds.
pub struct AdapterParts {
    /// Its configuration.
    pub config: AdapterConfig,
    /// By module.
    pub linears: BTreeMap<String, AdapterPart>,
    /// By parameter.
    pub experts: ExpertParts,
}

/// The tensors of an adapter that is read, by the names that they have for a text model by itself.
struct AdapterFile<'a> {
    file: &'a SafetensorsFile,
    /// Where the file has the text model.
    place: &'static str,
    /// Those that nobody asked for yet.
    left: BTreeSet<&'a str>,
    faults: Faults,
}

impl AdapterFile<'_> {
    fn has(&self, name: &str) -> bool {
        self.file.info(&tensor_at(self.place, name)).is_some()
    }

    /// The values of a tensor; `None`, and a fault, where it is missing or has another shape.
    fn take(&mut self, name: &str, expected: [usize; 2]) -> Result<Option<Vec<f32>>> {
        let name = &*tensor_at(self.place, name);
        self.left.remove(name);
        match self.file.info(name) {
            None => self.faults.add(format!("tensor `{name}` {expected:?} is missing")),
            Some(info) if info.shape != expected => {
                self.faults.add(format!("tensor `{name}` has shape {:?}, expected {expected:?}", info.shape));
            }
            Some(_) => return Ok(Some(self.file.read_f32(name)?)),
        }
        Ok(None)
    }
}

/// What of a model adapters may be of.
pub struct Adaptable {
    /// Linear layers with their shapes \[N, D\].
    pub linears: Vec<(String, [usize; 2])>,
    /// Layers that choose experts, which adapters have as parameters, with theirs.
    pub routers: Vec<(String, [usize; 2])>,
    /// Matrices of experts.
    pub matrices: Vec<ExpertMatrix>,
}

impl Adaptable {
    /// All that a specification has.
    pub fn of(spec: &Spec) -> Self {
        let (linears, routers) = (loader::linear_shapes(spec), loader::router_shapes(spec));
        Self { linears, routers, matrices: loader::expert_matrices(spec) }
    }
}

/// Reads an adapter folder for a model that has these layers. The folder may be of a whole multimodal model, if it adapts
/// nothing but the text model.
///
/// # Errors
/// [`Error::Checkpoint`] naming tensors that are missing, left over or of another shape; what reading returns.
pub fn read(folder: &Path, of: &Adaptable) -> Result<AdapterParts> {
    let config = AdapterConfig::open(&folder.join(CONFIG_FILE))?;
    let path = folder.join(WEIGHTS_FILE);
    let file = SafetensorsFile::open(&path)?;
    let left: BTreeSet<&str> = file.tensors().iter().map(|info| info.name.as_str()).collect();
    let mut file = AdapterFile { file: &file, place: place_of(&left), left, faults: Faults::default() };
    let (matcher, mut targeted, mut parts) = (Targets::new(&config, file.place)?, 0, BTreeMap::new());
    let linears = of.linears.iter().map(|linear| (matcher.target(&linear.0), linear));
    let routers = of.routers.iter().map(|router| (matcher.router(&router.0), router));
    for (shape, (module, [features, width])) in linears.chain(routers) {
        let Some(shape) = shape else { continue };
        targeted += 1;
        let mut half = |letter: &str, expected| file.take(&key_of(module, letter), expected);
        if let (Some(a), Some(b)) = (half("A", [shape.rank, *width])?, half("B", [*features, shape.rank])?) {
            parts.insert(module.clone(), AdapterPart { rank: shape.rank, scale: shape.scale, a, b });
        }
    }
    let experts = experts::read(&mut file, &of.matrices, &matcher)?;
    let AdapterFile { left, mut faults, .. } = file;
    if targeted == 0 && experts.is_empty() {
        return Err(Error::Usage(format!(
            "`{}`: target modules {} match none of the model's linear layers",
            folder.display(),
            config.target_modules
        )));
    }
    for name in left {
        faults.add(format!("tensor `{name}` belongs to no targeted module"));
    }
    faults.into_result(&path)?;
    Ok(AdapterParts { config, linears: parts, experts })
}

/// Puts an adapter folder onto a decoder; `trainable` says whether its tensors become parameters.
///
/// # Errors
/// As [`read`]; [`Error::Usage`] when an adapter is to be trained that names experts one by one; out of memory.
pub fn load(decoder: &mut Decoder, folder: &Path, trainable: bool) -> Result<AdapterConfig> {
    let parts = read_for(decoder, folder)?;
    let is_by_expert = |(_, part): &(&String, &ExpertPart)| part.is_by_expert();
    if let Some((name, _)) = parts.experts.iter().find(is_by_expert).filter(|_| trainable) {
        return Err(Error::Usage(format!(
            "`{}` adapts the experts of `{name}` one by one, as adapters of before transformers 5 do: it can be used and \
             merged, not trained; merge it and train a new one on the result",
            folder.display()
        )));
    }
    Ok(put(decoder, parts, trainable)?.0)
}

/// Reads an adapter folder for a decoder.
pub(crate) fn read_for(decoder: &Decoder, folder: &Path) -> Result<AdapterParts> {
    read(folder, &Adaptable::of(&decoder.spec))
}

/// How the trained halves of the adapters of experts lie in files, by the names of their parameters.
pub(crate) fn stored_halves(parts: &ExpertParts) -> BTreeMap<String, Stored> {
    let halves = parts.values().flat_map(|part| [&part.a.stored, &part.b.stored]);
    halves.map(|stored| (stored.name().to_owned(), stored.clone())).collect()
}

/// Puts adapters that were read onto a decoder, also those that cannot be trained for more than a step; gives back what is
/// not used up.
pub(crate) fn put(
    decoder: &mut Decoder,
    parts: AdapterParts,
    trainable: bool,
) -> Result<(AdapterConfig, ExpertParts)> {
    let AdapterParts { config, linears: mut parts, experts } = parts;
    let device = decoder.device().clone();
    let mut set = |module: &str, linear: &mut Linear| -> Result<()> {
        let Some(part) = parts.remove(module) else { return Ok(()) };
        let (features, width) = dimensions(linear);
        let weight = |letter: &str, shape: [usize; 2], values: &[f32]| -> Result<Weight> {
            let category = if trainable { Category::Parameters } else { Category::Weights };
            let tensor = Tensor::from_slice(&device, category, &shape, values)?;
            Ok(match trainable {
                true => Weight::Trainable(Parameter::new(key_of(module, letter), tensor)),
                false => Weight::Frozen(tensor),
            })
        };
        linear.lora = Some(Lora {
            a: weight("A", [part.rank, width], &part.a)?,
            b: weight("B", [features, part.rank], &part.b)?,
            scale: part.scale as f32,
            dropout: config.lora_dropout as f32,
            stream: stream_of(module),
        });
        Ok(())
    };
    decoder.change_linears(&mut set)?;
    decoder.change_routers(&mut set)?;
    experts::load(decoder, &experts, trainable)?;
    Ok((config, experts))
}

/// The base model that an adapter names, `None` when it names none.
///
/// # Errors
/// What reading the configuration returns.
pub fn base_model_of(folder: &Path) -> Result<Option<String>> {
    Ok(AdapterConfig::open(&folder.join(CONFIG_FILE))?.base_model_name_or_path)
}

/// The adapter's tensors as PEFT names them and orders their elements, in a fixed order, for the class that
/// `AutoModelForCausalLM` makes of the base model's folder.
///
/// # Errors
/// A failure of the device.
pub fn tensors(decoder: &Decoder) -> Result<Vec<(String, Tensor)>> {
    let mut tensors: Vec<(String, Tensor)> = decoder
        .adaptable()
        .filter_map(|(module, linear)| linear.lora.as_ref().map(|lora| (module, lora)))
        .flat_map(|(module, lora)| {
            [(key_of(&module, "A"), lora.a.value()), (key_of(&module, "B"), lora.b.value())]
        })
        .collect();
    tensors.extend(experts::tensors(decoder)?);
    tensors.iter_mut().for_each(|(name, _)| *name = tensor_at(decoder.spec.place, name));
    Ok(tensors)
}

/// The name that PEFT gives to one half of a module's adapter.
pub fn key_of(module: &str, letter: &str) -> String {
    format!("base_model.model.{module}.lora_{letter}.weight")
}

fn dimensions(linear: &Linear) -> (usize, usize) {
    let shape = linear.weight.shape();
    (shape[0], shape[1])
}
