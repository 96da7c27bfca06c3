//! Rotary frequencies of every scaling that checkpoints use, from both layouts of `config.json`.
//!
//! Formulas as in `modeling_rope_utils.py` of transformers 5.23, which the parity fixtures come from.

use std::f64::consts::PI;

use pmetal_engine::device::RopePairing;
use pmetal_engine::ops::RopeTable;
use pmetal_engine::{Category, Device, Tensor};

use super::config::Config;
use crate::error::{Error, Result};

/// One rotary embedding of a model; layers refer to it by index.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// Elements of a head that are rotated; the rest passes through.
    pub rotated_width: usize,
    /// Which elements form pairs.
    pub pairing: RopePairing,
    /// How the frequencies are stretched.
    pub scaling: RopeScaling,
}

/// What a rotary embedding is where a configuration says nothing else.
#[derive(Debug, Clone, Copy)]
pub struct RopeKind {
    /// Elements of a head, of which a configuration may rotate a part.
    pub width: usize,
    /// Base of the wavelengths.
    pub theta: f64,
    /// Which elements form pairs.
    pub pairing: RopePairing,
    /// Share of a head that is rotated, where a configuration may say so; elsewhere all of it is, whatever it says.
    pub rotated_part: Option<f64>,
    /// The longest document, where a configuration does not say.
    pub context_length: usize,
    /// The context of the first training where a configuration does not say beside its rotation, if not the longest document.
    pub trained_length: Option<usize>,
}

impl RopeKind {
    /// Llama's.
    pub const LLAMA: Self = Self {
        width: 0,
        theta: 10_000.0,
        pairing: RopePairing::Halves,
        rotated_part: None,
        context_length: 2048,
        trained_length: None,
    };

    /// The rotation of whole heads, not stretched.
    pub fn plain(self) -> Rope {
        let Self { width, theta, pairing, .. } = self;
        Rope { theta, rotated_width: width, pairing, scaling: RopeScaling::None }
    }
}

/// How rotary frequencies are stretched beyond the length that a model was first trained on.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by a factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// The base grows with the document once it is longer than `trained_length`.
    Dynamic {
        /// Stretch per multiple of the trained length.
        factor: f64,
        /// Longest document that is left alone.
        trained_length: usize,
    },
    /// Peng et al., arXiv 2309.00071.
    Yarn(Yarn),
    /// Ding et al., arXiv 2402.13753: a factor for each frequency, one list for short documents, one for long.
    LongRope {
        /// Divisors up to `trained_length`.
        short: Vec<f64>,
        /// Divisors beyond it.
        long: Vec<f64>,
        /// Longest document that counts as short.
        trained_length: usize,
        /// Factor on cosines and sines.
        attention_factor: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a blend between.
    Llama3 {
        /// The divisor.
        factor: f64,
        /// Wavelengths above trained length / this are divided.
        low_frequency_factor: f64,
        /// Wavelengths below trained length / this are kept.
        high_frequency_factor: f64,
        /// Context length of the first training.
        trained_length: f64,
    },
    /// Divisors read from a checkpoint (GGUF's `rope_freqs.weight`).
    Divisors(Vec<f64>),
    /// No rotation but a factor that grows with the position: `scale * ln(1 + floor((position + 1) / floor)) + 1`
    /// (Llama 4).
    Temperature {
        /// Positions by which it grows.
        floor: f64,
        /// How much it grows.
        scale: f64,
    },
}

/// Constants of YaRN.
#[derive(Debug, Clone, PartialEq)]
pub struct Yarn {
    /// Divisor of the lowest frequencies.
    pub factor: f64,
    /// Rotations within the trained length above which a frequency is kept.
    pub beta_fast: f64,
    /// Rotations below which it is divided.
    pub beta_slow: f64,
    /// Context length of the first training.
    pub trained_length: f64,
    /// Whether the ramp's ends are rounded to whole frequencies.
    pub truncate: bool,
    /// Factor on cosines and sines.
    pub attention_factor: f64,
}

/// A document's place in a run of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Positions {
    /// Position of the first token.
    pub first: usize,
    /// Number of tokens.
    pub count: usize,
    /// Length by which dynamic scalings choose: the document's own, with what lies in the cache.
    pub document_length: usize,
}

impl Rope {
    /// Reads `rope_scaling` or `rope_parameters`, with `rope_theta` beside them.
    ///
    /// # Errors
    /// [`Error::Config`] for an unknown type or a field that its type needs.
    pub fn from_config(config: &Config, kind: RopeKind) -> Result<Self> {
        let empty = Config::new(serde_json::json!({}))?;
        Self::from_fields(config, parameters(config)?.as_ref().unwrap_or(&empty), kind)
    }

    /// [`Self::from_config`] of given fields.
    ///
    /// # Errors
    /// As [`Self::from_config`].
    pub fn from_fields(config: &Config, fields: &Config, kind: RopeKind) -> Result<Self> {
        let head_width = kind.width;
        let theta = fields.positive("rope_theta", config.positive("rope_theta", kind.theta)?)?;
        if theta <= 1.0 {
            return Err(Error::Config(format!("`rope_theta` is {theta}, it must be above one")));
        }
        const PART: &str = "partial_rotary_factor";
        [config, fields].iter().for_each(|fields| fields.pass_over(&[PART]));
        let partial = match kind.rotated_part {
            Some(part) => fields.positive(PART, config.positive(PART, part)?)?,
            None => 1.0,
        };
        let rotated_width = (head_width as f64 * partial) as usize;
        // An odd one has as many pairs as the next even one.
        if rotated_width == 0 || rotated_width.next_multiple_of(2) > head_width {
            return Err(Error::Config(format!(
                "rotary width {rotated_width} of head width {head_width} must be within the head"
            )));
        }
        let scaling = match config.numbers("rope_frequency_factors")? {
            Some(divisors) => RopeScaling::Divisors(divisors),
            None => {
                let scaling = scaling(config, fields, &kind, rotated_width)?;
                check_unread(fields)?;
                scaling
            }
        };
        let rope = Self { theta, rotated_width, pairing: kind.pairing, scaling };
        rope.check_lists()?;
        Ok(rope)
    }

    /// The factor that DeepSeek's scores get twice: `0.1 mscale_all_dim ln(factor) + 1`.
    ///
    /// # Errors
    /// [`Error::Config`] for fields that are no numbers.
    pub fn magnitude(config: &Config) -> Result<f64> {
        let Some(fields) = parameters(config)? else { return Ok(1.0) };
        let (all, factor) = (fields.number("mscale_all_dim", 0.0)?, fields.number("factor", 1.0)?);
        Ok(if factor <= 1.0 { 1.0 } else { 0.1 * all * factor.ln() + 1.0 })
    }

    /// Pairs of elements of a head that are rotated.
    fn pairs(&self) -> usize {
        self.rotated_width.div_ceil(2)
    }

    fn check_lists(&self) -> Result<()> {
        let half = self.pairs();
        let is_stretched_by_pair =
            matches!(self.scaling, RopeScaling::LongRope { .. } | RopeScaling::Yarn(_));
        if is_stretched_by_pair && !self.rotated_width.is_multiple_of(2) {
            let width = self.rotated_width;
            return Err(Error::Config(format!("rotary width {width} must be even for this rope type")));
        }
        let check = |name: &str, list: &[f64]| {
            if list.len() == half {
                return Ok(());
            }
            Err(Error::Config(format!("`{name}` has {} entries, the rotary width needs {half}", list.len())))
        };
        match &self.scaling {
            RopeScaling::LongRope { short, long, .. } => {
                check("short_factor", short)?;
                check("long_factor", long)
            }
            RopeScaling::Divisors(divisors) => check("rope_frequency_factors", divisors),
            _ => Ok(()),
        }
    }

    /// A number that changes when the frequencies do: a cache of rotated keys is valid only within one value.
    pub fn epoch(&self, document_length: usize) -> usize {
        match &self.scaling {
            RopeScaling::Dynamic { trained_length, .. } => document_length.max(*trained_length),
            RopeScaling::LongRope { trained_length, .. } => usize::from(document_length > *trained_length),
            _ => 0,
        }
    }

    /// Angles per position of each pair, and the factor on cosines and sines.
    fn frequencies(&self, document_length: usize) -> (Vec<f32>, f32) {
        let width = self.rotated_width as f32;
        let plain = |theta: f64| -> Vec<f32> {
            (0..self.pairs()).map(|i| 1.0 / (theta as f32).powf(2.0 * i as f32 / width)).collect()
        };
        let divided = |divisors: &[f64]| -> Vec<f32> {
            let theta = self.theta as f32;
            let each = divisors.iter().enumerate();
            each.map(|(i, divisor)| 1.0 / (*divisor as f32 * theta.powf(2.0 * i as f32 / width))).collect()
        };
        match &self.scaling {
            RopeScaling::None => (plain(self.theta), 1.0),
            RopeScaling::Linear { factor } => {
                (plain(self.theta).into_iter().map(|frequency| frequency / *factor as f32).collect(), 1.0)
            }
            RopeScaling::Dynamic { factor, trained_length } => {
                let trained = *trained_length as f64;
                let length = (document_length as f64).max(trained);
                let width = self.rotated_width as f64;
                let stretch = (factor * length / trained - (factor - 1.0)).powf(width / (width - 2.0));
                (plain(self.theta * stretch), 1.0)
            }
            RopeScaling::Yarn(yarn) => (self.yarn_frequencies(yarn), yarn.attention_factor as f32),
            RopeScaling::LongRope { short, long, trained_length, attention_factor } => {
                let list = if document_length > *trained_length { long } else { short };
                (divided(list), *attention_factor as f32)
            }
            RopeScaling::Llama3 { factor, low_frequency_factor, high_frequency_factor, trained_length } => {
                let blend = |frequency: f32| {
                    let wavelength = 2.0 * PI / f64::from(frequency);
                    if wavelength < trained_length / high_frequency_factor {
                        return frequency;
                    }
                    if wavelength > trained_length / low_frequency_factor {
                        return frequency / *factor as f32;
                    }
                    // Equal factors leave no band to blend in; only the band's own edge arrives here then.
                    let band = high_frequency_factor - low_frequency_factor;
                    let smooth = if band == 0.0 {
                        1.0
                    } else {
                        (trained_length / wavelength - low_frequency_factor) / band
                    };
                    let frequency = f64::from(frequency);
                    ((1.0 - smooth) * frequency / factor + smooth * frequency) as f32
                };
                (plain(self.theta).into_iter().map(blend).collect(), 1.0)
            }
            RopeScaling::Divisors(divisors) => (divided(divisors), 1.0),
            RopeScaling::Temperature { .. } => (vec![0.0; self.pairs()], 1.0),
        }
    }

    /// The factor of a position.
    fn temperature(&self, position: usize) -> f32 {
        match self.scaling {
            RopeScaling::Temperature { floor, scale } => {
                let steps = ((position as f32 + 1.0) / floor as f32).floor();
                steps.ln_1p() * scale as f32 + 1.0
            }
            _ => 1.0,
        }
    }

    fn yarn_frequencies(&self, yarn: &Yarn) -> Vec<f32> {
        let width = self.rotated_width as f64;
        let dimension = |rotations: f64| {
            width * (yarn.trained_length / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (dimension(yarn.beta_fast), dimension(yarn.beta_slow));
        if yarn.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(width - 1.0));
        if low == high {
            high += 0.001;
        }
        (0..self.pairs())
            .map(|i| {
                let kept = 1.0 / (self.theta as f32).powf(2.0 * i as f32 / width as f32);
                let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32;
                kept / yarn.factor as f32 * ramp + kept * (1.0 - ramp)
            })
            .collect()
    }

    /// Cosines and sines, f32 \[count, half\], of the first positions of a document of a length.
    ///
    /// # Errors
    /// Out of memory.
    pub fn angles(&self, device: &Device, count: usize, document_length: usize) -> Result<(Tensor, Tensor)> {
        let (frequencies, factor) = self.frequencies(document_length);
        let of = |function: fn(f32) -> f32| {
            let row = |position: usize| {
                let factor = factor * self.temperature(position);
                frequencies.iter().map(move |frequency| function(position as f32 * frequency) * factor)
            };
            let values: Vec<f32> = (0..count).flat_map(row).collect();
            Tensor::from_slice(device, Category::Workspace, &[count, frequencies.len()], &values)
        };
        Ok((of(f32::cos)?, of(f32::sin)?))
    }

    /// Cosines and sines for documents that follow each other in a run of tokens.
    ///
    /// # Errors
    /// Out of memory.
    pub fn table(&self, device: &Device, documents: &[Positions]) -> Result<RopeTable> {
        let half = self.pairs();
        let tokens: usize = documents.iter().map(|document| document.count).sum();
        let (mut cosines, mut sines) = (Vec::with_capacity(tokens * half), Vec::with_capacity(tokens * half));
        let mut held: Option<(usize, (Vec<f32>, f32))> = None;
        for document in documents {
            let epoch = self.epoch(document.document_length);
            if held.as_ref().is_none_or(|(of, _)| *of != epoch) {
                held = Some((epoch, self.frequencies(document.document_length)));
            }
            let Some((_, (frequencies, factor))) = &held else { continue };
            for position in document.first..document.first + document.count {
                let factor = factor * self.temperature(position);
                for frequency in frequencies {
                    let angle = position as f32 * frequency;
                    cosines.push(angle.cos() * factor);
                    sines.push(angle.sin() * factor);
                }
            }
        }
        Ok(RopeTable::new(device, tokens, half, &cosines, &sines, self.pairing)?)
    }
}

/// What a configuration says of its rotary embedding: where it holds both layouts, that of before transformers 5 counts.
fn parameters(config: &Config) -> Result<Option<Config>> {
    let (older, newer) = (config.object("rope_scaling")?, config.object("rope_parameters")?);
    Ok(older.filter(|fields| fields.names().next().is_some()).or(newer))
}

/// Refuses fields of a rotary embedding that nothing looked at. What differs by layer type is checked where it is read.
fn check_unread(fields: &Config) -> Result<()> {
    // Said of the training, of other rope types, or of positions with several axes, which are one axis for text.
    fields.pass_over(&[
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "finetuned",
        "high_freq_factor",
        "long_factor",
        "low_freq_factor",
        "mrope_section",
        "mrope_interleaved",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "short_factor",
        "truncate",
    ]);
    let by_type = fields.names().any(|name| name.ends_with("_attention"));
    if by_type { Ok(()) } else { fields.check_unread() }
}

fn scaling(config: &Config, fields: &Config, rope: &RopeKind, rotated_width: usize) -> Result<RopeScaling> {
    let kind = match fields.get("rope_type") {
        Some(_) => fields.text("rope_type", "default")?,
        None => fields.text("type", "default")?,
    };
    fields.get("type");
    let longest = config.optional_size("max_position_embeddings")?.unwrap_or(rope.context_length);
    let lacking = |name: &str| Error::Config(format!("rope type `{kind}` needs `{name}`"));
    let trained_length = || -> Result<usize> {
        let inner = fields.optional_size("original_max_position_embeddings")?;
        let outer = config.optional_size("original_max_position_embeddings")?;
        Ok(outer.or(rope.trained_length).or(inner).unwrap_or(longest))
    };
    let factor = |otherwise: Option<f64>| -> Result<f64> {
        match (fields.get("factor"), otherwise) {
            (None, Some(value)) => Ok(value),
            (None, None) => Err(lacking("factor")),
            (Some(_), _) => fields.positive("factor", 1.0),
        }
    };
    let needed = |name: &str| match fields.get(name) {
        Some(_) => fields.positive(name, 1.0),
        None => Err(lacking(name)),
    };
    let ratio = |trained: usize| longest as f64 / trained as f64;
    match kind.as_str() {
        // Multi-axis positions equal plain ones for text.
        "default" | "mrope" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: factor(None)? }),
        "dynamic" => {
            if rotated_width <= 2 {
                return Err(Error::Config("rope type `dynamic` needs a rotary width above 2".to_owned()));
            }
            Ok(RopeScaling::Dynamic { factor: factor(None)?, trained_length: longest })
        }
        "yarn" => {
            let trained = trained_length()?;
            yarn(fields, factor(Some(ratio(trained)))?, trained as f64).map(RopeScaling::Yarn)
        }
        "longrope" | "su" => {
            let trained_length = trained_length()?;
            let list = |name: &str| fields.numbers(name)?.ok_or_else(|| lacking(name));
            let factor = factor(Some(ratio(trained_length)))?;
            let suggested =
                if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (trained_length as f64).ln()).sqrt() };
            let attention_factor = fields.positive("attention_factor", suggested)?;
            Ok(RopeScaling::LongRope {
                short: list("short_factor")?,
                long: list("long_factor")?,
                trained_length,
                attention_factor,
            })
        }
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: factor(None)?,
            low_frequency_factor: needed("low_freq_factor")?,
            high_frequency_factor: needed("high_freq_factor")?,
            trained_length: trained_length()? as f64,
        }),
        other => Err(Error::Config(format!(
            "rope type `{other}` is not one of default, linear, dynamic, yarn, longrope, llama3"
        ))),
    }
}

fn yarn(fields: &Config, factor: f64, trained_length: f64) -> Result<Yarn> {
    let magnitude = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    let (numerator, denominator) = (fields.number("mscale", 0.0)?, fields.number("mscale_all_dim", 0.0)?);
    let inferred = if numerator != 0.0 && denominator != 0.0 {
        magnitude(numerator) / magnitude(denominator)
    } else {
        magnitude(1.0)
    };
    // transformers takes zero for absent.
    let rotations = |name: &str, default: f64| match fields.number(name, default)? {
        0.0 => Ok(default),
        _ => fields.positive(name, default),
    };
    Ok(Yarn {
        factor,
        beta_fast: rotations("beta_fast", 32.0)?,
        beta_slow: rotations("beta_slow", 1.0)?,
        trained_length,
        // A null counts as false.
        truncate: fields.flag("truncate", !fields.has("truncate"))?,
        attention_factor: fields.positive("attention_factor", inferred)?,
    })
}
