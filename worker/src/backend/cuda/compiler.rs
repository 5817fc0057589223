//! Kernels from source to machine code, each compiled once a machine.
//!
//! What was compiled is kept in the user's cache directory under a hash of everything it depends on: source, headers,
//! options, architecture and the compiler's version. A file that is not what was written is compiled again.

use std::{
    env, fs,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU64, Ordering},
};

use tracing::{debug, warn};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

pub use super::nvrtc::CompileError;
use super::{
    kernels::{HEADERS, KernelFile},
    nvrtc::{Compiled, Nvrtc, Unit},
};

/// Starts every file of the cache; its last digit grows when the layout changes.
const MAGIC: [u8; 8] = *b"PHXCUBI1";
/// Magic, checksum of the rest, bytes of the cubin as `u64`. Then the cubin, and to the end the log.
const HEADER_BYTES: usize = MAGIC.len() + 16 + 8;

/// NVRTC and what it compiled before.
pub struct Compiler {
    nvrtc: Nvrtc,
    cache: Option<PathBuf>,
}

/// The cache of this user: `$XDG_CACHE_HOME/phalanx/kernels`, else `~/.cache/phalanx/kernels`. None without a home.
pub fn user_cache() -> Option<PathBuf> {
    let directory = |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = directory("XDG_CACHE_HOME").or_else(|| Some(directory("HOME")?.join(".cache")))?;
    Some(caches.join("phalanx/kernels"))
}

/// The architecture to compile for on a device of this compute capability: `sm_90a` where there are instructions that
/// are not carried on, else the plain number.
pub fn architecture(compute_capability: (u32, u32)) -> String {
    match compute_capability {
        (9, 0) => "sm_90a".to_owned(),
        (major, minor) => format!("sm_{major}{minor}"),
    }
}

impl Compiler {
    /// A compiler that keeps what it compiled in `cache`, or does not.
    pub fn new(nvrtc: Nvrtc, cache: Option<PathBuf>) -> Self {
        Self { nvrtc, cache }
    }

    /// Compiles a file of kernels with these `name=value` definitions, unless that was done before. The log of what
    /// was done before comes with it.
    ///
    /// # Errors
    /// When the source does not compile for this architecture. A cache that cannot be read or written is no error.
    pub fn compile(
        &self,
        file: &KernelFile,
        definitions: &[(&str, u32)],
        architecture: &str,
    ) -> Result<Compiled, CompileError> {
        let options = options(definitions, architecture);
        let entry = self.cache.as_ref().map(|cache| {
            let stem = file.name.trim_end_matches(".cu");
            cache.join(format!("{stem}-{architecture}-{:032x}.cubin", self.key(file, &options)))
        });
        if let Some(compiled) = entry.as_deref().and_then(read) {
            return Ok(compiled);
        }
        let headers = HEADERS.map(|header| (header.name, header.source));
        let unit = Unit { name: file.name, source: file.source, headers: &headers, options: &options };
        let compiled = self.nvrtc.compile(&unit)?;
        debug!(file = file.name, architecture, log = compiled.log, "compiled");
        if let Some(entry) = entry
            && let Err(error) = write(&entry, &compiled)
        {
            warn!(path = %entry.display(), %error, "compiled kernels cannot be kept and will be compiled again");
        }
        Ok(compiled)
    }

    /// A hash of everything that machine code depends on.
    fn key(&self, file: &KernelFile, options: &[String]) -> u128 {
        let (major, minor) = self.nvrtc.version;
        let version = format!("{major}.{minor}");
        let texts = [file.name, file.source, &version].into_iter();
        let texts = texts.chain(HEADERS.iter().flat_map(|header| [header.name, header.source]));
        let mut hasher = Xxh3::new();
        for text in texts.chain(options.iter().map(String::as_str)) {
            // With its length each text stands for itself: no two lists run together to the same bytes.
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        hasher.digest128()
    }

    /// Where the compiler lies.
    pub fn path(&self) -> &Path {
        &self.nvrtc.path
    }

    /// The compiler's version, such as `(12, 9)`.
    pub fn version(&self) -> (u32, u32) {
        self.nvrtc.version
    }
}

/// What NVRTC is told. `-v` makes its log say registers and spills of every kernel.
fn options(definitions: &[(&str, u32)], architecture: &str) -> Vec<String> {
    let mut options = vec![
        format!("--gpu-architecture={architecture}"),
        "--std=c++17".to_owned(),
        "--ptxas-options=-v".to_owned(),
        // Costs nothing at run time; profilers and sanitizers then show lines.
        "--generate-line-info".to_owned(),
    ];
    options.extend(definitions.iter().map(|(name, value)| format!("--define-macro={name}={value}")));
    options
}

/// What was kept at `path`, if it is what was written there.
fn read(path: &Path) -> Option<Compiled> {
    let bytes = fs::read(path).ok()?;
    let parsed = parse(&bytes);
    if parsed.is_none() {
        warn!(path = %path.display(), "a broken file in the cache of kernels: compiling again");
    }
    parsed
}

fn parse(bytes: &[u8]) -> Option<Compiled> {
    let (header, body) = bytes.split_at_checked(HEADER_BYTES)?;
    let rest = header.strip_prefix(&MAGIC)?;
    let (checksum, length) = rest.split_first_chunk::<16>()?;
    let length = u64::from_le_bytes(length.try_into().ok()?);
    if checksum_of(length, body) != *checksum {
        return None;
    }
    let (cubin, log) = body.split_at_checked(usize::try_from(length).ok()?)?;
    Some(Compiled { cubin: cubin.to_vec(), log: String::from_utf8(log.to_vec()).ok()? })
}

fn checksum_of(length: u64, body: &[u8]) -> [u8; 16] {
    (xxh3_128(body) ^ u128::from(length)).to_le_bytes()
}

/// Writes to a file of its own and moves it into place, so that other ranks that compile the same never see a part.
fn write(path: &Path, compiled: &Compiled) -> io::Result<()> {
    static WRITTEN: AtomicU64 = AtomicU64::new(0);
    let directory = path.parent().unwrap_or(Path::new("."));
    // Whoever could write here would decide what runs on the device.
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let (own, number) = (process::id(), WRITTEN.fetch_add(1, Ordering::Relaxed));
    let scratch = path.with_extension(format!("{own}-{number}.part"));
    let length = compiled.cubin.len() as u64;
    let body = [compiled.cubin.as_slice(), compiled.log.as_bytes()].concat();
    let written = (|| {
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&scratch)?;
        for part in [&MAGIC[..], &checksum_of(length, &body), &length.to_le_bytes(), &body] {
            file.write_all(part)?;
        }
        fs::rename(&scratch, path)
    })();
    if written.is_err() {
        // Best effort: the reason is told already.
        let _ = fs::remove_file(&scratch);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compiled() -> Compiled {
        Compiled { cubin: vec![1, 2, 3], log: "Used 14 registers".to_owned() }
    }

    #[test]
    fn what_was_kept_comes_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b/rows.cubin");
        assert_eq!(read(&path), None);
        write(&path, &compiled()).unwrap();
        assert_eq!(read(&path), Some(compiled()));
        let files = fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!(files, 1, "nothing else is left behind");
    }

    #[test]
    fn broken_files_are_not_believed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rows.cubin");
        write(&path, &compiled()).unwrap();
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            assert_eq!(parse(&whole[..length]), None, "cut to {length} bytes");
        }
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 0x10;
            assert_eq!(parse(&changed), None, "byte {at} changed");
        }
    }

    #[test]
    fn architectures_follow_from_the_compute_capability() {
        assert_eq!([(8, 0), (9, 0), (12, 0)].map(architecture), ["sm_80", "sm_90a", "sm_120"]);
    }
}
