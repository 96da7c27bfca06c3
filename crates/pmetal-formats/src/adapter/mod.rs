//! Adapters as PEFT stores them: `adapter_config.json` and the names of the tensors beside it.
//!
//! Every field of PEFT 0.21's `LoraConfig` has a policy, listed in the table of the submodule `fields`: it is
//! honoured, or it has no effect on the numbers of a trained adapter, or any value but the default is refused by name. A field
//! that PEFT 0.21 does not have is refused too, since nobody can tell what ignoring it would do.

mod fields;
mod matching;
mod write;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

use matching::Matcher;

/// The largest `adapter_config.json` that is read: 16 MiB.
pub const LARGEST_CONFIG_BYTES: u64 = 16 << 20;
/// The longest pattern that is compiled.
pub const LONGEST_PATTERN_BYTES: usize = 16 << 10;
/// The most entries that `rank_pattern` and `alpha_pattern` may have.
pub const MOST_PATTERNS: usize = 16_384;
/// The largest rank.
pub const LARGEST_RANK: usize = 1 << 16;

/// Names of modules, as `target_modules` and `exclude_modules` give them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModuleNames {
    /// Each entry is a module's whole name, or its end behind a dot.
    List(Vec<String>),
    /// A regular expression that matches a module's whole name.
    Pattern(String),
    /// Every linear layer but the output head.
    AllLinear,
}

impl fmt::Display for ModuleNames {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::List(names) => write!(formatter, "`{}`", names.join("`, `")),
            Self::Pattern(pattern) => write!(formatter, "matching `{pattern}`"),
            Self::AllLinear => formatter.write_str("`all-linear`"),
        }
    }
}

/// How A and B begin; without effect on an adapter that is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InitLoraWeights {
    /// A uniform (Kaiming with a = sqrt 5), B zero: `true`.
    #[default]
    Kaiming,
    /// A normal with deviation 1 / rank, B zero: `"gaussian"`.
    Gaussian,
    /// A as with `true`, B random too, for tests: `false`.
    Random,
}

/// What one module's adapter looks like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraShape {
    /// Rows of A, columns of B.
    pub rank: usize,
    /// The numerator of the scale.
    pub alpha: f64,
    /// What B A x is multiplied with: alpha / rank, or alpha / sqrt(rank) with `use_rslora`.
    pub scale: f64,
}

/// A checked `adapter_config.json`.
///
/// The fields may be changed; [`AdapterConfig::check`] tells whether PEFT and this program would take the result.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// The rank where no `rank_pattern` matches.
    pub r: usize,
    /// The alpha where no `alpha_pattern` matches.
    pub lora_alpha: f64,
    /// The share of the adapter's input that is dropped in training.
    pub lora_dropout: f64,
    /// Which modules have an adapter; an empty list beside `target_parameters` for none.
    pub target_modules: ModuleNames,
    /// Which parameters have an adapter that are no module's only matrix, such as the stacked experts of a layer: each
    /// entry is a parameter's whole name, or its end behind a dot.
    pub target_parameters: Vec<String>,
    /// Which of them have none after all; never [`ModuleNames::AllLinear`].
    pub exclude_modules: Option<ModuleNames>,
    /// Whether the scale is alpha / sqrt(rank).
    pub use_rslora: bool,
    /// Ranks by pattern, in the order in which they are tried.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas by pattern, in the order in which they are tried.
    pub alpha_pattern: Vec<(String, f64)>,
    /// The layers that have adapters; `None` for all. Only for targets that were found by the end of their name.
    pub layers_to_transform: Option<Vec<u64>>,
    /// What stands before the layer's number in a module's name; each a regular expression; empty for anything.
    pub layers_pattern: Vec<String>,
    /// How A and B begin.
    pub init_lora_weights: InitLoraWeights,
    /// The model that the adapter was trained on.
    pub base_model_name_or_path: Option<String>,
    /// The revision of that model.
    pub revision: Option<String>,
    /// `CAUSAL_LM` or nothing.
    pub task_type: Option<String>,
    /// Whether the adapter was saved after training.
    pub inference_mode: bool,
}

impl AdapterConfig {
    /// Adapters of one rank on every linear layer but the output head.
    pub fn all_linear(r: usize, lora_alpha: f64) -> Self {
        Self::new(r, lora_alpha, ModuleNames::AllLinear)
    }

    /// Adapters of one rank on the given modules.
    pub fn new(r: usize, lora_alpha: f64, target_modules: ModuleNames) -> Self {
        Self {
            r,
            lora_alpha,
            lora_dropout: 0.0,
            target_modules,
            target_parameters: Vec::new(),
            exclude_modules: None,
            use_rslora: false,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            init_lora_weights: InitLoraWeights::default(),
            base_model_name_or_path: None,
            revision: None,
            task_type: Some("CAUSAL_LM".to_owned()),
            inference_mode: false,
        }
    }

    /// Reads and checks a file.
    ///
    /// # Errors
    /// When the file cannot be read, or for the reasons of [`AdapterConfig::parse`].
    pub fn open(path: &Path) -> Result<Self> {
        use std::io::Read;
        let file = std::fs::File::open(path).map_err(Error::io("open", path))?;
        let mut bytes = Vec::new();
        file.take(LARGEST_CONFIG_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
        Self::parse(path, &bytes)
    }

    /// Checks the bytes of a file; `path` is named in errors.
    ///
    /// # Errors
    /// When the bytes are not a JSON object, a field has the wrong type or a value that is not honoured, a field is
    /// unknown, or a pattern does not compile.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        if bytes.len() as u64 > LARGEST_CONFIG_BYTES {
            let message =
                format!("an adapter configuration may have {LARGEST_CONFIG_BYTES} bytes, this one has more");
            return Err(Error::unsupported(path, message));
        }
        let config = fields::parse(path, bytes)?;
        config.check_at(path)?;
        Ok(config)
    }

    /// Whether the values go together.
    ///
    /// # Errors
    /// When a number is out of range, a pattern does not compile, or two fields contradict each other.
    pub fn check(&self) -> Result<()> {
        self.check_at(Path::new("adapter_config.json"))
    }

    fn check_at(&self, path: &Path) -> Result<()> {
        let refuse = |message: String| Err(Error::unsupported(path, message));
        let ranks = std::iter::once(("r".to_owned(), self.r))
            .chain(self.rank_pattern.iter().map(|(key, rank)| (format!("rank_pattern.{key}"), *rank)));
        for (name, rank) in ranks {
            if rank == 0 || rank > LARGEST_RANK {
                return refuse(format!("`{name}` is {rank}, a rank is between 1 and {LARGEST_RANK}"));
            }
        }
        let alphas = std::iter::once(("lora_alpha".to_owned(), self.lora_alpha))
            .chain(self.alpha_pattern.iter().map(|(key, alpha)| (format!("alpha_pattern.{key}"), *alpha)));
        for (name, alpha) in alphas {
            if !alpha.is_finite() {
                return refuse(format!("`{name}` is {alpha}, it must be a finite number"));
            }
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return refuse(format!(
                "`lora_dropout` is {}, it must be at least 0 and less than 1",
                self.lora_dropout
            ));
        }
        self.check_parameters().or_else(refuse)?;
        let by_list = matches!(self.target_modules, ModuleNames::List(_));
        if !by_list && (self.layers_to_transform.is_some() || !self.layers_pattern.is_empty()) {
            let message = "`layers_to_transform` and `layers_pattern` need `target_modules` to be a list";
            return refuse(message.to_owned());
        }
        if !self.layers_pattern.is_empty() && self.layers_to_transform.is_none() {
            return refuse("`layers_pattern` needs `layers_to_transform`".to_owned());
        }
        if matches!(self.exclude_modules, Some(ModuleNames::AllLinear)) {
            return refuse("`exclude_modules` cannot be `all-linear`".to_owned());
        }
        self.matcher_at(path).map(|_| ())
    }

    fn check_parameters(&self) -> std::result::Result<(), String> {
        if matches!(&self.target_modules, ModuleNames::List(names) if names.is_empty())
            && self.target_parameters.is_empty()
        {
            return Err("`target_modules` is an empty list and `target_parameters` names nothing".to_owned());
        }
        if self.target_parameters.len() > MOST_PATTERNS {
            let count = self.target_parameters.len();
            return Err(format!("`target_parameters` has {count} entries, the most is {MOST_PATTERNS}"));
        }
        if !self.target_parameters.is_empty() && self.lora_dropout != 0.0 {
            // The sum of a parameter and its adapter is what is multiplied with, so the adapter has no input of its own.
            return Err(format!(
                "`lora_dropout` is {}, which PEFT refuses beside `target_parameters`: it must be 0",
                self.lora_dropout
            ));
        }
        Ok(())
    }

    /// The adapter of one linear layer, `None` when it has none.
    ///
    /// `module` is the layer's name in the base model, such as `model.layers.0.self_attn.q_proj`.
    ///
    /// Compiles the patterns at every call; [`AdapterConfig::matcher`] compiles them once.
    ///
    /// # Errors
    /// When a pattern does not compile.
    pub fn target(&self, module: &str) -> Result<Option<LoraShape>> {
        Ok(self.matcher()?.target(module, true, false))
    }

    /// The rule that says which modules have an adapter, with its patterns compiled.
    ///
    /// # Errors
    /// When a pattern does not compile.
    pub fn matcher(&self) -> Result<TargetMatcher> {
        self.matcher_at(Path::new("adapter_config.json"))
    }

    fn matcher_at(&self, path: &Path) -> Result<TargetMatcher> {
        Matcher::new(self, path).map(|matcher| TargetMatcher { matcher, config: self.clone() })
    }

    /// The shape of an adapter of this configuration on a module that is known to be targeted.
    fn shape(&self, rank: usize, alpha: f64) -> LoraShape {
        let divisor = if self.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
        LoraShape { rank, alpha, scale: alpha / divisor }
    }

    /// The text of the file that PEFT 0.21 writes for this configuration, without a final newline.
    pub fn to_json(&self) -> String {
        write::to_json(self)
    }
}

/// Which modules have an adapter, and of which shape.
pub struct TargetMatcher {
    matcher: Matcher,
    config: AdapterConfig,
}

impl TargetMatcher {
    /// The adapter of one module, `None` when it has none.
    ///
    /// `all-linear` needs to know what the module is. A list or a pattern may also match what is no linear layer:
    /// the caller refuses it, as PEFT does.
    pub fn target(&self, module: &str, is_linear: bool, is_output_head: bool) -> Option<LoraShape> {
        if !self.matcher.matches(&self.config, module, is_linear, is_output_head) {
            return None;
        }
        Some(self.shape_of(module))
    }

    /// The adapter that `target_parameters` gives one parameter, `None` when it has none.
    ///
    /// `name` is the parameter's whole name in the base model, such as `model.layers.0.mlp.experts.gate_up_proj`.
    /// Patterns of ranks and alphas are held against it; `exclude_modules` and `layers_to_transform` do not count.
    /// PEFT wants two or three dimensions, and refuses parameters of a module that [`Self::target`] gives an adapter
    /// too, which is for the caller to see. [`parameter_tensor_name`] has the names of the tensors.
    pub fn parameter(&self, name: &str) -> Option<LoraShape> {
        matching::is_parameter_of(&self.config, name).then(|| self.shape_of(name))
    }

    fn shape_of(&self, name: &str) -> LoraShape {
        let (rank, alpha) = self.matcher.rank_and_alpha(&self.config, name);
        self.config.shape(rank, alpha)
    }
}

const PREFIX: &str = "base_model.model.";

/// One half of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LoraHalf {
    /// \[R, D\].
    A,
    /// \[N, R\].
    B,
}

/// PEFT's name of a module's tensor: `base_model.model.<module>.lora_A.weight`.
pub fn tensor_name(module: &str, half: LoraHalf) -> String {
    let letter = if half == LoraHalf::A { "A" } else { "B" };
    format!("{PREFIX}{module}.lora_{letter}.weight")
}

/// What PEFT puts between a module and its tensors once for each adapter of a parameter around it.
const WRAPPED: &str = ".base_layer";

/// PEFT's name of the tensor of a module's parameter that has an adapter by `target_parameters`.
///
/// PEFT wraps the module once for each such parameter, in the order in which the module declares them: the last one is
/// outermost, at depth 0, the one before it at depth 1, and a single one always at 0.
pub fn parameter_tensor_name(module_path: &str, depth_from_outermost: usize, half: LoraHalf) -> String {
    tensor_name(&format!("{module_path}{}", WRAPPED.repeat(depth_from_outermost)), half)
}

/// A module's own path and the depth of [`parameter_tensor_name`], of a module as [`parse_tensor_name`] and
/// [`modules_of`] give it; 0 for the module of an ordinary adapter too.
pub fn parameter_depth(module: &str) -> (&str, usize) {
    let mut path = module;
    while let Some(shorter) = path.strip_suffix(WRAPPED).filter(|shorter| !shorter.is_empty()) {
        path = shorter;
    }
    (path, (module.len() - path.len()) / WRAPPED.len())
}

/// The module and the half that a tensor's name stands for; `None` for a name that [`tensor_name`] does not make.
pub fn parse_tensor_name(name: &str) -> Option<(&str, LoraHalf)> {
    let rest = name.strip_prefix(PREFIX)?;
    let (module, half) = match rest.strip_suffix(".lora_A.weight") {
        Some(module) => (module, LoraHalf::A),
        None => (rest.strip_suffix(".lora_B.weight")?, LoraHalf::B),
    };
    if module.is_empty() { None } else { Some((module, half)) }
}

/// The modules of a file's tensors, each of which must have both halves.
///
/// # Errors
/// When a name is not that of a LoRA tensor, or a half is missing; the message names it.
pub fn modules_of<'a>(
    path: impl Into<PathBuf>,
    names: impl IntoIterator<Item = &'a str>,
) -> Result<Vec<&'a str>> {
    let path = path.into();
    let mut halves: BTreeMap<&str, (bool, bool)> = BTreeMap::new();
    for name in names {
        let Some((module, half)) = parse_tensor_name(name) else {
            return Err(Error::unsupported(path, format!("tensor `{name}` is not half of a LoRA adapter")));
        };
        let seen = halves.entry(module).or_default();
        if half == LoraHalf::A { seen.0 = true } else { seen.1 = true }
    }
    for (module, (a, b)) in &halves {
        if a != b {
            let missing = tensor_name(module, if *a { LoraHalf::B } else { LoraHalf::A });
            return Err(Error::malformed(
                path,
                "",
                format!("tensor `{missing}` is missing, its other half is there"),
            ));
        }
    }
    Ok(halves.into_keys().collect())
}
