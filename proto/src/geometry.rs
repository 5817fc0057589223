//! The shape of a gpt-oss model, read from its `config.json`. Nothing about a model's size stands anywhere else.

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use thiserror::Error;

/// Values along the contracted axis that share one MXFP4 scale.
pub const MXFP4_BLOCK: usize = 32;

/// Most layers. With the other limits it keeps every product of sizes, the number of weights among them, below 2^63.
const MAX_LAYERS: usize = 1 << 10;

/// Why a `config.json` cannot be served.
#[derive(Debug, Error)]
pub enum GeometryError {
    /// The file is not the JSON that a gpt-oss configuration is.
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    /// A field has a value of another type.
    #[error("{field}: {source}")]
    Type {
        /// The field as spelled in the file.
        field: &'static str,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A field has a value that this software cannot run.
    #[error("{field} is {found}, expected {expected}")]
    Unsupported {
        /// The field as spelled in the file.
        field: &'static str,
        /// Its value.
        found: String,
        /// What would do.
        expected: String,
    },
}

/// What a layer's queries may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerKind {
    /// Every earlier position.
    FullAttention,
    /// The last `sliding_window` positions, the query's own included.
    SlidingAttention,
}

/// YaRN's settings, named as in `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeScaling {
    /// Must be `yarn`.
    pub rope_type: String,
    /// Context extension factor.
    pub factor: f64,
    /// Rotations over the original context above which a dimension is not interpolated.
    pub beta_fast: f64,
    /// Rotations over the original context below which a dimension is fully interpolated.
    pub beta_slow: f64,
    /// Context length of the original training.
    pub original_max_position_embeddings: f64,
    /// Whether the ramp's ends are rounded to whole dimensions (not in the release).
    pub truncate: bool,
}

/// Shape and constants of a model, checked for everything the arithmetic relies on. Field names are `config.json`'s.
#[derive(Clone, Debug, PartialEq)]
pub struct Geometry {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of one expert's inner layer.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Experts in each layer.
    pub num_local_experts: usize,
    /// Experts that see a token.
    pub num_experts_per_tok: usize,
    /// Rows of the embedding and of the unembedding.
    pub vocab_size: usize,
    /// Positions a query of a sliding layer sees.
    pub sliding_window: usize,
    /// Largest context.
    pub max_position_embeddings: usize,
    /// What each layer's queries see; its length is the number of layers.
    pub layer_types: Vec<LayerKind>,
    /// Added to the mean square before the root.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// YaRN, or plain rotary embeddings.
    pub rope_scaling: Option<RopeScaling>,
    /// Clamp inside SwiGLU.
    pub swiglu_limit: f32,
    /// Tokens that end a completion, from `config.json` (`generation_config.json` may name more).
    pub eos_token_ids: Vec<u32>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

/// The members of a `config.json`, taken one by one, so that what is wrong with one is said with its name.
struct Members(Map<String, Value>);

impl Members {
    fn parse(text: &str) -> Result<Self, GeometryError> {
        Ok(Self(serde_json::from_str(text)?))
    }

    /// A field that may be absent or null. `field` is its whole path; its last part is its name here.
    fn optional<T: DeserializeOwned>(&self, field: &'static str) -> Result<Option<T>, GeometryError> {
        let name = field.rsplit('.').next().unwrap_or(field);
        let value = self.0.get(name).filter(|value| !value.is_null());
        value.map(T::deserialize).transpose().map_err(|source| GeometryError::Type { field, source })
    }

    fn required<T: DeserializeOwned>(&self, field: &'static str) -> Result<T, GeometryError> {
        self.optional(field)?.ok_or_else(|| unsupported(field, "absent", "a value"))
    }
}

/// The value of the release, for configurations written before the field existed.
const DEFAULT_SWIGLU_LIMIT: f32 = 7.0;

fn unsupported(field: &'static str, found: impl ToString, expected: impl ToString) -> GeometryError {
    GeometryError::Unsupported { field, found: found.to_string(), expected: expected.to_string() }
}

impl Geometry {
    /// Reads and checks the text of a `config.json`.
    ///
    /// # Errors
    /// When the text is not a gpt-oss configuration or asks for something the arithmetic does not cover; the message
    /// names the field.
    pub fn from_config_json(text: &str) -> Result<Self, GeometryError> {
        let members = Members::parse(text)?;
        check_features(&members)?;
        let geometry = Self::take(&members)?;
        geometry.check_numbers()?;
        geometry.check_sizes()?;
        Ok(geometry)
    }

    /// Number of layers.
    pub fn num_hidden_layers(&self) -> usize {
        self.layer_types.len()
    }

    /// Query heads that share one key and value head.
    pub fn group_size(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// Layers of one kind.
    pub fn layers_of(&self, kind: LayerKind) -> usize {
        self.layer_types.iter().filter(|&&k| k == kind).count()
    }

    /// MXFP4 blocks along the experts' intermediate axis.
    pub fn intermediate_blocks(&self) -> usize {
        self.intermediate_size / MXFP4_BLOCK
    }

    /// Number of weights, every expert counted.
    pub fn parameters(&self) -> u64 {
        let (hidden, inter) = (self.hidden_size as u64, self.intermediate_size as u64);
        let (q, kv) =
            ((self.num_attention_heads * self.head_dim) as u64, (self.num_key_value_heads * self.head_dim) as u64);
        let attention = (q + 2 * kv) * (hidden + 1) + (q + 1) * hidden + self.num_attention_heads as u64;
        let expert = 2 * inter * (hidden + 1) + hidden * (inter + 1);
        let experts = self.num_local_experts as u64;
        let layer = attention + experts * expert + experts * (hidden + 1) + 2 * hidden;
        layer * self.num_hidden_layers() as u64 + 2 * self.vocab_size as u64 * hidden + hidden
    }

    fn check_sizes(&self) -> Result<(), GeometryError> {
        let sizes: [(&'static str, usize, usize); 11] = [
            ("hidden_size", self.hidden_size, 1 << 17),
            ("intermediate_size", self.intermediate_size, 1 << 17),
            ("num_attention_heads", self.num_attention_heads, 1 << 12),
            ("num_key_value_heads", self.num_key_value_heads, 1 << 12),
            ("head_dim", self.head_dim, 1 << 12),
            ("num_local_experts", self.num_local_experts, 1 << 12),
            ("num_experts_per_tok", self.num_experts_per_tok, self.num_local_experts),
            ("vocab_size", self.vocab_size, 1 << 24),
            ("sliding_window", self.sliding_window, 1 << 24),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 24),
            ("num_hidden_layers", self.num_hidden_layers(), MAX_LAYERS),
        ];
        for (field, found, most) in sizes {
            if found == 0 || found > most {
                return Err(unsupported(field, found, format!("1 to {most}")));
            }
        }
        for (field, found) in [("hidden_size", self.hidden_size), ("intermediate_size", self.intermediate_size)] {
            if !found.is_multiple_of(MXFP4_BLOCK) {
                return Err(unsupported(field, found, format!("a multiple of {MXFP4_BLOCK}, the MXFP4 block")));
            }
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(unsupported("head_dim", self.head_dim, "an even number (rotary embeddings turn pairs)"));
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let expected = format!("a divisor of num_attention_heads ({})", self.num_attention_heads);
            return Err(unsupported("num_key_value_heads", self.num_key_value_heads, expected));
        }
        Ok(())
    }

    fn take(config: &Members) -> Result<Self, GeometryError> {
        Ok(Self {
            hidden_size: config.required("hidden_size")?,
            intermediate_size: config.required("intermediate_size")?,
            num_attention_heads: config.required("num_attention_heads")?,
            num_key_value_heads: config.required("num_key_value_heads")?,
            head_dim: config.required("head_dim")?,
            num_local_experts: config.required("num_local_experts")?,
            num_experts_per_tok: take_experts_per_token(config)?,
            vocab_size: config.required("vocab_size")?,
            sliding_window: config.required("sliding_window")?,
            max_position_embeddings: config.required("max_position_embeddings")?,
            layer_types: take_layer_types(config)?,
            rms_norm_eps: config.required("rms_norm_eps")?,
            rope_theta: config.required("rope_theta")?,
            rope_scaling: take_rope_scaling(config)?,
            swiglu_limit: config.optional("swiglu_limit")?.unwrap_or(DEFAULT_SWIGLU_LIMIT),
            eos_token_ids: match config.optional("eos_token_id")? {
                None => Vec::new(),
                Some(OneOrMany::One(id)) => vec![id],
                Some(OneOrMany::Many(ids)) => ids,
            },
        })
    }

    /// What is divided by, what logarithms are taken of, and what would make every activation infinite or nothing.
    fn check_numbers(&self) -> Result<(), GeometryError> {
        let rope = self.rope_scaling.as_ref();
        let yarn = |number: fn(&RopeScaling) -> f64| rope.map_or(1.0, number);
        let numbers = [
            ("rms_norm_eps", f64::from(self.rms_norm_eps), 1.0),
            ("swiglu_limit", f64::from(self.swiglu_limit), 1e6),
            ("rope_theta", self.rope_theta, 1e12),
            ("rope_scaling.factor", yarn(|yarn| yarn.factor), 1e6),
            ("rope_scaling.beta_fast", yarn(|yarn| yarn.beta_fast), 1e6),
            ("rope_scaling.beta_slow", yarn(|yarn| yarn.beta_slow), 1e6),
            ("rope_scaling.original_max_position_embeddings", yarn(|yarn| yarn.original_max_position_embeddings), 1e9),
        ];
        if let Some((field, found, most)) = numbers.into_iter().find(|(_, n, most)| !(*n > 0.0 && n <= most)) {
            return Err(unsupported(field, found, format!("a positive number up to {most:e}")));
        }
        // The base of a logarithm.
        if self.rope_theta <= 1.0 {
            return Err(unsupported("rope_theta", self.rope_theta, "a number above 1"));
        }
        if let Some(yarn) = rope.filter(|yarn| yarn.beta_fast < yarn.beta_slow) {
            let expected = format!("at least beta_slow ({})", yarn.beta_slow);
            return Err(unsupported("rope_scaling.beta_fast", yarn.beta_fast, expected));
        }
        Ok(())
    }
}

/// Refuses what the arithmetic does not do.
fn check_features(config: &Members) -> Result<(), GeometryError> {
    let words = [
        ("model_type", config.required("model_type")?, "gpt_oss"),
        ("hidden_act", config.optional("hidden_act")?.unwrap_or_else(|| "silu".to_owned()), "silu"),
    ];
    if let Some((field, found, expected)) = words.into_iter().find(|(_, found, expected)| found != expected) {
        return Err(unsupported(field, found, expected));
    }
    if config.optional("tie_word_embeddings")?.unwrap_or(false) {
        return Err(unsupported("tie_word_embeddings", true, false));
    }
    let Some(quantization) = config.optional("quantization_config")? else {
        return Err(unsupported("quantization_config", "absent", "quant_method mxfp4"));
    };
    let method: String = Members(quantization).required("quantization_config.quant_method")?;
    if method != "mxfp4" {
        return Err(unsupported("quantization_config.quant_method", method, "mxfp4"));
    }
    Ok(())
}

/// The count stands under one of two names, or under both.
fn take_experts_per_token(config: &Members) -> Result<usize, GeometryError> {
    let (new, old): (Option<usize>, Option<usize>) =
        (config.optional("num_experts_per_tok")?, config.optional("experts_per_token")?);
    match (new, old) {
        (Some(new), Some(old)) if new != old => {
            Err(unsupported("experts_per_token", old, format!("the same as num_experts_per_tok ({new})")))
        }
        (Some(count), _) | (None, Some(count)) => Ok(count),
        (None, None) => Err(unsupported("num_experts_per_tok", "absent", "a number")),
    }
}

fn take_layer_types(config: &Members) -> Result<Vec<LayerKind>, GeometryError> {
    let layers: usize = config.required("num_hidden_layers")?;
    // The release alternates, starting with a sliding layer.
    let alternating = [LayerKind::SlidingAttention, LayerKind::FullAttention];
    let layer_types: Vec<LayerKind> = config
        .optional("layer_types")?
        .unwrap_or_else(|| (0..layers.min(MAX_LAYERS)).map(|i| alternating[i % 2]).collect());
    if layer_types.len() != layers {
        let expected = format!("num_hidden_layers ({layers}) entries");
        return Err(unsupported("layer_types", format!("{} entries", layer_types.len()), expected));
    }
    Ok(layer_types)
}

fn take_rope_scaling(config: &Members) -> Result<Option<RopeScaling>, GeometryError> {
    let Some(members) = config.optional("rope_scaling")? else { return Ok(None) };
    let yarn = Members(members);
    let rope_type: String = yarn.required("rope_scaling.rope_type")?;
    if rope_type != "yarn" {
        return Err(unsupported("rope_scaling.rope_type", rope_type, "yarn"));
    }
    Ok(Some(RopeScaling {
        rope_type,
        factor: yarn.required("rope_scaling.factor")?,
        beta_fast: yarn.required("rope_scaling.beta_fast")?,
        beta_slow: yarn.required("rope_scaling.beta_slow")?,
        original_max_position_embeddings: yarn.required("rope_scaling.original_max_position_embeddings")?,
        truncate: yarn.optional("rope_scaling.truncate")?.unwrap_or(true),
    }))
}
