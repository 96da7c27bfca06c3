use std::io::ErrorKind;

use pmetal_formats::fs::RealFs;
use pmetal_formats::fs::fault::{Fault, FaultFs};
use serde_json::json;
use tempfile::TempDir;

use super::*;

fn identity() -> Identity {
    Identity { config_hash: "c".into(), dataset_fingerprint: "d".into(), base_model_hash: "b".into() }
}

fn content(step: u64) -> (Vec<u8>, Vec<u8>) {
    (vec![step as u8; 3000], format!("moments of step {step}").into_bytes())
}

fn save(store: &CheckpointStore, step: u64) -> Result<PathBuf> {
    let (adapter, optimizer) = content(step);
    let files = vec![
        NewFile::from_bytes("adapter.safetensors", &adapter),
        NewFile::from_bytes("optimizer.safetensors", &optimizer),
    ];
    store.save(step, &identity(), files, &json!({ "position": step * 10 }))
}

fn real_store(folder: &TempDir) -> CheckpointStore {
    CheckpointStore::open(Arc::new(RealFs), folder.path()).unwrap()
}

/// The step of the latest checkpoint, after comparing everything it holds with what was saved.
fn latest_step(store: &CheckpointStore) -> u64 {
    let checkpoint = store.latest().unwrap().checkpoint.expect("a valid checkpoint");
    let step = checkpoint.manifest.step;
    let (adapter, optimizer) = content(step);
    assert_eq!(checkpoint.read("adapter.safetensors").unwrap(), adapter);
    assert_eq!(checkpoint.read("optimizer.safetensors").unwrap(), optimizer);
    assert_eq!(checkpoint.state::<serde_json::Value>().unwrap(), json!({ "position": step * 10 }));
    assert_eq!(checkpoint.manifest.identity, identity());
    step
}

fn names(folder: &Path) -> Vec<String> {
    RealFs.read_dir(folder).unwrap().into_iter().map(|entry| entry.name.into_string().unwrap()).collect()
}

/// Runs a save of step 2 over a checkpoint of step 1 with the fault at every operation, and returns their number.
fn at_every_operation(fault: Fault, check: impl Fn(&TempDir, &FaultFs, Result<()>)) -> u64 {
    for at in 1..1000 {
        let folder = tempfile::tempdir().unwrap();
        save(&real_store(&folder), 1).unwrap();
        let fs = FaultFs::with_fault(at, fault);
        let result = CheckpointStore::open(Arc::new(fs.clone()), folder.path()).and_then(|store| {
            save(&store, 2)?;
            store.prune(1, &[]).map(|_| ())
        });
        fs.exists(folder.path()); // one more operation, so that a death after success is tried too
        if !fs.fired() {
            result.unwrap();
            return at - 1;
        }
        check(&folder, &fs, result);
    }
    panic!("saving does not end");
}

#[test]
fn a_death_at_any_operation_of_a_save_leaves_the_old_or_the_new_checkpoint() {
    let deaths = [
        Fault::Kill,
        Fault::KillAfter,
        Fault::PowerLoss { entries_survive: true },
        Fault::PowerLoss { entries_survive: false },
    ];
    for fault in deaths {
        let operations = at_every_operation(fault, |folder, fs, result| {
            let store = real_store(folder);
            let step = latest_step(&store);
            assert!(step == 2 || (step == 1 && result.is_err()), "{fault:?} at {:?}", fs.operations().last());
            let left = names(&folder.path().join("checkpoints"));
            assert!(left.iter().all(|name| name.starts_with("step-")), "{left:?}");
            save(&store, 2).unwrap();
            assert_eq!(latest_step(&store), 2);
        });
        assert!(operations > 20, "{operations} operations are too few for four files and a folder");
    }
}

#[test]
fn the_first_checkpoint_of_a_run_survives_a_loss_of_power() {
    for at in 1..1000 {
        let folder = tempfile::tempdir().unwrap();
        let fs = FaultFs::with_fault(at, Fault::PowerLoss { entries_survive: false });
        let store = CheckpointStore::open(Arc::new(fs.clone()), folder.path());
        let result = store.and_then(|store| save(&store, 1));
        fs.exists(folder.path()); // one more operation, so that a loss after success is tried too
        let latest = real_store(&folder).latest().unwrap();
        assert_eq!(latest.checkpoint.map(|checkpoint| checkpoint.manifest.step), result.is_ok().then_some(1));
        assert!(latest.skipped.is_empty());
        if !fs.fired() {
            return;
        }
    }
}

#[test]
fn a_death_while_the_only_checkpoint_is_replaced_leaves_one() {
    for fault in [Fault::Kill, Fault::KillAfter, Fault::PowerLoss { entries_survive: false }] {
        for at in 1..1000 {
            let folder = tempfile::tempdir().unwrap();
            save(&real_store(&folder), 7).unwrap();
            let fs = FaultFs::with_fault(at, fault);
            let store = CheckpointStore::open(Arc::new(fs.clone()), folder.path());
            let result = store.and_then(|store| save(&store, 7));
            assert_eq!(latest_step(&real_store(&folder)), 7, "{fault:?} at {:?}", fs.operations().last());
            if !fs.fired() {
                result.unwrap();
                break;
            }
        }
    }
}

#[test]
fn any_operation_may_fail_once_and_a_retry_succeeds() {
    for kind in [ErrorKind::StorageFull, ErrorKind::Other] {
        at_every_operation(Fault::Fail(kind), |folder, fs, result| {
            let what = fs.operations();
            let store = real_store(folder);
            let step = latest_step(&store);
            match result {
                Ok(()) => assert_eq!(step, 2, "{what:?}"),
                Err(Error::Format(FormatError::Io { source, .. })) => assert_eq!(source.kind(), kind),
                Err(other) => panic!("{other}"),
            }
            let again = CheckpointStore::open(Arc::new(fs.clone()), folder.path()).unwrap();
            save(&again, 2).unwrap();
            again.prune(1, &[]).unwrap();
            assert_eq!(latest_step(&store), 2);
            assert_eq!(names(&folder.path().join("checkpoints")), ["step-000002"], "{what:?}");
        });
    }
}

#[test]
fn a_damaged_checkpoint_is_skipped_with_its_reason_and_refused_when_asked_for() {
    type Damage = fn(&Path);
    let adapter = "adapter.safetensors";
    let edit = |path: &Path, change: fn(&mut Vec<u8>)| {
        let mut bytes = std::fs::read(path).unwrap();
        change(&mut bytes);
        std::fs::write(path, bytes).unwrap();
    };
    let truncate: Damage = |path| std::fs::write(path.join("adapter.safetensors"), [2; 2999]).unwrap();
    let empty: Damage = |path| std::fs::write(path.join("adapter.safetensors"), []).unwrap();
    let remove: Damage = |path| std::fs::remove_file(path.join("adapter.safetensors")).unwrap();
    let no_manifest: Damage = |path| std::fs::remove_file(path.join(MANIFEST)).unwrap();
    let empty_manifest: Damage = |path| std::fs::write(path.join(MANIFEST), []).unwrap();
    let rewrite = |path: &Path, from: &str, to: &str| {
        let text = std::fs::read_to_string(path.join(MANIFEST)).unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(path.join(MANIFEST), text.replacen(from, to, 1)).unwrap();
    };
    type Case<'a> = (&'static str, Box<dyn Fn(&Path) + 'a>);
    let cases: Vec<Case> = vec![
        ("`adapter.safetensors` has 2999 bytes, the manifest says 3000", Box::new(truncate)),
        ("`adapter.safetensors` has 0 bytes, the manifest says 3000", Box::new(empty)),
        ("`adapter.safetensors` cannot be read", Box::new(remove)),
        ("`adapter.safetensors` has SHA-256", Box::new(|p| edit(&p.join(adapter), |bytes| bytes[1234] ^= 8))),
        ("`state.json` has SHA-256", Box::new(|p| edit(&p.join(STATE), |bytes| bytes[4] ^= 1))),
        ("`manifest.json` cannot be read", Box::new(no_manifest)),
        ("`manifest.json` cannot be read: EOF", Box::new(empty_manifest)),
        (
            "`manifest.json` has format version 2, this program reads 1",
            Box::new(|p| rewrite(p, "\"format_version\": 1", "\"format_version\": 2")),
        ),
        (
            "`manifest.json` is of step 3, the folder of step 2",
            Box::new(|p| rewrite(p, "\"step\": 2", "\"step\": 3")),
        ),
        (
            "`manifest.json` names the file `../x`",
            Box::new(|p| rewrite(p, "\"adapter.safetensors\"", "\"../x\"")),
        ),
        (
            "`manifest.json` names the file `state.json`",
            Box::new(|p| rewrite(p, "\"adapter.safetensors\"", "\"state.json\"")),
        ),
    ];
    for (reason, damage) in cases {
        let folder = tempfile::tempdir().unwrap();
        let store = real_store(&folder);
        save(&store, 1).unwrap();
        let damaged = save(&store, 2).unwrap();
        damage(&damaged);
        assert_eq!(latest_step(&store), 1);
        let skipped = store.latest().unwrap().skipped;
        assert_eq!(skipped.len(), 1);
        assert_eq!(skipped[0].path, damaged);
        assert!(skipped[0].reason.starts_with(reason), "{} instead of {reason}", skipped[0].reason);
        let Err(Error::Checkpoint(message)) = store.at_step(2) else { panic!("{reason}") };
        assert!(message.contains(reason), "{message}");
    }
}

#[test]
fn a_file_that_changes_after_it_was_verified_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = real_store(&folder);
    let path = save(&store, 1).unwrap();
    let checkpoint = store.at_step(1).unwrap();
    std::fs::write(path.join("adapter.safetensors"), [9; 3000]).unwrap();
    assert!(matches!(checkpoint.read("adapter.safetensors"), Err(Error::Checkpoint(_))));
}

#[test]
fn a_full_disk_is_noticed_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let fs = FaultFs::new();
    let store = CheckpointStore::open(Arc::new(fs.clone()), folder.path()).unwrap();
    fs.set_free_bytes(1000);
    let before = fs.operations().len();
    let error = save(&store, 1).unwrap_err();
    assert!(matches!(error, Error::DiskFull { free_bytes: 1000, needed_bytes, .. } if needed_bytes > 3000));
    assert!(error.to_string().ends_with("its disk has 1000 bytes free"), "{error}");
    assert_eq!(fs.operations().len(), before);
}

#[test]
fn pruning_keeps_the_last_and_the_chosen() {
    let folder = tempfile::tempdir().unwrap();
    let store = real_store(&folder);
    for step in [5, 20, 100, 1_000_000, 999_999] {
        save(&store, step).unwrap();
    }
    RealFs.create_dir_all(&folder.path().join("checkpoints/step-7")).unwrap();
    assert_eq!(store.prune(2, &[20]).unwrap(), [100, 5]);
    let left = names(&folder.path().join("checkpoints"));
    assert_eq!(left, ["step-000020", "step-1000000", "step-7", "step-999999"]);
    assert_eq!(latest_step(&store), 1_000_000);
}

#[test]
fn a_file_with_a_bad_name_or_another_length_is_not_saved() {
    let folder = tempfile::tempdir().unwrap();
    let store = real_store(&folder);
    for name in ["", "a/b", "..", ".x", MANIFEST, STATE, "a\\b", "C:x"] {
        let files = vec![NewFile::from_bytes(name, b"x")];
        assert!(matches!(store.save(1, &identity(), files, &0), Err(Error::Usage(_))), "{name}");
    }
    let files =
        vec![NewFile::streamed("x", 2, |file| file.write_all(b"123").map_err(FormatError::io("write", "x")))];
    let Err(Error::Usage(message)) = store.save(1, &identity(), files, &0) else { panic!() };
    assert_eq!(message, "`x` was announced with 2 bytes and has 3");
    assert!(names(&folder.path().join("checkpoints")).is_empty());
}

#[test]
fn an_empty_run_has_no_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let latest = real_store(&folder).latest().unwrap();
    assert!(latest.checkpoint.is_none() && latest.skipped.is_empty());
}

#[test]
fn no_manifest_bytes_make_the_parser_panic() {
    let folder = tempfile::tempdir().unwrap();
    let store = real_store(&folder);
    let bytes = std::fs::read(save(&store, 1).unwrap().join(MANIFEST)).unwrap();
    assert!(parse_manifest(&bytes).is_ok());
    for length in 0..bytes.len() {
        assert!(parse_manifest(&bytes[..length]).is_err());
        let mut flipped = bytes.clone();
        flipped[length] ^= 0x80;
        assert!(parse_manifest(&flipped).is_err());
    }
}
