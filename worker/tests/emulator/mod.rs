//! A driver that runs the product's CUDA kernels on the host, for tests: see `instructions.cuh`.
//!
//! Kernels are compiled by the system's C++ compiler and kept in the target directory. Every allocation ends at a page
//! that cannot be touched and is filled with set bits, so that an index that is wrong and a value that nobody wrote show.

use std::{
    collections::HashMap,
    ffi::CString,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    os::raw::{c_char, c_int, c_void},
    path::{Path, PathBuf},
    process::Command,
    ptr,
    sync::{Arc, Mutex},
};

use libloading::Library;
use phalanx_worker::backend::cuda::{
    driver::{Address, Arguments, Driver, DriverError, Properties, Shape},
    kernels::{HEADERS, KernelFile},
};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

const PAGE: usize = 4096;
/// Allocations that are given out; more means a leak.
const MEMORY_BYTES: u64 = 16 << 30;

type Launch =
    unsafe extern "C" fn(*const c_char, *const c_void, *const u32, u32, u32, *const c_void, u32, u32, u32) -> c_int;

/// The emulated device.
pub(crate) struct Emulator {
    properties: Properties,
    /// Bytes of each allocation by its address.
    allocations: Mutex<HashMap<u64, usize>>,
    /// What is being captured.
    capture: Mutex<Option<Vec<Recorded>>>,
    /// Threads of the system that share a grid's blocks.
    threads: u32,
    /// Whether blocks, warps and lanes run last first.
    backwards: bool,
}

/// A compiled file of kernels.
pub(crate) struct Module {
    library: Arc<Library>,
    file: &'static str,
}

/// A kernel.
#[derive(Clone)]
pub(crate) struct Function {
    /// Keeps `entry` and `launch` where they are.
    _library: Arc<Library>,
    name: CString,
    entry: *const c_void,
    launch: Launch,
    shared_bytes: u32,
}

// SAFETY: both point into a library that is never written and lives as long as the function.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

enum Recorded {
    Launch(Function, Shape, Vec<u8>),
    Copy(Address, Address, usize),
    Clear(Address, usize),
}

/// Recorded work.
pub(crate) struct Graph(Vec<Recorded>);

impl Emulator {
    /// A device whose kernels run on `threads` threads of the system, blocks, warps and lanes first to last or last to
    /// first.
    pub(crate) fn with_order(threads: u32, backwards: bool) -> Self {
        let properties = Properties {
            name: "emulated on the host".to_owned(),
            compute_capability: (8, 0),
            multiprocessors: 4,
            shared_bytes: 163 * 1024,
            memory_bytes: MEMORY_BYTES,
        };
        Self { properties, allocations: Mutex::default(), capture: Mutex::default(), threads, backwards }
    }

    /// Whether it runs last to first.
    pub(crate) fn backwards(&self) -> bool {
        self.backwards
    }

    fn run(&self, function: &Function, shape: Shape, arguments: &[u8]) -> Result<(), DriverError> {
        let (grid, bytes) = (shape.grid.as_ptr(), arguments.as_ptr().cast());
        let (name, entry, length) = (function.name.as_ptr(), function.entry, arguments.len() as u32);
        let (threads, shared) = (shape.threads, shape.shared_bytes);
        // SAFETY: the arguments have the length that the kernel's entry states, or the call refuses them; what they
        // point to is checked by guard pages alone, which end the process.
        let code = unsafe {
            (function.launch)(name, entry, grid, threads, shared, bytes, length, self.threads, self.backwards.into())
        };
        match code {
            0 => Ok(()),
            _ => Err(failed("launch", format!("kernel {:?} was launched wrongly, see above", function.name))),
        }
    }

    /// Records while capturing, else does it at once.
    fn record_or<T>(&self, record: impl FnOnce() -> Recorded, now: T) -> Result<(), DriverError>
    where
        T: FnOnce() -> Result<(), DriverError>,
    {
        match self.capture.lock().unwrap().as_mut() {
            Some(recorded) => recorded.push(record()),
            None => return now(),
        }
        Ok(())
    }

    fn copy_now(&self, to: Address, from: Address, bytes: usize) {
        self.check(to, bytes);
        self.check(from, bytes);
        // SAFETY: both ranges lie within allocations, as was just checked.
        unsafe { ptr::copy(from.0 as *const u8, to.0 as *mut u8, bytes) };
    }

    fn clear_now(&self, at: Address, bytes: usize) {
        self.check(at, bytes);
        // SAFETY: the range lies within an allocation, as was just checked.
        unsafe { ptr::write_bytes(at.0 as *mut u8, 0, bytes) };
    }

    /// Panics if a range is not within one allocation.
    fn check(&self, at: Address, bytes: usize) {
        let allocations = self.allocations.lock().unwrap();
        let within = |(&start, &len): (&u64, &usize)| start <= at.0 && at.0 + bytes as u64 <= start + len as u64;
        assert!(allocations.iter().any(within), "{bytes} bytes at {at:?} lie in no allocation");
    }

    fn not_capturing(&self, what: &str) {
        assert!(self.capture.lock().unwrap().is_none(), "{what} while capturing");
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        for (start, bytes) in self.allocations.get_mut().unwrap().drain() {
            release(start, bytes);
        }
    }
}

fn failed(call: &'static str, message: String) -> DriverError {
    DriverError::Call { call, message }
}

/// Bytes of the mapping of an allocation: a page that cannot be touched, the bytes up to the end of a page, another one.
fn mapped(bytes: usize) -> usize {
    bytes.next_multiple_of(PAGE) + 2 * PAGE
}

fn release(start: u64, bytes: usize) {
    let inner = bytes.next_multiple_of(PAGE);
    let base = start as usize + bytes - inner - PAGE;
    // The end of a buffer is the end of a page; what lies before its beginning must be as it was.
    let before = (base + PAGE) as *const u8;
    // SAFETY: the mapped bytes between the first guard page and the buffer.
    let before = unsafe { std::slice::from_raw_parts(before, inner - bytes) };
    assert!(before.iter().all(|&byte| byte == 0xff), "a kernel wrote before the beginning of a buffer");
    // SAFETY: exactly what `allocate` mapped, and nobody uses it any more.
    unsafe { munmap(base as *mut c_void, mapped(bytes)) }.unwrap();
}

impl Driver for Emulator {
    type Module = Module;
    type Function = Function;
    type Graph = Graph;

    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn free_bytes(&self) -> Result<u64, DriverError> {
        let used: usize = self.allocations.lock().unwrap().values().sum();
        Ok(MEMORY_BYTES - used as u64)
    }

    fn allocate(&self, bytes: usize) -> Result<Address, DriverError> {
        self.not_capturing("allocate");
        let bytes = bytes.max(1).next_multiple_of(16);
        let free = self.free_bytes()?;
        if bytes as u64 > free {
            return Err(DriverError::OutOfMemory { needed: bytes, free });
        }
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh private mapping.
        let base = unsafe { mmap_anonymous(ptr::null_mut(), mapped(bytes), flags, MapFlags::PRIVATE) }.unwrap();
        let inner = bytes.next_multiple_of(PAGE);
        // SAFETY: the mapping's first page.
        unsafe { mprotect(base, PAGE, MprotectFlags::empty()) }.unwrap();
        let last = (base as usize + PAGE + inner) as *mut c_void;
        // SAFETY: the mapping's last page.
        unsafe { mprotect(last, PAGE, MprotectFlags::empty()) }.unwrap();
        let first = (base as usize + PAGE) as *mut u8;
        // SAFETY: the pages between the two.
        unsafe { ptr::write_bytes(first, 0xff, inner) };
        let start = (base as usize + PAGE + inner - bytes) as u64;
        self.allocations.lock().unwrap().insert(start, bytes);
        Ok(Address(start))
    }

    fn free(&self, address: Address) {
        let bytes = self.allocations.lock().unwrap().remove(&address.0).expect("freed what is not allocated");
        release(address.0, bytes);
    }

    fn load(&self, file: &KernelFile, definitions: &[(&str, u32)]) -> Result<Module, DriverError> {
        let path = compile(file, definitions).map_err(|log| DriverError::Compile {
            file: file.name,
            architecture: "the host".to_owned(),
            log,
        })?;
        // SAFETY: made from this repository's sources; it has no initializers but those of C++ globals.
        let library = unsafe { Library::new(&path) }.map_err(|error| failed("dlopen", error.to_string()))?;
        Ok(Module { library: Arc::new(library), file: file.name })
    }

    fn function(&self, module: &Module, name: &'static str, shared_bytes: u32) -> Result<Function, DriverError> {
        let missing = |error: libloading::Error| failed("dlsym", format!("{} of {}: {error}", name, module.file));
        // SAFETY: the kernel's entry, whose address alone is taken.
        let entry = *unsafe { module.library.get::<*const c_void>(name) }.map_err(missing)?;
        // SAFETY: `emulator_launch` of runtime.cpp, which has this type.
        let launch = *unsafe { module.library.get::<Launch>("emulator_launch") }.map_err(missing)?;
        let (library, name) = (Arc::clone(&module.library), CString::new(name).unwrap());
        Ok(Function { _library: library, name, entry, launch, shared_bytes })
    }

    fn launch(&self, function: &Function, shape: Shape, arguments: &Arguments) -> Result<(), DriverError> {
        assert!(shape.shared_bytes <= function.shared_bytes, "{:?} was not promised {shape:?}", function.name);
        assert!(shape.grid.iter().all(|&blocks| blocks > 0), "{:?}: {shape:?}", function.name);
        let bytes = arguments.to_bytes();
        let record = || Recorded::Launch(function.clone(), shape, bytes.clone());
        self.record_or(record, || self.run(function, shape, &bytes))
    }

    fn upload(&self, to: Address, bytes: &[u8]) -> Result<(), DriverError> {
        self.not_capturing("upload");
        self.check(to, bytes.len());
        // SAFETY: the range lies within an allocation, as was just checked.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to.0 as *mut u8, bytes.len()) };
        Ok(())
    }

    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), DriverError> {
        self.not_capturing("download");
        self.check(from, bytes.len());
        // SAFETY: the range lies within an allocation, as was just checked.
        unsafe { ptr::copy_nonoverlapping(from.0 as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<(), DriverError> {
        self.record_or(
            || Recorded::Copy(to, from, bytes),
            || {
                self.copy_now(to, from, bytes);
                Ok(())
            },
        )
    }

    fn clear(&self, at: Address, bytes: usize) -> Result<(), DriverError> {
        self.record_or(
            || Recorded::Clear(at, bytes),
            || {
                self.clear_now(at, bytes);
                Ok(())
            },
        )
    }

    fn synchronize(&self) -> Result<(), DriverError> {
        Ok(())
    }

    fn begin_capture(&self) -> Result<(), DriverError> {
        let before = self.capture.lock().unwrap().replace(Vec::new());
        assert!(before.is_none(), "a capture within a capture");
        Ok(())
    }

    fn end_capture(&self) -> Result<Graph, DriverError> {
        Ok(Graph(self.capture.lock().unwrap().take().expect("no capture")))
    }

    fn replay(&self, graph: &Graph) -> Result<(), DriverError> {
        for recorded in &graph.0 {
            match recorded {
                Recorded::Launch(function, shape, arguments) => self.run(function, *shape, arguments)?,
                Recorded::Copy(to, from, bytes) => self.copy_now(*to, *from, *bytes),
                Recorded::Clear(at, bytes) => self.clear_now(*at, *bytes),
            }
        }
        Ok(())
    }
}

/// Compiles a file of kernels for the host, unless that was done before, and answers where the library lies.
fn compile(file: &KernelFile, definitions: &[(&str, u32)]) -> Result<PathBuf, String> {
    let worker = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (kernels, emulator) = (worker.join("kernels"), worker.join("tests/emulator"));
    let mut hasher = DefaultHasher::new();
    let headers = HEADERS.map(|header| kernels.join(header.name));
    let ours = ["instructions.cuh", "runtime.cpp", "mod.rs"].map(|name| emulator.join(name));
    for path in headers.iter().chain(&ours) {
        fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?.hash(&mut hasher);
    }
    (file.source, definitions).hash(&mut hasher);
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated");
    fs::create_dir_all(&directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    let stem = format!("{}-{:016x}", file.name.trim_end_matches(".cu"), hasher.finish());
    let library = directory.join(format!("{stem}.so"));
    if library.exists() {
        return Ok(library);
    }
    // Several tests may compile the same at once: each writes its own file and moves it into place.
    let scratch = tempfile::tempdir_in(&directory).map_err(|error| error.to_string())?;
    let (source, output) = (scratch.path().join(format!("{stem}.cpp")), scratch.path().join("library.so"));
    let text = format!("{}\n#include \"{}\"\n", file.source, emulator.join("runtime.cpp").display());
    fs::write(&source, text).map_err(|error| error.to_string())?;
    let mut compiler = Command::new("c++");
    compiler.args(
        "-std=c++17 -O2 -g1 -march=native -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas -shared -fPIC -pthread -fno-gnu-unique -mtls-dialect=gnu2"
            .split(' '),
    );
    compiler.arg("-I").arg(&emulator).arg("-I").arg(&kernels);
    compiler.args(definitions.iter().map(|(name, value)| format!("-D{name}={value}")));
    let finished = compiler.arg(&source).arg("-o").arg(&output).output().map_err(|error| format!("c++: {error}"))?;
    if !finished.status.success() {
        return Err(String::from_utf8_lossy(&finished.stderr).into_owned());
    }
    fs::rename(&output, &library).map_err(|error| error.to_string())?;
    Ok(library)
}
