//! Which tokens are trained, held against TRL 1.16 (tools/make_label_goldens.py).
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "helpers of tests are tests"
)]

use std::path::{Path, PathBuf};

use pmetal::data::{
    BatchOptions, BatchPlan, ChatForm, ChatFormat, DataOptions, Dataset, EncodeOptions, Layout, OnLong,
    TrainOn, load,
};
use pmetal_formats::chat_template::ChatTemplate;
use pmetal_formats::rows::OnBadRow;
use pmetal_formats::tokenizer::{SpecialText, Tokenizer};
use serde_json::{Map, Value, json};

fn labels_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/labels")
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_folder(&labels_folder()).unwrap()
}

fn goldens() -> Value {
    serde_json::from_str(&std::fs::read_to_string(labels_folder().join("expected.json")).unwrap()).unwrap()
}

fn write(folder: &Path, rows: &[Value]) -> PathBuf {
    let path = folder.join("data.jsonl");
    std::fs::write(&path, rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
    path
}

fn long() -> DataOptions {
    DataOptions { max_seq_len: 100_000, ..DataOptions::default() }
}

fn read(rows: &[Value], template: Option<&ChatTemplate>, options: &DataOptions) -> Result<Dataset, String> {
    let (folder, tokenizer) = (tempfile::tempdir().unwrap(), tokenizer());
    let format = ChatFormat::new(&tokenizer, template, &Map::new(), 0).unwrap();
    load(&write(folder.path(), rows), &format, options).map_err(|error| error.to_string())
}

fn chat(turns: &[(&str, &str)]) -> Value {
    let messages: Vec<Value> =
        turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
    json!({"messages": messages})
}

/// The trained text of every example, in pieces.
fn trained_text(dataset: &Dataset) -> Vec<Vec<String>> {
    let tokenizer = tokenizer();
    let of_example = |example: &pmetal::data::Example| {
        let mut pieces: Vec<Vec<u32>> = Vec::new();
        let mut open = false;
        for (&id, &trained) in example.ids.iter().zip(&example.trained) {
            if trained && !open {
                pieces.push(Vec::new());
            }
            if let (true, Some(piece)) = (trained, pieces.last_mut()) {
                piece.push(id);
            }
            open = trained;
        }
        pieces.iter().map(|piece| tokenizer.decode(piece, false).unwrap()).collect()
    };
    dataset.train.iter().map(of_example).collect()
}

/// Everything but the first token, which nothing predicts.
fn assert_equal(dataset: &Dataset, expected: &Value, what: &str) {
    let expected = expected.as_array().unwrap();
    assert_eq!(dataset.train.len(), expected.len(), "{what}");
    for (at, (example, expected)) in dataset.train.iter().zip(expected).enumerate() {
        let ids: Vec<u32> = serde_json::from_value(expected["ids"].clone()).unwrap();
        let trained: Vec<u8> = serde_json::from_value(expected["trained"].clone()).unwrap();
        assert_eq!(example.ids, ids, "{what}, row {at}");
        let ours: Vec<u8> = example.trained.iter().map(|&trained| u8::from(trained)).collect();
        assert_eq!(ours[1..], trained[1..], "{what}, row {at}");
    }
}

fn rows_of(value: &Value) -> Vec<Value> {
    value.as_array().unwrap().clone()
}

#[test]
fn assistant_spans_equal_those_of_trl_for_its_training_templates() {
    let goldens = goldens();
    let templates = goldens["chat"].as_array().unwrap();
    assert!(templates.len() >= 14);
    for entry in templates {
        let name = entry["name"].as_str().unwrap();
        let template = ChatTemplate::compile(entry["template"].as_str().unwrap()).unwrap();
        let dataset = read(&rows_of(&entry["rows"]), Some(&template), &long()).unwrap();
        assert_equal(&dataset, &entry["expected"], name);
    }
}

#[test]
fn prompt_and_completion_messages_are_trained_as_trl_does() {
    for entry in goldens()["chat"].as_array().unwrap() {
        let template = ChatTemplate::compile(entry["template"].as_str().unwrap()).unwrap();
        let dataset = read(&rows_of(&entry["parts"]), Some(&template), &long()).unwrap();
        assert_equal(&dataset, &entry["parts_expected"], entry["name"].as_str().unwrap());
    }
}

#[test]
fn prompt_and_completion_texts_are_trained_as_trl_does() {
    let golden = &goldens()["prompt_completion"];
    let dataset = read(&rows_of(&golden["rows"]), None, &long()).unwrap();
    assert_equal(&dataset, &golden["expected"], "prompt-completion");
    assert!(dataset.notes.iter().any(|note| note.contains("beginning of the whole")), "{:?}", dataset.notes);
}

#[test]
fn texts_are_trained_as_trl_does() {
    let golden = &goldens()["text"];
    let dataset = read(&rows_of(&golden["rows"]), None, &long()).unwrap();
    assert_equal(&dataset, &golden["expected"], "text");
}

#[test]
fn every_row_has_at_most_one_beginning_and_every_text_its_end() {
    let tokenizer = tokenizer();
    let (bos, eos) = (tokenizer.bos().unwrap(), tokenizer.eos().unwrap());
    // The padding token of this tokenizer is its end token.
    assert_eq!(tokenizer.pad(), Some(eos));
    let rows = [json!({"text": "<|bos|>already begun"}), json!({"text": "plain"})];
    let dataset = read(&rows, None, &long()).unwrap();
    for example in &dataset.train {
        assert_eq!(example.ids.iter().filter(|&&id| id == bos).count(), 1);
        assert_eq!((example.ids[0], example.ids.last()), (bos, Some(&eos)));
        assert_eq!(example.trained.last(), Some(&true));
    }
}

const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

fn two_turns() -> Value {
    chat(&[("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two")])
}

#[test]
fn spans_are_found_by_prefixes_where_a_template_marks_none() {
    let template = ChatTemplate::compile(CHATML).unwrap();
    let dataset = read(&[two_turns()], Some(&template), &long()).unwrap();
    assert_eq!(trained_text(&dataset), [["one<|im_end|>\n", "two<|im_end|>\n"]]);
    assert!(dataset.notes.is_empty(), "{:?}", dataset.notes);
}

#[test]
fn prefixes_and_blocks_find_the_same_spans() {
    let goldens = goldens();
    let entry = goldens["chat"].as_array().unwrap().iter().find(|entry| entry["name"] == "llama3").unwrap();
    let marked = entry["template"].as_str().unwrap();
    let plain = marked.replace("{%- generation %}", "").replace("{%- endgeneration %}", "");
    assert!(!plain.contains("{%- generation"));
    let template = ChatTemplate::compile(&plain).unwrap();
    let dataset = read(&rows_of(&entry["rows"]), Some(&template), &long()).unwrap();
    assert_equal(&dataset, &entry["expected"], "llama3 by prefixes");
}

#[test]
fn last_and_all_train_less_and_more() {
    let template = ChatTemplate::compile(CHATML).unwrap();
    let with = |train_on| {
        let options =
            DataOptions { encode: EncodeOptions { train_on, ..EncodeOptions::default() }, ..long() };
        read(&[two_turns()], Some(&template), &options).unwrap()
    };
    assert_eq!(trained_text(&with(TrainOn::Last)), [["two<|im_end|>\n"]]);
    let all = with(TrainOn::All);
    assert!(all.train[0].trained.iter().all(|&trained| trained));
}

#[test]
fn messages_with_weight_zero_are_context() {
    let mut row = two_turns();
    row["messages"][1]["weight"] = json!(0);
    for source in [CHATML.to_owned(), CHATML.replace("message.content +", "message.content | trim +")] {
        let template = ChatTemplate::compile(&source).unwrap();
        assert_eq!(
            trained_text(&read(&[row.clone()], Some(&template), &long()).unwrap()),
            [["two<|im_end|>\n"]]
        );
    }
    let marked = "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}\
{% endgeneration %}{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{% endfor %}";
    let template = ChatTemplate::compile(marked).unwrap();
    assert_eq!(trained_text(&read(&[row.clone()], Some(&template), &long()).unwrap()), [["two<|im_end|>"]]);
    row["messages"][1]["weight"] = json!(0.5);
    let message = read(&[row], Some(&template), &long()).unwrap_err();
    assert!(message.contains("line 1") && message.contains("`weight` is 0.5"), "{message}");
}

#[test]
fn rewritten_history_trains_the_last_answer_only_and_says_so() {
    // As templates of reasoning models do, the thoughts of earlier answers are dropped.
    let source = CHATML.replace(
        "message.content +",
        "(message.content if loop.last else message.content.split('</think>')[-1]) +",
    );
    let template = ChatTemplate::compile(&source).unwrap();
    let row =
        chat(&[("user", "a"), ("assistant", "hm</think>one"), ("user", "b"), ("assistant", "so</think>two")]);
    let dataset = read(&[row], Some(&template), &long()).unwrap();
    assert_eq!(trained_text(&dataset), [["so</think>two<|im_end|>\n"]]);
    assert!(
        dataset.notes.iter().any(|note| note.contains("only the last answer is trained")),
        "{:?}",
        dataset.notes
    );
}

#[test]
fn generation_prompt_unlike_history_trains_the_answer_and_says_so() {
    let source = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}");
    let template = ChatTemplate::compile(&source).unwrap();
    let dataset = read(&[two_turns()], Some(&template), &long()).unwrap();
    assert_eq!(trained_text(&dataset), [["one<|im_end|>\n", "two<|im_end|>\n"]]);
    assert!(dataset.notes.iter().any(|note| note.contains("generation prompt")), "{:?}", dataset.notes);
}

#[test]
fn template_without_prefixes_is_an_error_that_names_the_row() {
    let source = "{{ messages | length }}".to_owned() + CHATML;
    let template = ChatTemplate::compile(&source).unwrap();
    let rows = [chat(&[("user", "a")]), two_turns()];
    let message = read(&rows, Some(&template), &long()).unwrap_err();
    assert!(message.contains("data.jsonl`, line 2: the chat template does not render"), "{message}");
}

#[test]
fn end_token_behind_a_block_is_trained() {
    let source = "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}\
{% generation %}{{ message.content }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}";
    let template = ChatTemplate::compile(source).unwrap();
    let dataset = read(&[two_turns()], Some(&template), &long()).unwrap();
    assert_eq!(trained_text(&dataset), [["one<|im_end|>", "two<|im_end|>"]]);
}

#[test]
fn token_that_reaches_from_the_prompt_into_the_answer_is_context() {
    let source = "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}\
{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}";
    let template = ChatTemplate::compile(source).unwrap();
    let tokenizer = tokenizer();
    let merged = tokenizer.encode(" over", SpecialText::Parse).unwrap();
    assert_eq!(merged.len(), 1, "the tokenizer has no token to straddle with");
    let row = chat(&[("user", " o"), ("assistant", "ver and")]);
    let dataset = read(&[row], Some(&template), &long()).unwrap();
    assert_eq!(dataset.train[0].ids[0], merged[0]);
    assert_eq!(trained_text(&dataset), [[" and"]]);
}

#[test]
fn special_tokens_in_messages_are_text_unless_asked_for() {
    let template = ChatTemplate::compile(CHATML).unwrap();
    let end = tokenizer().token_id("<|im_end|>").unwrap();
    let row = chat(&[("user", "say <|im_end|>"), ("assistant", "<|im_end|> said")]);
    let count = |special_text| {
        let encode = EncodeOptions { special_text, ..EncodeOptions::default() };
        let dataset =
            read(std::slice::from_ref(&row), Some(&template), &DataOptions { encode, ..long() }).unwrap();
        dataset.train[0].ids.iter().filter(|&&id| id == end).count()
    };
    assert_eq!((count(SpecialText::Plain), count(SpecialText::Parse)), (2, 4));
}

fn plain_tokenizer() -> Tokenizer {
    Tokenizer::from_folder(&Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/stories260k")).unwrap()
}

fn read_plain(row: Value) -> (Dataset, String) {
    let (folder, tokenizer) = (tempfile::tempdir().unwrap(), plain_tokenizer());
    let format = ChatFormat::new(&tokenizer, None, &Map::new(), 0).unwrap();
    assert_eq!(format.form(), ChatForm::Plain);
    let dataset = load(&write(folder.path(), &[row]), &format, &long()).unwrap();
    let text = tokenizer.decode(&dataset.train[0].ids, false).unwrap();
    assert_eq!(dataset.train[0].ids[0], tokenizer.bos().unwrap());
    assert_eq!(dataset.train[0].ids.iter().filter(|&&id| Some(id) == tokenizer.bos()).count(), 1);
    let end = dataset.train[0].ids.iter().rposition(|&id| Some(id) == tokenizer.eos()).unwrap();
    assert!(dataset.train[0].trained[end]);
    (dataset, text)
}

#[test]
fn model_without_template_sees_plain_speakers_and_a_note_says_so() {
    let (dataset, text) = read_plain(chat(&[("system", "be brief"), ("user", "hi"), ("assistant", "hello")]));
    assert!(text.contains("be brief\nUser: hi\nAssistant: hello</s>"), "{text:?}");
    assert!(
        dataset.notes[0].contains("`User: ...`") && dataset.notes[0].contains("`</s>`"),
        "{:?}",
        dataset.notes
    );
    assert_eq!(plain_tokenizer().decode(&trained_ids(&dataset), false).unwrap().trim(), "hello</s>");
}

#[test]
fn model_without_template_sees_instructions_as_alpaca_and_a_note_says_so() {
    let (dataset, text) = read_plain(json!({"instruction": "add", "input": "one two", "output": "three"}));
    assert!(
        text.contains("### Instruction:\nadd\n\n### Input:\none two\n\n### Response:\nthree</s>"),
        "{text:?}"
    );
    assert!(dataset.notes[0].contains("Alpaca"), "{:?}", dataset.notes);
    assert_eq!(plain_tokenizer().decode(&trained_ids(&dataset), false).unwrap().trim(), "three</s>");
}

#[test]
fn model_without_template_but_with_its_tokens_sees_chatml() {
    let dataset = read(&[two_turns()], None, &long()).unwrap();
    assert_eq!(trained_text(&dataset), [["one<|im_end|>", "two<|im_end|>"]]);
    assert!(dataset.notes[0].contains("ChatML"), "{:?}", dataset.notes);
}

fn trained_ids(dataset: &Dataset) -> Vec<u32> {
    let example = &dataset.train[0];
    example.ids.iter().zip(&example.trained).filter(|(_, trained)| **trained).map(|(&id, _)| id).collect()
}

#[test]
fn prompt_for_generation_is_a_beginning_of_the_training_text() {
    for tokenizer in [tokenizer(), plain_tokenizer()] {
        let format = ChatFormat::new(&tokenizer, None, &Map::new(), 0).unwrap();
        let prompt = format.prompt(&json!([{"role": "user", "content": "hi"}]), None).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let row = chat(&[("user", "hi"), ("assistant", "hello")]);
        let dataset = load(&write(folder.path(), &[row]), &format, &long()).unwrap();
        let start = dataset.train[0].trained.iter().position(|&trained| trained).unwrap();
        assert_eq!(dataset.train[0].ids[..start], prompt.ids, "{}", prompt.text);
    }
}

#[test]
fn long_rows_are_cut_dropped_or_refused_and_counted() {
    let rows: Vec<Value> = ["short", "this one is longer than the others are", "short again"]
        .iter()
        .map(|text| json!({"text": text}))
        .collect();
    let with =
        |on_long| read(&rows, None, &DataOptions { max_seq_len: 8, on_long, ..DataOptions::default() });
    let cut = with(OnLong::Truncate).unwrap();
    assert_eq!((cut.train_report.truncated, cut.train.len(), cut.train[1].ids.len()), (1, 3, 8));
    let lost = cut.train_report.longest - 8;
    assert_eq!(cut.train_report.trained_tokens_cut, lost);
    assert!(cut.notes.iter().any(|note| note.contains("1 rows were cut to 8 tokens")), "{:?}", cut.notes);
    let template = ChatTemplate::compile(CHATML).unwrap();
    let whole = read(&[two_turns()], Some(&template), &long()).unwrap();
    let limit = whole.train[0].ids.len() - 2;
    let options = DataOptions { max_seq_len: limit, ..DataOptions::default() };
    let cut_chat = read(&[two_turns()], Some(&template), &options).unwrap();
    assert_eq!(cut_chat.train[0].ids, whole.train[0].ids[..limit]);
    assert_eq!(cut_chat.train[0].trained, whole.train[0].trained[..limit]);
    let dropped = with(OnLong::Drop).unwrap();
    assert_eq!((dropped.train_report.dropped_long, dropped.train.len()), (1, 2));
    let message = with(OnLong::Error).unwrap_err();
    assert!(message.contains("line 2") && message.contains("at most 8"), "{message}");
}

#[test]
fn window_is_chosen_from_the_data_and_the_model() {
    let rows: Vec<Value> =
        (0..400).map(|at| json!({"text": "x ".repeat(if at < 2 { 90 } else { 5 })})).collect();
    let lengths = |options: &DataOptions| {
        let dataset = read(&rows, None, options).unwrap();
        (dataset.max_seq_len, dataset.train_report.truncated)
    };
    let short = read(&rows[2..3], None, &long()).unwrap().train[0].ids.len();
    assert_eq!(lengths(&DataOptions::default()), (short, 2));
    assert_eq!(lengths(&DataOptions { model_limit: Some(4), ..DataOptions::default() }), (4, 400));
    let options = DataOptions { model_limit: Some(4), max_seq_len: 5, ..DataOptions::default() };
    assert!(read(&rows, None, &options).unwrap_err().contains("at most 4"));
}

#[test]
fn rows_without_training_are_counted_and_a_dataset_of_them_is_an_error() {
    let template = ChatTemplate::compile(CHATML).unwrap();
    let silent = chat(&[("user", "a")]);
    let dataset = read(&[silent.clone(), two_turns()], Some(&template), &long()).unwrap();
    assert_eq!((dataset.train.len(), dataset.train_report.without_training), (1, 1));
    assert!(dataset.notes.iter().any(|note| note.contains("(lines 1)")), "{:?}", dataset.notes);
    let message = read(&[silent.clone(), silent], Some(&template), &long()).unwrap_err();
    assert!(
        message.contains("nothing is trained") && message.contains("2 have no trained token"),
        "{message}"
    );
    // The answer begins behind the cut.
    let options = DataOptions { max_seq_len: 3, ..DataOptions::default() };
    assert!(read(&[two_turns()], Some(&template), &options).unwrap_err().contains("nothing is trained"));
}

#[test]
fn rows_that_do_not_fit_are_named_or_skipped() {
    let rows = [json!({"text": "a"}), json!({"body": "b"}), json!({"text": 7}), json!({"text": "d"})];
    let message = read(&rows, None, &long()).unwrap_err();
    assert!(message.contains("line 2: the key `text` is missing") && message.contains("line 3"), "{message}");
    let dataset = read(&rows, None, &DataOptions { on_bad_row: OnBadRow::Skip, ..long() }).unwrap();
    assert_eq!(
        (dataset.train.len(), dataset.train_report.skipped.count, dataset.train_report.rows),
        (2, 2, 4)
    );
    assert_eq!(dataset.description(), "text (text), 4 rows, 2 skipped");
}

#[test]
fn layout_can_be_given() {
    let rows = [json!({"text": "a", "question": "q", "answer": "b"})];
    let options = DataOptions { layout: Layout::parse("text"), ..long() };
    assert_eq!(read(&rows, None, &options).unwrap().layout.to_string(), "text (text)");
    assert_eq!(read(&rows, None, &long()).unwrap().layout.to_string(), "one chat turn (question, answer)");
}

#[test]
fn evaluation_comes_from_its_file_or_from_a_split_by_seed() {
    let (folder, tokenizer) = (tempfile::tempdir().unwrap(), tokenizer());
    let format = ChatFormat::new(&tokenizer, None, &Map::new(), 0).unwrap();
    let rows: String = (0..40).map(|at| format!("{{\"text\": \"row {at}\"}}\n")).collect();
    let train = folder.path().join("train.jsonl");
    std::fs::write(&train, &rows).unwrap();
    let lines = |seed| {
        let options = DataOptions { eval_fraction: 0.1, seed, ..long() };
        let dataset = load(&train, &format, &options).unwrap();
        assert_eq!((dataset.train.len(), dataset.eval.len()), (36, 4));
        let mut all: Vec<usize> =
            dataset.train.iter().chain(&dataset.eval).map(|example| example.line).collect();
        all.sort_unstable();
        assert_eq!(all, (1..=40).collect::<Vec<_>>());
        dataset.eval.iter().map(|example| example.line).collect::<Vec<_>>()
    };
    assert_eq!(lines(1), lines(1));
    assert_ne!(lines(1), lines(2));
    std::fs::write(folder.path().join("valid.jsonl"), "{\"text\": \"held out\"}\n").unwrap();
    let dataset = load(folder.path(), &format, &DataOptions { eval_fraction: 0.1, ..long() }).unwrap();
    assert_eq!((dataset.train.len(), dataset.eval.len()), (40, 1));
    let all_evaluated = DataOptions { eval_fraction: 0.99, ..long() };
    std::fs::write(&train, "{\"text\": \"one\"}\n").unwrap();
    let message = load(&train, &format, &all_evaluated).unwrap_err().to_string();
    assert!(message.contains("leaves none"), "{message}");
}

#[test]
fn fingerprint_follows_ids_and_labels() {
    let template = ChatTemplate::compile(CHATML).unwrap();
    let of = |rows: &[Value], train_on| {
        let options =
            DataOptions { encode: EncodeOptions { train_on, ..EncodeOptions::default() }, ..long() };
        read(rows, Some(&template), &options).unwrap().fingerprint
    };
    let base = of(&[two_turns()], TrainOn::Assistant);
    assert_eq!(base.len(), 64);
    assert_eq!(base, of(&[two_turns()], TrainOn::Assistant));
    assert_ne!(base, of(&[two_turns()], TrainOn::Last));
    assert_ne!(base, of(&[two_turns(), two_turns()], TrainOn::Assistant));
}

#[test]
fn public_datasets_are_read_whole_and_packed_densely() {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/assets/data");
    let tokenizer = plain_tokenizer();
    let format = ChatFormat::new(&tokenizer, None, &Map::new(), 0).unwrap();
    for (name, layout, rows) in [
        ("gsm8k/test.jsonl", "one chat turn (question, answer)", 1319),
        ("wordnet/wordnet_alpaca.jsonl", "instruction (instruction, output)", 5000),
        ("wordnet/wordnet_messages.jsonl", "chat (messages)", 5000),
        ("wikisql_mlx", "text (text)", 1000),
    ] {
        let path = shared.join(name);
        if !path.exists() {
            println!("skipped: {name}");
            continue;
        }
        let dataset =
            load(&path, &format, &DataOptions { max_seq_len: 2048, ..DataOptions::default() }).unwrap();
        assert_eq!((dataset.layout.to_string().as_str(), dataset.train_report.rows), (layout, rows));
        let lengths: Vec<usize> = dataset.train.iter().map(|example| example.ids.len()).collect();
        let options =
            BatchOptions { batch_size: 4, max_seq_len: 2048, packing: true, seed: 0, shuffle: true };
        let plan = BatchPlan::new(&lengths, options).unwrap();
        let (mut tokens, mut slots, mut trained) = (0, 0, 0);
        for index in 0..plan.batches_per_epoch() {
            let batch = plan.batch(&dataset.train, 0, index);
            tokens += batch.ids.len();
            slots += batch.slots;
            trained += batch.trained_tokens();
        }
        assert_eq!((tokens, trained), (dataset.train_report.tokens, dataset.train_report.trained_tokens));
        assert!((plan.fill_ratio() - tokens as f64 / slots as f64).abs() < 1e-12);
        assert!(plan.fill_ratio() > 0.95, "{name}: {}", plan.fill_ratio());
    }
    let preferences = shared.join("wordnet/wordnet_preference.jsonl");
    if preferences.exists() {
        let message = load(&preferences, &format, &long()).unwrap_err().to_string();
        assert!(message.contains("preferences"), "{message}");
    }
}

#[test]
fn built_in_form_of_messages_in_prompt_and_completion_is_noted() {
    let row = json!({"prompt": [{"role": "user", "content": "a"}], "completion": "b"});
    let dataset = read(&[row], None, &long()).unwrap();
    assert!(dataset.notes.iter().any(|note| note.contains("ChatML")), "{:?}", dataset.notes);
}
