//! What was compiled is kept, and only believed if it is whole.

use std::{fs, os::unix::fs::MetadataExt, path::PathBuf};

use phalanx_worker::backend::cuda::{compiler::Compiler, kernels::ROWS};

use crate::tools;

/// The files of a cache, each with the number that changes when it is written anew.
fn files(directory: &tempfile::TempDir) -> Vec<(PathBuf, u64)> {
    let cache = directory.path().join("kernels");
    let entries = fs::read_dir(cache).unwrap().map(|entry| entry.unwrap());
    let mut files: Vec<_> = entries.map(|entry| (entry.path(), entry.metadata().unwrap().ino())).collect();
    files.sort();
    files
}

#[test]
fn a_kernel_is_compiled_once_and_again_when_what_it_depends_on_changes() {
    let directory = tempfile::tempdir().unwrap();
    let compiler = || Compiler::new(tools::nvrtc(), Some(directory.path().join("kernels")));
    let first = compiler().compile(&ROWS, &[], "sm_80").unwrap();
    let after_first = files(&directory);
    assert_eq!(after_first.len(), 1, "{after_first:?}");
    // The log has times in it: the same log comes from the cache.
    assert_eq!(compiler().compile(&ROWS, &[], "sm_80").unwrap(), first);
    assert_eq!(files(&directory), after_first);
    compiler().compile(&ROWS, &[("UNUSED", 1)], "sm_80").unwrap();
    compiler().compile(&ROWS, &[("UNUSED", 2)], "sm_80").unwrap();
    let other = compiler().compile(&ROWS, &[], "sm_90a").unwrap();
    assert_ne!(other.cubin, first.cubin);
    assert_eq!(files(&directory).len(), 4);
}

#[test]
fn a_broken_file_is_compiled_again() {
    let directory = tempfile::tempdir().unwrap();
    let compiler = Compiler::new(tools::nvrtc(), Some(directory.path().join("kernels")));
    let first = compiler.compile(&ROWS, &[], "sm_80").unwrap();
    let (path, _) = files(&directory).remove(0);
    let whole = fs::read(&path).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    for broken in [&whole[..whole.len() / 2], &flipped, b""] {
        fs::write(&path, broken).unwrap();
        let again = compiler.compile(&ROWS, &[], "sm_80").unwrap();
        assert_eq!(again.cubin, first.cubin);
        assert_eq!(compiler.compile(&ROWS, &[], "sm_80").unwrap(), again, "it is whole again");
    }
}

#[test]
fn ranks_that_compile_the_same_at_once_do_not_disturb_each_other() {
    let directory = tempfile::tempdir().unwrap();
    let compiler = Compiler::new(tools::nvrtc(), Some(directory.path().join("kernels")));
    let cubins: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let ranks: Vec<_> =
            (0..4).map(|_| scope.spawn(|| compiler.compile(&ROWS, &[], "sm_80").unwrap().cubin)).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    assert!(cubins.iter().all(|cubin| *cubin == cubins[0]));
    assert_eq!(files(&directory).len(), 1);
}

#[test]
fn a_cache_that_cannot_be_written_is_done_without() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let compiler = Compiler::new(tools::nvrtc(), Some(file.path().join("below a file")));
    assert!(!compiler.compile(&ROWS, &[], "sm_80").unwrap().cubin.is_empty());
}
