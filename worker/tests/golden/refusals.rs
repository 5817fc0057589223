//! What does not fit is an error that says what, and nothing panics: files that end early, batches that name what is
//! not there.

use std::{fs, path::PathBuf};

use phalanx_proto::{
    checkpoint::Checkpoint,
    geometry::LayerKind,
    ids::{BlockId, Rank, TokenId},
    layout::{Layout, RankLayout},
};
use phalanx_worker::{
    backend::{Arithmetic, Batch, BatchSequence, reference::ReferenceBackend},
    checkpoint::ReadError,
    collective::Alone,
    model::{BatchError, LoadError, LoadedBytes, Model, ModelError},
};

use crate::files::golden;

/// A copy of the ragged checkpoint, on disk until dropped.
fn copy() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden("tiny-ragged")).unwrap() {
        let entry = entry.unwrap();
        fs::write(folder.path().join(entry.file_name()), fs::read(entry.path()).unwrap()).unwrap();
    }
    folder
}

fn load(checkpoint: &Checkpoint, progress: &dyn Fn(LoadedBytes)) -> Result<Model<ReferenceBackend>, LoadError> {
    let backend = ReferenceBackend::new(Arithmetic::new(checkpoint.geometry.clone()));
    Model::load(checkpoint, whole(checkpoint), backend, progress)
}

fn whole(checkpoint: &Checkpoint) -> RankLayout {
    Layout::single().rank(&checkpoint.geometry, Rank(0))
}

fn cut(path: &PathBuf, bytes: u64) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() - bytes).unwrap();
}

#[test]
fn a_truncated_checkpoint_is_refused_before_anything_is_read() {
    let folder = copy();
    let file = folder.path().join("model-00000-of-00001.safetensors");
    cut(&file, 1);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let refused = load(&checkpoint, &|_| panic!("read before the check")).err().unwrap();
    let message = refused.to_string();
    assert!(message.starts_with(&file.display().to_string()) && message.contains("truncated: tensor"), "{message}");
}

#[test]
fn a_file_that_shrinks_while_it_is_read_is_an_error_with_tensor_and_bytes() {
    let folder = copy();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let file = folder.path().join("model-00001-of-00001.safetensors");
    let shrink = |loaded: LoadedBytes| {
        if loaded.loaded < 700_000 {
            fs::File::options().write(true).open(&file).unwrap().set_len(5_000).unwrap();
        }
    };
    let failed = load(&checkpoint, &shrink).err().unwrap();
    let message = failed.to_string();
    assert!(matches!(failed, LoadError::Read(ReadError::Read { .. })), "{message}");
    assert!(message.starts_with(&file.display().to_string()) && message.contains("tensor"), "{message}");
}

#[test]
fn a_file_that_vanishes_after_opening_is_an_error() {
    let folder = copy();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let file = folder.path().join("model-00001-of-00001.safetensors");
    fs::remove_file(&file).unwrap();
    let message = load(&checkpoint, &|_| {}).err().unwrap().to_string();
    assert!(message.starts_with(&file.display().to_string()), "{message}");
}

#[test]
fn progress_rises_to_the_bytes_of_the_shard() {
    let checkpoint = Checkpoint::open(&golden("tiny-ragged")).unwrap();
    let seen = std::cell::RefCell::new(Vec::new());
    let model = load(&checkpoint, &|loaded| seen.borrow_mut().push(loaded)).unwrap();
    let seen = seen.into_inner();
    assert!(seen.windows(2).all(|pair| pair[0].loaded < pair[1].loaded && pair[0].total == pair[1].total));
    let last = seen.last().unwrap();
    assert_eq!((last.loaded, last.total), (checkpoint.bytes(), checkpoint.bytes()));
    assert_eq!(model.weight_bytes(), checkpoint.bytes());
}

/// Two tokens of one sequence at the start, with blocks of four tokens.
fn batch() -> Batch {
    Batch {
        tokens: vec![TokenId(1), TokenId(2)],
        positions: vec![0, 1],
        sequences: vec![BatchSequence {
            rows: 0..2,
            first_position: 0,
            full_table: vec![BlockId(0)],
            sliding_table: vec![BlockId(0)],
        }],
    }
}

fn forward(change: impl FnOnce(&mut Batch), logit_rows: &[usize]) -> Result<Vec<f32>, ModelError> {
    let checkpoint = Checkpoint::open(&golden("tiny-ragged")).unwrap();
    let mut model = load(&checkpoint, &|_| {}).unwrap();
    let spec = model.kv_cache_spec(4, 2, 2);
    model.allocate_kv_cache(&spec).unwrap();
    let mut batch = batch();
    change(&mut batch);
    model.forward(&batch, logit_rows, &mut Alone)
}

#[test]
fn a_batch_that_does_not_fit_is_an_error_and_never_a_panic() {
    assert_eq!(forward(|_| {}, &[1]).unwrap().len(), 1003);
    let error = |change: fn(&mut Batch), rows: &[usize]| match forward(change, rows) {
        Err(ModelError::Batch(error)) => error,
        other => panic!("{other:?}"),
    };
    let outside = error(|batch| batch.tokens[1] = TokenId(1003), &[]);
    assert!(matches!(outside, BatchError::Token { token: 1003, vocab_size: 1003 }));
    assert!(matches!(error(|_| {}, &[2]), BatchError::LogitRow { row: 2, rows: 2 }));
    assert!(matches!(error(|batch| batch.positions[1] = 5, &[]), BatchError::Position { row: 1, expected: 1, .. }));
    assert!(matches!(error(|batch| batch.positions.truncate(1), &[]), BatchError::Rows { .. }));
    assert!(matches!(error(|batch| batch.sequences[0].rows = 0..1, &[]), BatchError::Rows { .. }));
    assert!(matches!(error(|batch| batch.sequences[0].rows = 1..2, &[]), BatchError::Rows { .. }));
    let no_entry = error(|batch| batch.sequences[0].full_table.clear(), &[]);
    assert!(matches!(no_entry, BatchError::Block { kind: LayerKind::FullAttention, block: None, .. }));
    let no_block = error(|batch| batch.sequences[0].sliding_table[0] = BlockId(2), &[]);
    assert!(matches!(no_block, BatchError::Block { kind: LayerKind::SlidingAttention, block: Some(2), blocks: 2, .. }));
}

#[test]
fn an_empty_batch_gives_no_logits() {
    let logits = forward(|batch| *batch = Batch::default(), &[]).unwrap();
    assert!(logits.is_empty());
}

#[test]
fn a_model_without_a_cache_computes_nothing() {
    let checkpoint = Checkpoint::open(&golden("tiny-ragged")).unwrap();
    let mut model = load(&checkpoint, &|_| {}).unwrap();
    assert!(matches!(model.forward(&batch(), &[], &mut Alone), Err(ModelError::Batch(BatchError::NoCache))));
}
