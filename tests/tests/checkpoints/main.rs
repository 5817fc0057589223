//! Checkpoints damaged in every way we could think of are refused by `phalanx serve` before it is ready: with an exit
//! code, and with a message that names the file and the tensor or field. Nothing panics and nothing is half loaded.

mod contents;
mod damage;
mod directories;
mod headers;

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
    time::Instant,
};

use phalanx_tests::cluster::{Cluster, binary, output_of};

use crate::{
    contents::{CONFIG_KINDS, CONTENT_KINDS},
    damage::{Kind, Of, copy},
    directories::DIRECTORY_KINDS,
    headers::HEADER_KINDS,
};

/// Longest time that a refusal may take, in seconds; loading the bundled model takes less than one.
const PATIENCE: &str = "60";

/// Damages a copy, serves it, and says what was wrong with the refusal.
fn misjudged(kind: &Kind, to: &Path) -> Option<String> {
    let (name, of, damage, words) = kind;
    let copy = copy(*of, to);
    damage(&copy);
    let started = Instant::now();
    // A refusal that never comes ends with 124.
    let mut serve = Command::new("timeout");
    serve.arg("-k").arg("5").arg(PATIENCE).arg(binary()).args(["serve", "--port", "0", "-tp", "1"]).arg(to);
    let (code, stdout, stderr) = output_of(&mut serve);
    println!("{name}: {:.1} s: {}", started.elapsed().as_secs_f64(), stderr.trim_end());
    let last = stderr.lines().rfind(|line| line.starts_with("phalanx: ")).unwrap_or_default();
    let said = words.iter().all(|word| last.contains(word));
    let fine = code == Some(78) && said && !stderr.contains("panicked") && !stdout.contains("ready:");
    fs::remove_dir_all(to).unwrap();
    (!fine).then(|| format!("{name}: exit {code:?}, expected 78 and {words:?}\n{stdout}{stderr}"))
}

#[test]
fn every_damaged_checkpoint_is_refused_before_ready() {
    let kinds = [HEADER_KINDS, CONTENT_KINDS, CONFIG_KINDS, DIRECTORY_KINDS].concat();
    let directory = tempfile::tempdir().unwrap();
    let next = AtomicUsize::new(0);
    let judge = || {
        let mut wrong = Vec::new();
        while let Some(kind) = kinds.get(next.fetch_add(1, Ordering::Relaxed)) {
            let place = directory.path().join(kind.0.replace(' ', "-"));
            wrong.extend(misjudged(kind, &place));
        }
        wrong
    };
    let wrong: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(judge)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    println!("{} kinds of damage, {} misjudged", kinds.len(), wrong.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(kinds.len() >= 40, "{} kinds", kinds.len());
}

/// The same copies undamaged, so that the refusals above say something.
#[test]
fn an_undamaged_copy_is_served_also_through_the_links_of_a_hub_cache() {
    let directory = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (directory.path().join("blobs"), directory.path().join("snapshots/abc"));
    copy(Of::Nano, &blobs);
    fs::create_dir_all(&snapshot).unwrap();
    for entry in fs::read_dir(&blobs).unwrap() {
        let name = entry.unwrap().file_name();
        symlink(Path::new("../../blobs").join(&name), snapshot.join(&name)).unwrap();
    }
    let mut cluster = Cluster::start(&[snapshot.to_str().unwrap(), "-tp", "1"]);
    assert_eq!(cluster.stop(), Some(0));
    let ragged = directory.path().join("ragged");
    copy(Of::Ragged, &ragged);
    let (code, table, stderr) = output_of(Command::new(binary()).arg("plan").arg(&ragged));
    assert_eq!(code, Some(0), "{stderr}");
    assert!(table.contains("rank"), "{table}");
}
