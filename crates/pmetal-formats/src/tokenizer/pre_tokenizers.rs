//! How byte-level tokenizers of GGUF files split text, by the name in `tokenizer.ggml.pre`.

use serde_json::{Value as Json, json};

/// The steps before BPE.
pub(super) struct SplitRule {
    pub(super) normalizer: Json,
    pub(super) steps: Vec<Json>,
    /// Whether GPT-2's own splitting comes last.
    pub(super) byte_level_splits: bool,
    /// Whether a word that is a token is taken whole, whatever the merges say.
    pub(super) ignore_merges: bool,
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

/// The rule of a name, or `None` when the name is not known.
pub(super) fn pre_tokenizer(name: &str) -> Option<SplitRule> {
    let rule = |steps: Vec<Json>, byte_level_splits: bool| SplitRule {
        normalizer: Json::Null,
        steps,
        byte_level_splits,
        ignore_merges: false,
    };
    let digits_one_by_one = || json!({"type": "Digits", "individual_digits": true});
    Some(match name {
        "gpt-2" | "phi-2" | "jina-es" | "jina-de" | "gigachat" | "jina-v2-es" | "jina-v2-de" | "a.x-4.0"
        | "mellum" | "modern-bert" | "mpt" | "olmo" | "jais" => rule(Vec::new(), true),
        "starcoder" | "refact" | "command-r" | "smollm" | "codeshell" | "exaone" => {
            rule(vec![digits_one_by_one()], true)
        }
        "default" => {
            rule(vec![split(r"[\p{P}\$\+<=>\^~\|]+"), split(r"\p{N}+"), split("[0-9][0-9][0-9]")], true)
        }
        "falcon" => rule(vec![split(r"[\p{P}\$\+<=>\^~\|`]+"), split("[0-9][0-9][0-9]")], true),
        "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0" | "lfm2" => {
            SplitRule { ignore_merges: true, ..rule(vec![split(LLAMA3)], false) }
        }
        "dbrx" | "smaug-bpe" | "chatglm-bpe" | "glm4" => rule(vec![split(LLAMA3)], false),
        "qwen2" | "stablelm2" | "deepseek-r1-qwen" | "hunyuan" | "megrez" => {
            SplitRule { normalizer: json!({"type": "NFC"}), ..rule(vec![split(QWEN2)], false) }
        }
        "qwen35" => rule(vec![split(QWEN35)], false),
        "gpt-4o" | "llama4" => rule(vec![split(O200K)], false),
        "tekken" => SplitRule { ignore_merges: true, ..rule(vec![split(TEKKEN)], false) },
        "deepseek-coder" => rule(
            vec![
                split(r"[\r\n]"),
                split(r"\s?\p{L}+"),
                split(r"\s?\p{P}+"),
                split("[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+"),
                digits_one_by_one(),
            ],
            false,
        ),
        "deepseek-v3" | "hunyuan-dense" | "joyai-llm" => rule(
            vec![
                split(r"\p{N}{1,3}"),
                split("[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+"),
                split(DEEPSEEK3),
            ],
            false,
        ),
        _ => return None,
    })
}

fn split(pattern: &str) -> Json {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}
