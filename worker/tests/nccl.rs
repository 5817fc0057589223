//! The NCCL binding: against the real library as far as that goes without a GPU, and against one that misbehaves.

#![allow(missing_docs, reason = "tests have no users")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail by panicking")]

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use phalanx_worker::collective::nccl::{
    ABORT_LIMIT, Communicator, Kind, Member, Nccl, NcclError, SONAME, UNIQUE_ID_BYTES, UniqueId, Values,
};

/// Far beyond what a test takes: whoever reaches it hangs.
const NEVER: Duration = Duration::from_secs(60);

/// The library of the package in `tests/requirements.txt`.
fn real() -> PathBuf {
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/venv/bin/python");
    let python = std::env::var_os("PHALANX_PYTHON").map_or(installed, PathBuf::from);
    let hint = "run the tests with tests/run, which installs nvidia-nccl-cu12 into target/venv";
    let find = "import nvidia.nccl; print(list(nvidia.nccl.__path__)[0], end='')";
    let output = Command::new(&python).args(["-c", find]).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}; {hint}", python.display()));
    assert!(output.status.success(), "{}; {hint}", String::from_utf8_lossy(&output.stderr));
    Path::new(&String::from_utf8(output.stdout).unwrap()).join("lib").join(SONAME)
}

/// Compiles the library that misbehaves.
fn fake(definition: &str) -> Nccl {
    let path = compile(definition);
    Nccl::open(&path).unwrap()
}

fn compile(definition: &str) -> PathBuf {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nccl/fake.c");
    // It stays loaded for as long as the process runs, so its file stays too.
    let path = folder.keep().join(SONAME);
    let mut compiler = Command::new("cc");
    compiler.args(["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", definition]);
    let output = compiler.arg(source).arg("-o").arg(&path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    path
}

fn member(mode: u8) -> Member {
    Member { epoch: 9, id: UniqueId([mode; UNIQUE_ID_BYTES]), rank: 2, world_size: 4 }
}

fn start(nccl: &Arc<Nccl>, mode: u8) -> Result<Communicator, NcclError> {
    Communicator::start(nccl, &member(mode), |hang| panic!("{hang}"))
}

fn values(count: usize, kind: Kind) -> Values {
    Values { from: 0x1000, to: 0x2000, count, kind, stream: 0x30 }
}

#[test]
fn the_real_library_tells_its_version_and_makes_identities() {
    let nccl = Nccl::open(&real()).unwrap();
    assert!((21_800..40_000).contains(&nccl.version()), "{}", nccl.version());
    let (one, other) = (nccl.unique_id().unwrap(), nccl.unique_id().unwrap());
    assert!(one != other);
}

#[test]
fn an_init_that_cannot_succeed_ends_in_an_error_that_says_why() {
    let nccl = Arc::new(Nccl::open(&real()).unwrap());
    let member = Member { epoch: 1, id: nccl.unique_id().unwrap(), rank: 0, world_size: 2 };
    let start = Instant::now();
    let result = Communicator::start(&nccl, &member, |hang| panic!("{hang}"));
    let result = result.and_then(|communicator| communicator.wait_ready(Duration::from_millis(500)));
    match result.unwrap_err() {
        // No GPU, or no driver.
        NcclError::Call { call, code, detail, advice, .. } => {
            assert_eq!((call, code), ("ncclCommInitRankConfig", 1));
            assert!(detail.contains("Cuda failure"), "{detail}");
            assert!(advice.contains("nvidia-smi"), "{advice}");
        }
        // A GPU, but no rank 1.
        NcclError::Late { call, rank, .. } => assert_eq!((call, rank), ("ncclCommInitRankConfig", 0)),
        other => panic!("{other}"),
    }
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn a_library_that_is_missing_or_another_or_too_old_is_refused() {
    let error = |path: &Path| Nccl::open(path).err().unwrap().to_string();
    let missing = error(Path::new("/nowhere/libnccl.so.2"));
    assert!(missing.contains("/nowhere/libnccl.so.2") && missing.contains("install nvidia-nccl-cu12"), "{missing}");
    let other = error(Path::new("libc.so.6"));
    assert!(other.contains("ncclGetVersion"), "{other}");
    let old = error(&compile("-DVERSION=21703"));
    assert!(old.ends_with("is 2.17.3, at least 2.18 is needed"), "{old}");
    let ancient = error(&compile("-DVERSION=2708"));
    assert!(ancient.contains("is 2.7.8"), "{ancient}");
}

#[test]
fn a_communicator_forms_works_and_ends_in_order() {
    let nccl = Arc::new(fake("-DFAKE"));
    let communicator = start(&nccl, b'r').unwrap();
    communicator.wait_ready(NEVER).unwrap();
    communicator.all_reduce(&values(96, Kind::F32), NEVER).unwrap();
    communicator.all_gather(&values(17, Kind::U8), NEVER).unwrap();
    communicator.check().unwrap();
    let refused = communicator.all_reduce(&values(95, Kind::F32), NEVER).unwrap_err().to_string();
    assert!(refused.starts_with("ncclAllReduce: something failed (code 4): arguments of all-reduce"), "{refused}");
    communicator.finish(NEVER).unwrap();
}

#[test]
fn an_init_that_fails_at_once_says_what_the_library_said() {
    let nccl = Arc::new(fake("-DFAKE"));
    let error = start(&nccl, b's').err().unwrap().to_string();
    assert!(error.starts_with("ncclCommInitRankConfig: something failed (code 2): no interface; see that"), "{error}");
    assert!(matches!(start(&nccl, b'n'), Err(NcclError::Call { code: 0, .. })), "success without a communicator");
}

#[test]
fn a_rank_that_never_comes_is_an_error_at_the_deadline() {
    let nccl = Arc::new(fake("-DFAKE"));
    let communicator = start(&nccl, b'l').unwrap();
    let error = communicator.wait_ready(Duration::from_millis(30)).unwrap_err();
    assert!(matches!(error, NcclError::Late { rank: 2, epoch: 9, limit_ms: 30, .. }), "{error}");
}

#[test]
fn an_abort_ends_a_wait_in_another_thread_and_all_later_calls() {
    let nccl = Arc::new(fake("-DFAKE"));
    let communicator = start(&nccl, b'l').unwrap();
    let handle = communicator.abort_handle();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| communicator.wait_ready(NEVER));
        handle.abort();
        assert!(matches!(waiting.join().unwrap(), Err(NcclError::Aborted { epoch: 9 })));
    });
    handle.abort();
    communicator.abort().unwrap();
    assert!(matches!(communicator.check(), Err(NcclError::Aborted { .. })));
    assert!(matches!(communicator.all_reduce(&values(96, Kind::F32), NEVER), Err(NcclError::Aborted { .. })));
    assert!(matches!(communicator.finish(NEVER), Err(NcclError::Aborted { .. })));
}

#[test]
fn what_goes_wrong_later_is_found_by_asking() {
    let nccl = Arc::new(fake("-DFAKE"));
    let communicator = start(&nccl, b'e').unwrap();
    communicator.wait_ready(NEVER).unwrap();
    let error = communicator.all_reduce(&values(96, Kind::F32), NEVER).unwrap_err().to_string();
    let expected = "ncclAllReduce: remote process exited (code 6): rank 3 closed its connection; a peer ended";
    assert!(error.starts_with(expected), "{error}");
}

#[test]
fn an_abort_that_hangs_is_told_so_that_the_process_can_end() {
    let nccl = Arc::new(fake("-DFAKE"));
    let told = Arc::new(AtomicU32::new(0));
    let hangs = Arc::clone(&told);
    let on_hang = move |hang: &NcclError| {
        assert!(matches!(hang, NcclError::AbortHung { rank: 2, epoch: 9, .. }), "{hang}");
        hangs.fetch_add(1, Ordering::Relaxed);
    };
    let communicator = Communicator::start(&nccl, &member(b'h'), on_hang).unwrap();
    let start = Instant::now();
    let error = communicator.abort().unwrap_err();
    assert!(error.to_string().ends_with("the process must end"), "{error}");
    assert!(start.elapsed() >= ABORT_LIMIT);
    assert_eq!(told.load(Ordering::Relaxed), 1);
    // A second one neither hangs nor takes the first for done.
    assert!(communicator.abort().is_err());
    assert_eq!(told.load(Ordering::Relaxed), 2);
    drop(communicator);
    assert!(start.elapsed() < 5 * ABORT_LIMIT, "{:?}", start.elapsed());
}
