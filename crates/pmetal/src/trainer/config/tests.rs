use std::path::PathBuf;

use pmetal_formats::fs::RealFs;

use super::*;
use crate::error::Error;

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

/// Reads one file after a model and a dataset were named.
fn read(name: &str, text: &str) -> Result<ResolvedConfig, String> {
    let files = Files::new();
    let mut layers = with_model();
    layers.file(&RealFs, &files.write(name, text)).map_err(|error| error.to_string())?;
    layers.resolve().map_err(|error| error.to_string())
}

fn with_model() -> ConfigLayers {
    let mut layers = ConfigLayers::new();
    layers.flag("model", "m");
    layers.flag("dataset", "d.jsonl");
    layers
}

fn refusal(text: &str) -> String {
    read("run.toml", text).expect_err(text)
}

#[test]
fn the_defaults_are_those_that_are_documented() {
    let resolved = with_model().resolve().unwrap();
    let config = resolved.config();
    assert_eq!((config.lora_r, config.lora_alpha, config.lora_dropout), (16, 32.0, 0.0));
    assert_eq!((config.learning_rate, config.warmup_ratio, config.min_lr_ratio), (2e-4, 0.03, 0.1));
    assert_eq!((config.max_grad_norm, config.epochs, config.eval_fraction, config.seed), (1.0, 1.0, 0.02, 0));
    assert_eq!((config.schedule, config.packing), (LearningRateSchedule::Cosine, true));
    assert_eq!((config.train_on, config.tuning), (TrainOn::Assistant, Tuning::Lora));
}

#[test]
fn a_flag_beats_set_which_beats_a_file_which_beats_the_default() {
    let files = Files::new();
    let mut layers = ConfigLayers::new();
    layers.flag("lora-r", "4");
    layers.set("lora.r=5");
    layers.set("seed = 7");
    let text = "model = 'm'\ndataset = 'd'\nlora_r = 6\nseed = 8\nepochs = 2\n";
    layers.file(&RealFs, &files.write("base.toml", text)).unwrap();
    layers.file(&RealFs, &files.write("more.json", r#"{"epochs": 3, "lr": null}"#)).unwrap();
    let resolved = layers.resolve().unwrap();
    let config = resolved.config();
    assert_eq!((config.lora_r, config.seed, config.epochs, config.lora_alpha), (4, 7, 3.0, 32.0));
    assert_eq!(*resolved.origin("lora_r"), Origin::Flag);
    assert_eq!(*resolved.origin("seed"), Origin::Set);
    assert_eq!(*resolved.origin("model"), Origin::File("base.toml".into(), Some(1)));
    assert_eq!(*resolved.origin("epochs"), Origin::File("more.json".into(), None));
    assert_eq!(*resolved.origin("learning_rate"), Origin::Default);
}

#[test]
fn a_file_must_not_contradict_itself_but_files_of_one_name_may_differ() {
    let (one, two) = (Files::new(), Files::new());
    let mut layers = with_model();
    layers.file(&RealFs, &one.write("a.toml", "seed = 1\nlr = 1e-3\n")).unwrap();
    layers.file(&RealFs, &two.write("a.toml", "seed = 2\n")).unwrap();
    let resolved = layers.resolve().unwrap();
    assert_eq!((resolved.config().seed, resolved.config().learning_rate), (2, 1e-3));
    let mut layers = with_model();
    layers.set("seed=1");
    layers.set("random_seed=1");
    let message = layers.resolve().unwrap_err().to_string();
    assert_eq!(message, "--set: `seed` and `random_seed` set the same thing, `seed`");
}

#[test]
fn spellings_of_other_programs_are_understood() {
    let text = "
        base_model = 'x'
        micro_batch_size = 3
        num_epochs = 2
        sequence_len = 512
        sample_packing = false
        lora_target = ['q_proj', 'v_proj']
        output_dir = 'there'
        save_steps = 50
        lr_scheduler_type = 'constant_with_warmup'
        lr = '2e-5'
        [lora]
        rank = 8
        alpha = 64
        use_rslora = true
        lora_dropout = 0.5
    ";
    let files = Files::new();
    let mut layers = ConfigLayers::new();
    layers.flag("dataset", "d");
    layers.file(&RealFs, &files.write("x.toml", text)).unwrap();
    let resolved = layers.resolve().unwrap();
    let config = resolved.config();
    assert_eq!((config.model.as_str(), config.batch_size, config.epochs), ("x", 3, 2.0));
    assert_eq!((config.max_seq_len, config.packing, config.save_every), (512, false, 50));
    assert_eq!((config.lora_r, config.lora_alpha, config.learning_rate), (8, 64.0, 2e-5));
    assert_eq!((config.lora_rslora, config.lora_dropout), (true, 0.5));
    assert_eq!(config.lora_target_modules, ["q_proj", "v_proj"]);
    assert_eq!((config.schedule, config.output.as_str()), (LearningRateSchedule::Constant, "there"));
}

#[test]
fn all_problems_are_listed_with_their_places() {
    let text =
        "laerning_rate = 1\nlora_r = 0\nepochs = 'many'\npacking = 1\n\n[lora]\nalpha = nan\n[x.y]\nz = 1\n";
    let files = Files::new();
    let mut layers = ConfigLayers::new();
    layers.file(&RealFs, &files.write("a.toml", text)).unwrap();
    layers.set("seed");
    layers.flag("threads", "-1");
    let Err(Error::Usage(message)) = layers.resolve() else { panic!() };
    let expected = "the configuration has 10 problems:
  a.toml line 1: unknown key `laerning_rate`; did you mean `learning_rate`?
  a.toml line 9: unknown key `x.y.z`
  --set: `seed` is not of the form key=value
  a.toml line 3: `epochs` needs a number, found many
  a.toml line 4: `packing` needs true or false, found 1
  flag: `threads` needs a whole number, found -1
  `model` is not set: use --model or the key `model` of a file
  `dataset` is not set: use --dataset or the key `dataset` of a file
  a.toml line 2: `lora_r` must be from 1 to 16384, found 0
  a.toml line 7: `lora_alpha` must be above 0 and at most 1e6, found NaN";
    assert_eq!(message, expected);
}

#[test]
fn one_problem_is_one_sentence() {
    let cases = [
        ("lora_rr = 1", "run.toml line 1: unknown key `lora_rr`; did you mean `lora_r`?"),
        ("use_dora = true", "run.toml line 1: unknown key `use_dora`"),
        ("\nseed = 2.5", "run.toml line 2: `seed` needs a whole number, found 2.5"),
        ("seed = -1", "run.toml line 1: `seed` needs a whole number, found -1"),
        (
            "seed = 99999999999999999999",
            "run.toml line 1: `seed` has the number 99999999999999999999, which does not fit 64 bits",
        ),
        ("method = 'dpo'", "run.toml line 1: `method` needs sft, found \"dpo\""),
        (
            "base_precision = 'int4'",
            "run.toml line 1: `base_precision` needs one of auto, fp8, found \"int4\"",
        ),
        ("dtype = 'f8'", "run.toml line 1: `dtype` needs one of auto, f32, bf16, found \"f8\""),
        ("device = 3", "run.toml line 1: `device` needs one of auto, cpu, cuda, metal, found 3"),
        ("r = 1\nlora_r = 1", "run.toml line 2: `r` and `lora_r` set the same thing, `lora_r`"),
        ("seed = 2026-01-01", "run.toml line 1: `seed` has the date 2026-01-01, and no setting is a date"),
        (
            "learning_rate = inf",
            "run.toml line 1: `learning_rate` must be above 0 and at most 1000, found inf",
        ),
        (
            "lora_target_modules = []",
            "run.toml line 1: `lora_target_modules` must name at least one module, found []",
        ),
        (
            "lora_target_modules = ['a', 1]",
            "run.toml line 1: `lora_target_modules` needs a list of texts, found [\"a\", 1]",
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(refusal(text), expected);
    }
    assert!(refusal("seed = = 1").starts_with("run.toml line 1: "));
    assert!(refusal("seed = 1\nseed = 2").starts_with("run.toml line 2: duplicate key"));
}

#[test]
fn a_setting_without_effect_is_a_note() {
    let cases = [
        (
            "tuning = 'full'\nlora_r = 8",
            "run.toml line 2: `lora_r` has no effect because `tuning` is \"full\"",
        ),
        (
            "sample_every = 5",
            "run.toml line 1: `sample_every` has no effect because `sample_prompt` is empty",
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(read("run.toml", text).unwrap().notes(), [expected]);
    }
}

#[test]
fn a_change_of_what_has_no_effect_does_not_stop_a_resumed_run() {
    let old = read("run.toml", "warmup_steps = 2\nwarmup_ratio = 0.5").unwrap();
    let new = read("run.toml", "warmup_steps = 2").unwrap();
    assert_eq!(old.config().config_hash(), new.config().config_hash());
    assert!(old.config().diff_for_resume(new.config()).refused.is_empty());
    // Where it has an effect in one of the two, it counts.
    let free = read("run.toml", "warmup_ratio = 0.5").unwrap();
    assert!(!old.config().diff_for_resume(free.config()).refused.is_empty());
}

#[test]
fn more_than_twenty_problems_are_counted() {
    let text: String = (0..25).map(|index| format!("nonsense_key_{index} = 1\n")).collect();
    let message = refusal(&text);
    assert!(message.starts_with("the configuration has 25 problems:\n"));
    assert_eq!(message.lines().count(), 22);
    assert!(message.ends_with("\n  and 5 more"));
}

#[test]
fn a_stronger_origin_may_make_a_weaker_setting_meaningless() {
    let files = Files::new();
    let mut layers = with_model();
    layers.file(&RealFs, &files.write("a.toml", "epochs = 3\nlora_r = 8\n")).unwrap();
    layers.flag("max_steps", "5");
    layers.flag("tuning", "full");
    let resolved = layers.resolve().unwrap();
    let text = resolved.to_run_toml();
    assert!(!text.contains("epochs") && !text.contains("lora_"), "{text}");
}

#[test]
fn other_kinds_of_files_are_refused_by_name() {
    assert!(
        read("a.yaml", "lora_r: 8")
            .unwrap_err()
            .ends_with("YAML configurations are not read, write the same keys as TOML or JSON")
    );
    assert!(read("a.txt", "").unwrap_err().ends_with("ends in `.toml` or `.json`"));
    assert_eq!(read("a.json", "[1]").unwrap_err(), "a.json: the document is not an object");
    assert!(read("a.json", "{\n\"seed\": }").unwrap_err().starts_with("a.json line 2: "));
    let large = format!("# {}\n", "x".repeat(1 << 20));
    assert!(read("a.toml", &large).unwrap_err().starts_with("cannot read"));
}

#[test]
fn json_and_toml_say_the_same() {
    let json = r#"{"lora": {"r": 8, "target_modules": "q_proj"}, "learning_rate": 1e-5, "packing": false}"#;
    let toml = "learning_rate = 1e-5\npacking = false\nlora.r = 8\nlora.target_modules = 'q_proj'\n";
    assert_eq!(read("a.json", json).unwrap().config(), read("a.toml", toml).unwrap().config());
    assert!(
        read("a.json", r#"{"seed": 18446744073709551615}"#).unwrap_err().contains("does not fit 64 bits")
    );
}

/// A value other than the default, within its range and without making another setting meaningless.
fn other_value(field: &Field) -> String {
    match TrainConfig::default().value(field.name).unwrap() {
        Value::Boolean(value) => (!value).to_string(),
        Value::Integer(value) => (value + 3).to_string(),
        Value::Float(value) => (value / 2.0 + 0.001).to_string(),
        Value::List(_) => "a \"quoted\" one, back\\slash".to_owned(),
        Value::Text(_) => match field.kind().strip_prefix("one of ") {
            Some(choices) => {
                let choices = choices.split(" (").next().unwrap();
                let default = format!("\"{}\"", choices.rsplit(", ").next().unwrap());
                let count = usize::from(default == field.default_text());
                choices.rsplit(", ").nth(count).unwrap().to_owned()
            }
            None if field.name == "method" => "sft".to_owned(),
            None => "caf\u{e9} \"q\" \\ # \n\t'".to_owned(),
        },
    }
}

#[test]
fn every_setting_round_trips_through_run_toml() {
    let names_of_causes = ["tuning", "warmup_steps", "max_steps", "eval_dataset"];
    for chosen in [&[][..], &names_of_causes[..]] {
        let mut layers = ConfigLayers::new();
        let skipped = with_all(&mut layers, chosen);
        let mut resolved = layers.resolve().unwrap();
        resolved.set_automatic("max_seq_len", &777).unwrap();
        let text = resolved.to_run_toml();
        assert!(text.contains("max_seq_len = 777 # automatic\n"), "{text}");
        assert!(text.contains("seed = 3 # flag\n"), "{text}");
        let files = Files::new();
        let mut again = ConfigLayers::new();
        again.file(&RealFs, &files.write("run.toml", &text)).unwrap();
        let again = again.resolve().unwrap();
        for field in FIELDS {
            if !skipped.contains(&field.name) {
                assert_eq!(
                    again.config().value(field.name),
                    resolved.config().value(field.name),
                    "{}",
                    field.name
                );
            }
        }
        assert_eq!(again.to_run_toml().lines().count(), text.lines().count());
        assert_eq!(again.config().config_hash(), resolved.config().config_hash());
    }
}

/// Sets every setting to another value by its flag, `causes` only on demand; returns those left alone.
fn with_all(layers: &mut ConfigLayers, causes: &[&str]) -> Vec<&'static str> {
    let mut skipped = Vec::new();
    for field in FIELDS {
        let is_cause = ["tuning", "warmup_steps", "max_steps", "eval_dataset"].contains(&field.name);
        let is_shadowed =
            field.group == Group::Lora || ["warmup_ratio", "epochs", "eval_fraction"].contains(&field.name);
        if (is_cause && !causes.contains(&field.name)) || (is_shadowed && !causes.is_empty()) {
            skipped.push(field.name);
        } else {
            layers.flag(field.name, &other_value(field));
        }
    }
    skipped
}

#[test]
fn every_setting_changes_the_configuration_and_only_numbers_change_the_hash() {
    let default = TrainConfig::default();
    for field in FIELDS.iter().filter(|field| field.name != "method") {
        let mut changed = default.clone();
        changed.set(field.name, &Said::Text(other_value(field))).unwrap();
        assert_ne!(changed, default, "{}", field.name);
        let is_same = changed.config_hash() == default.config_hash();
        assert_eq!(is_same, field.effect != Effect::Numbers, "{}", field.name);
        let diff = default.diff_for_resume(&changed);
        assert_eq!(diff.refused.is_empty(), is_same, "{}", field.name);
        assert_eq!(diff.allowed.len() + diff.refused.len(), 1, "{}", field.name);
    }
}

#[test]
fn a_resume_diff_shows_old_and_new_values() {
    let old = TrainConfig::default();
    let new = TrainConfig { learning_rate: 1e-4, save_every: 5, ..old.clone() };
    let expected = "- learning_rate = 0.0002\n+ learning_rate = 0.0001 # changes the numbers\n\
                    - save_every = 0\n+ save_every = 5 # allowed\n";
    assert_eq!(old.diff_for_resume(&new).to_string(), expected);
    assert_eq!(old.diff_for_resume(&old), ResumeDiff::default());
}

#[test]
fn levels_of_checkpointing_have_names_and_the_booleans_of_earlier_versions() {
    let level = |text: &str| read("a.toml", text).map(|resolved| resolved.config().gradient_checkpointing);
    let levels = [Recompute::None, Recompute::Cheap, Recompute::Full];
    for (text, expected) in ["'none'", "'cheap'", "'full'"].into_iter().zip(levels) {
        assert_eq!(level(&format!("gradient_checkpointing = {text}")).unwrap(), expected);
    }
    for (text, expected) in [("true", Recompute::Full), ("false", Recompute::None)] {
        assert_eq!(level(&format!("use_gradient_checkpointing = {text}")).unwrap(), expected);
        assert_eq!(Recompute::from_text(text), Ok(expected));
    }
    assert_eq!(level("").unwrap(), Recompute::Cheap);
    assert!(level("gradient_checkpointing = 1").unwrap_err().contains("needs one of none, cheap, full"));
}

#[test]
fn lists_are_read_from_flags() {
    for (text, expected) in
        [("a, b,c", &["a", "b", "c"][..]), ("['a,b', \"c\"]", &["a,b", "c"]), ("a", &["a"])]
    {
        assert_eq!(Vec::<String>::from_text(text).unwrap(), expected);
    }
    assert!(Vec::<String>::from_text("[1").is_err());
    assert!(Vec::<String>::from_text("[1]").is_err());
}

#[test]
fn no_bytes_of_a_file_make_the_reader_panic() {
    let text = with_model().resolve().unwrap().to_run_toml();
    let bytes = text.as_bytes();
    for index in (0..bytes.len()).step_by(7) {
        let mut changed = bytes.to_vec();
        changed[index] = b"=\"'[]{}\n\\\xff"[index % 10];
        read_bytes(&changed).ok();
        read_bytes(&bytes[..index]).ok();
    }
    assert!(read_bytes(&b"[a.".repeat(5000)).is_err());
    assert!(read_bytes(&[b"x = ".as_slice(), &b"[".repeat(100_000)].concat()).is_err());
}

fn read_bytes(bytes: &[u8]) -> crate::error::Result<ResolvedConfig> {
    let files = Files::new();
    let path = files.0.path().join("x.toml");
    std::fs::write(&path, bytes).unwrap();
    let mut layers = ConfigLayers::new();
    layers.file(&RealFs, &path)?;
    layers.resolve()
}

#[test]
fn the_documentation_of_settings_is_that_of_the_table() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/settings.md");
    let expected = settings_markdown();
    if std::env::var_os("PMETAL_WRITE_DOCS").is_some() {
        std::fs::write(path, &expected).unwrap();
    }
    let found = std::fs::read_to_string(path).unwrap().replace("\r\n", "\n");
    assert_eq!(found, expected, "write docs/settings.md anew by running this test with PMETAL_WRITE_DOCS=1");
}
