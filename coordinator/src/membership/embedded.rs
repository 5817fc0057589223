//! Epochs without a cluster store: one small file, written to a temporary, synced, renamed, with a lock on its directory.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{Read, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use phalanx_proto::ids::Epoch;
use tokio::{sync::watch, task::spawn_blocking};

use super::{EpochError, Membership, Role, successor};

/// More than the longest number that is ever written, and what is read of a file at most.
const MAX_FILE_BYTES: u64 = 64;

/// A coordinator on its own. It always leads.
#[derive(Debug)]
pub struct Embedded {
    source: Arc<Mutex<EpochSource>>,
    /// Whether issuing an epoch waits for a disk.
    on_disk: bool,
    role: watch::Sender<Role>,
}

impl Embedded {
    /// One that forgets its epochs with the process.
    pub fn in_memory() -> Self {
        Self::new(EpochSource::in_memory())
    }

    /// One that keeps its last epoch in `directory`, which is made if it does not exist.
    ///
    /// # Errors
    /// When the directory cannot be used, another process holds it, or its file is damaged.
    pub async fn open(directory: PathBuf) -> Result<Self, EpochError> {
        let opened = directory.clone();
        let source = spawn_blocking(move || EpochSource::open(&opened)).await;
        let source = source.unwrap_or_else(|error| Err(io("open", &directory)(std::io::Error::other(error))));
        source.map(Self::new)
    }

    fn new(source: EpochSource) -> Self {
        let on_disk = source.file.is_some();
        Self { source: Arc::new(Mutex::new(source)), on_disk, role: watch::Sender::new(Role::Leading) }
    }
}

#[tonic::async_trait]
impl Membership for Embedded {
    fn role(&self) -> watch::Receiver<Role> {
        self.role.subscribe()
    }

    async fn next_epoch(&self, seen: Epoch) -> Result<Epoch, EpochError> {
        let source = Arc::clone(&self.source);
        let issue = move || source.lock().unwrap_or_else(PoisonError::into_inner).next(seen);
        if !self.on_disk {
            return issue();
        }
        // Syncing a file blocks. The lock is taken and given back on that thread.
        let issued = spawn_blocking(issue).await;
        issued.unwrap_or_else(|error| Err(io("write", Path::new("epoch"))(std::io::Error::other(error))))
    }

    /// There is nobody else.
    async fn resign(&self) {}
}

/// Issues epochs, each greater than any before it.
#[derive(Debug)]
pub struct EpochSource {
    last: Epoch,
    file: Option<EpochFile>,
}

#[derive(Debug)]
struct EpochFile {
    directory: PathBuf,
    /// Held for as long as the source lives; the lock goes with it.
    _lock: File,
}

impl EpochSource {
    /// A source that forgets with the process. Workers that outlive it say which epoch they have seen.
    pub fn in_memory() -> Self {
        Self { last: Epoch(0), file: None }
    }

    /// A source that remembers in `directory`, which is made if it does not exist.
    ///
    /// # Errors
    /// When the directory cannot be used, another process holds it, or its file is damaged.
    pub fn open(directory: &Path) -> Result<Self, EpochError> {
        fs::create_dir_all(directory).map_err(io("create", directory))?;
        let lock_path = directory.join("lock");
        let options = OpenOptions::new().create(true).truncate(false).write(true).open(&lock_path);
        let lock = options.map_err(io("open", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(EpochError::Locked { path: lock_path }),
            Err(TryLockError::Error(source)) => return Err(io("lock", &lock_path)(source)),
        }
        let file = EpochFile { directory: directory.to_owned(), _lock: lock };
        Ok(Self { last: file.read()?, file: Some(file) })
    }

    /// The next epoch: greater than all that were issued and than `seen`, the highest that any worker knows.
    /// When it returns, the number is on disk and will never be issued again.
    ///
    /// # Errors
    /// When the file cannot be written; then nothing was issued.
    pub fn next(&mut self, seen: Epoch) -> Result<Epoch, EpochError> {
        let next = successor([self.last, seen])?;
        if let Some(file) = &self.file {
            file.write(next)?;
        }
        self.last = next;
        Ok(next)
    }
}

impl EpochFile {
    fn path(&self) -> PathBuf {
        self.directory.join("epoch")
    }

    /// The number in the file; 0 when there is none yet.
    fn read(&self) -> Result<Epoch, EpochError> {
        let path = self.path();
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Epoch(0)),
            Err(error) => return Err(io("open", &path)(error)),
        };
        let mut found = String::new();
        file.take(MAX_FILE_BYTES).read_to_string(&mut found).map_err(io("read", &path))?;
        match found.trim_end().parse() {
            Ok(number) => Ok(Epoch(number)),
            Err(_) => Err(EpochError::Malformed { path, found }),
        }
    }

    fn write(&self, epoch: Epoch) -> Result<(), EpochError> {
        let temporary = self.directory.join("epoch.tmp");
        let mut file = File::create(&temporary).map_err(io("create", &temporary))?;
        file.write_all(format!("{epoch}\n").as_bytes()).map_err(io("write", &temporary))?;
        file.sync_all().map_err(io("sync", &temporary))?;
        fs::rename(&temporary, self.path()).map_err(io("rename", &temporary))?;
        // The rename itself is durable only when the directory is.
        let directory = File::open(&self.directory).map_err(io("open", &self.directory))?;
        directory.sync_all().map_err(io("sync", &self.directory))
    }
}

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> EpochError {
    let path = path.to_owned();
    move |source| EpochError::Io { action, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_go_on_after_a_restart_and_after_what_workers_have_seen() {
        let directory = tempfile::tempdir().unwrap();
        let mut source = EpochSource::open(directory.path()).unwrap();
        assert_eq!(source.next(Epoch(0)).unwrap(), Epoch(1));
        assert_eq!(source.next(Epoch(41)).unwrap(), Epoch(42));
        drop(source);
        let mut source = EpochSource::open(directory.path()).unwrap();
        assert_eq!(source.next(Epoch(3)).unwrap(), Epoch(43));
    }

    #[test]
    fn a_second_coordinator_is_refused_while_the_first_lives() {
        let directory = tempfile::tempdir().unwrap();
        let first = EpochSource::open(directory.path()).unwrap();
        assert!(matches!(EpochSource::open(directory.path()), Err(EpochError::Locked { .. })));
        drop(first);
        EpochSource::open(directory.path()).unwrap();
    }

    #[test]
    fn a_damaged_file_is_an_error_and_not_a_fresh_start() {
        let directory = tempfile::tempdir().unwrap();
        for damaged in ["", "-3", "12x"] {
            fs::write(directory.path().join("epoch"), damaged).unwrap();
            assert!(matches!(EpochSource::open(directory.path()), Err(EpochError::Malformed { .. })), "{damaged:?}");
        }
    }

    #[test]
    fn nothing_is_issued_when_it_cannot_be_written() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        let mut source = EpochSource::open(&state).unwrap();
        assert_eq!(source.next(Epoch(0)).unwrap(), Epoch(1));
        fs::remove_dir_all(&state).unwrap();
        assert!(source.next(Epoch(0)).is_err());
        assert!(source.next(Epoch(u64::MAX)).is_err());
        fs::create_dir(&state).unwrap();
        assert_eq!(source.next(Epoch(0)).unwrap(), Epoch(2));
    }
}
