//! A real GPU behind [`Driver`].
//!
//! One non-blocking stream of the primary context takes everything in order. Nothing here waits but downloads,
//! [`Driver::synchronize`] and [`Driver::free`]; what the stream runs may itself wait for other ranks, and then ends when
//! their collective is aborted.

#![allow(unsafe_code, reason = "calls of the driver")]

use std::{
    ffi::CString,
    os::raw::{c_int, c_void},
    ptr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cudarc::driver::sys;
use tracing::{debug, warn};

use super::{
    calls::{Ordinal, check},
    compiler::{self, CompileError, Compiler},
    context::Context,
    driver::{Address, Arguments, Driver, DriverError, Properties, Shape},
    kernels::KernelFile,
    staging::{PIECE_BYTES, Pinned, Staging},
};

/// Dynamic shared memory that a kernel may have without being promised more.
const USUAL_SHARED_BYTES: u32 = 48 << 10;
/// Page-locked memory for downloads, bytes: some rows of logits. Longer ones come in pieces.
const DOWNLOAD_BYTES: usize = 4 << 20;

/// A GPU.
pub struct Device {
    properties: Properties,
    architecture: String,
    compiler: Compiler,
    /// The version of CUDA that the driver knows.
    driver_version: (u32, u32),
    uploads: Mutex<Staging>,
    downloads: Mutex<Pinned>,
    capture: Mutex<Capture>,
    context: Arc<Context>,
}

/// Whether launches are recorded.
#[derive(Default)]
struct Capture {
    active: bool,
    /// Memory that was given back meanwhile: freeing it would break the capture.
    freed: Vec<Address>,
}

/// A compiled file of kernels on the device.
pub struct Module(Arc<LoadedModule>);

struct LoadedModule {
    context: Arc<Context>,
    file: &'static str,
    module: sys::CUmodule,
}

// SAFETY: the driver's handles may be used by any thread.
unsafe impl Send for LoadedModule {}
// SAFETY: as above.
unsafe impl Sync for LoadedModule {}

impl Drop for LoadedModule {
    fn drop(&mut self) {
        // A kernel of it may still run. If the device is broken, the module goes with the process.
        if self.context.bind().is_ok() && self.context.synchronize().is_ok() {
            // SAFETY: loaded once, unloaded this once, and nothing of it runs.
            unsafe { sys::cuModuleUnload(self.module) };
        }
    }
}

/// A kernel on the device.
pub struct Function {
    name: &'static str,
    function: sys::CUfunction,
    /// Dynamic shared memory that it was promised.
    shared_bytes: u32,
    /// Keeps the function where it is.
    _module: Arc<LoadedModule>,
}

// SAFETY: the driver's handles may be used by any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// Recorded work, ready to run.
///
/// The memory and the kernels that it was recorded with must outlive it.
pub struct Graph {
    context: Arc<Context>,
    graph: sys::CUgraphExec,
}

// SAFETY: the driver's handles may be used by any thread; launches of one graph are ordered by the one stream.
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: made once, destroyed this once; the driver lets what runs of it end first.
            unsafe { sys::cuGraphExecDestroy(self.graph) };
        }
    }
}

fn failed(call: &'static str, message: String) -> DriverError {
    DriverError::Call { call, message }
}

/// Adds to an error of the driver what the call was for.
fn told(error: DriverError, what: String) -> DriverError {
    match error {
        DriverError::Call { call, message } => failed(call, format!("{message} ({what})")),
        other => other,
    }
}

/// Why a file of kernels was not compiled.
fn not_compiled(error: CompileError, file: &KernelFile, architecture: &str) -> DriverError {
    match error {
        CompileError::Call { call, message } => DriverError::Call { call, message },
        error => {
            DriverError::Compile { file: file.name, architecture: architecture.to_owned(), log: error.to_string() }
        }
    }
}

impl Device {
    /// Makes a device ready. The driver is initialized.
    pub(super) fn new(device: Ordinal, compiler: Compiler, driver_version: (u32, u32)) -> Result<Self, DriverError> {
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as SHARED_BYTES,
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as MULTIPROCESSORS,
        };
        let compute_capability = device.compute_capability()?;
        let properties = Properties {
            name: device.name()?,
            compute_capability,
            multiprocessors: device.attribute(MULTIPROCESSORS)?,
            shared_bytes: device.attribute(SHARED_BYTES)?,
            memory_bytes: device.memory_bytes()?,
        };
        let context = Arc::new(Context::new(device)?);
        let architecture = compiler::architecture(compute_capability);
        let uploads = Mutex::new(Staging::new(&context)?);
        let downloads = Mutex::new(Pinned::new(&context, DOWNLOAD_BYTES)?);
        let capture = Mutex::default();
        Ok(Self { properties, architecture, compiler, driver_version, uploads, downloads, capture, context })
    }

    fn capture(&self) -> MutexGuard<'_, Capture> {
        self.capture.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the context current for a call that a capture would neither record nor survive.
    fn bind_outside_capture(&self, call: &'static str) -> Result<(), DriverError> {
        match self.capture().active {
            true => Err(failed(call, "not while a capture records".to_owned())),
            false => self.context.bind(),
        }
    }

    fn free_now(&self, address: Address) {
        // Kernels that were told before may still use the memory, and `cuMemFree` promises no order.
        let freed = self.context.bind().and_then(|()| self.context.synchronize()).and_then(|()| {
            // SAFETY: `allocate` answered with it, and nothing that runs uses it.
            check("cuMemFree", unsafe { sys::cuMemFree_v2(address.0) })
        });
        if let Err(error) = freed {
            warn!(%error, "device memory was not freed");
        }
    }

    /// What to say of a cubin that the driver refuses.
    fn why_not_loaded(&self, file: &KernelFile) -> String {
        let ((ours, _), (theirs, minor)) = (self.compiler.version(), self.driver_version);
        let path = self.compiler.path().display();
        match ours > theirs {
            true => format!(
                "{path} is of CUDA {ours}, the driver of {theirs}.{minor}: install NVRTC {theirs} or a newer driver"
            ),
            false => format!("{} for {}", file.name, self.architecture),
        }
    }

    /// Ends the stream's capture whatever became of it.
    fn stop_capture(&self) -> Result<sys::CUgraph, DriverError> {
        let mut graph = ptr::null_mut();
        // SAFETY: a place for the handle; the stream lives.
        check("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(self.context.stream, &raw mut graph) })?;
        Ok(graph)
    }

    fn instantiate(&self, recorded: sys::CUgraph) -> Result<Graph, DriverError> {
        let mut graph = ptr::null_mut();
        // SAFETY: a place for the handle; the recorded graph lives.
        let code = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut graph, recorded, 0) };
        // SAFETY: made by the capture, destroyed this once; what was instantiated does not depend on it.
        unsafe { sys::cuGraphDestroy(recorded) };
        check("cuGraphInstantiate", code)?;
        let graph = Graph { context: Arc::clone(&self.context), graph };
        // What the first replay would do otherwise.
        // SAFETY: graph and stream live.
        check("cuGraphUpload", unsafe { sys::cuGraphUpload(graph.graph, self.context.stream) })?;
        Ok(graph)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Page-locked memory is freed next; each of them waits by itself, and here a broken device is told once.
        if let Err(error) = self.context.bind().and_then(|()| self.context.synchronize()) {
            debug!(%error, "the device ends with an error");
        }
    }
}

impl Driver for Device {
    type Module = Module;
    type Function = Function;
    type Graph = Graph;

    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn free_bytes(&self) -> Result<u64, DriverError> {
        Ok(self.context.memory()?.0)
    }

    /// Memory of `cuMemAlloc` and not of a stream's pool: other processes can open it, and NCCL can register it.
    fn allocate(&self, bytes: usize) -> Result<Address, DriverError> {
        self.bind_outside_capture("cuMemAlloc")?;
        let mut address = 0;
        // SAFETY: a place for the address; the context is current.
        match unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes.max(1)) } {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                Err(DriverError::OutOfMemory { needed: bytes, free: self.free_bytes()? })
            }
            code => check("cuMemAlloc", code).map(|()| Address(address)),
        }
    }

    fn free(&self, address: Address) {
        let mut capture = self.capture();
        match capture.active {
            true => capture.freed.push(address),
            false => self.free_now(address),
        }
    }

    fn load(&self, file: &KernelFile, definitions: &[(&str, u32)]) -> Result<Module, DriverError> {
        self.bind_outside_capture("cuModuleLoadData")?;
        let compiled = self.compiler.compile(file, definitions, &self.architecture);
        let compiled = compiled.map_err(|error| not_compiled(error, file, &self.architecture))?;
        let mut module = ptr::null_mut();
        // SAFETY: the whole ELF image that the compiler made, which the call copies.
        let code = unsafe { sys::cuModuleLoadData(&raw mut module, compiled.cubin.as_ptr().cast()) };
        check("cuModuleLoadData", code).map_err(|error| told(error, self.why_not_loaded(file)))?;
        Ok(Module(Arc::new(LoadedModule { context: Arc::clone(&self.context), file: file.name, module })))
    }

    fn function(&self, module: &Module, name: &'static str, shared_bytes: u32) -> Result<Function, DriverError> {
        use sys::CUfunction_attribute_enum::{
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as SHARED_BYTES, CU_FUNC_ATTRIBUTE_NUM_REGS as REGISTERS,
        };
        self.bind_outside_capture("cuModuleGetFunction")?;
        let Module(module) = module;
        let place = || format!("{name} of {}", module.file);
        let symbol = CString::new(name).map_err(|error| failed("cuModuleGetFunction", error.to_string()))?;
        let mut function = ptr::null_mut();
        // SAFETY: a place for the handle; module and name live.
        let code = unsafe { sys::cuModuleGetFunction(&raw mut function, module.module, symbol.as_ptr()) };
        check("cuModuleGetFunction", code).map_err(|error| told(error, place()))?;
        if shared_bytes > USUAL_SHARED_BYTES {
            // SAFETY: the function lives.
            let code = unsafe { sys::cuFuncSetAttribute(function, SHARED_BYTES, shared_bytes as c_int) };
            let limit = self.properties.shared_bytes;
            let limits = || format!("{} with {shared_bytes} bytes of shared memory, the device has {limit}", place());
            check("cuFuncSetAttribute", code).map_err(|error| told(error, limits()))?;
        }
        let mut registers = 0;
        // The driver loads functions lazily; being asked for a number it does so now rather than within a capture.
        // SAFETY: a place for the number; the function lives.
        check("cuFuncGetAttribute", unsafe { sys::cuFuncGetAttribute(&raw mut registers, REGISTERS, function) })?;
        debug!(name, registers, shared_bytes, "kernel ready");
        Ok(Function { name, function, shared_bytes, _module: Arc::clone(module) })
    }

    fn launch(&self, function: &Function, shape: Shape, arguments: &Arguments) -> Result<(), DriverError> {
        if shape.shared_bytes > function.shared_bytes {
            let (name, promised) = (function.name, function.shared_bytes);
            return Err(failed(
                "cuLaunchKernel",
                format!("{name} was promised {promised} bytes of shared memory: {shape:?}"),
            ));
        }
        self.context.bind()?;
        let mut bytes = arguments.to_bytes();
        let mut length = bytes.len();
        let mut extra: [*mut c_void; 5] = [
            ptr::without_provenance_mut(sys::CU_LAUNCH_PARAM_BUFFER_POINTER_AS_INT as usize),
            bytes.as_mut_ptr().cast(),
            ptr::without_provenance_mut(sys::CU_LAUNCH_PARAM_BUFFER_SIZE_AS_INT as usize),
            (&raw mut length).cast(),
            ptr::without_provenance_mut(sys::CU_LAUNCH_PARAM_END_AS_INT as usize),
        ];
        let ([x, y, z], stream, shared) = (shape.grid, self.context.stream, shape.shared_bytes);
        let extra = extra.as_mut_ptr();
        // SAFETY: the arguments are copied by the call; that they fit the kernel is checked for every launch by the
        // emulator, which runs the same launches in tests.
        let code = unsafe {
            sys::cuLaunchKernel(function.function, x, y, z, shape.threads, 1, 1, shared, stream, ptr::null_mut(), extra)
        };
        check("cuLaunchKernel", code).map_err(|error| told(error, format!("{}, {shape:?}", function.name)))
    }

    fn upload(&self, to: Address, bytes: &[u8]) -> Result<(), DriverError> {
        self.bind_outside_capture("cuMemcpyHtoDAsync")?;
        let mut staging = self.uploads.lock().unwrap_or_else(PoisonError::into_inner);
        let mut pieces = bytes.chunks(PIECE_BYTES).enumerate();
        pieces.try_for_each(|(i, piece)| staging.send(to.offset(i * PIECE_BYTES), piece))
    }

    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), DriverError> {
        self.bind_outside_capture("cuMemcpyDtoHAsync")?;
        let mut memory = self.downloads.lock().unwrap_or_else(PoisonError::into_inner);
        let length = memory.len();
        for (i, piece) in bytes.chunks_mut(length).enumerate() {
            memory.receive(from.offset(i * length), piece.len())?;
            self.context.synchronize()?;
            memory.read(piece);
        }
        Ok(())
    }

    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<(), DriverError> {
        if bytes == 0 {
            return Ok(());
        }
        self.context.bind()?;
        // SAFETY: device memory on both sides; the driver refuses addresses that are not.
        let code = unsafe { sys::cuMemcpyDtoDAsync_v2(to.0, from.0, bytes, self.context.stream) };
        check("cuMemcpyDtoDAsync", code)
    }

    fn clear(&self, at: Address, bytes: usize) -> Result<(), DriverError> {
        if bytes == 0 {
            return Ok(());
        }
        self.context.bind()?;
        // SAFETY: device memory; the driver refuses an address that is not.
        check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(at.0, 0, bytes, self.context.stream) })
    }

    fn synchronize(&self) -> Result<(), DriverError> {
        self.bind_outside_capture("cuStreamSynchronize")?;
        self.context.synchronize()
    }

    /// Whatever fails within, [`Driver::end_capture`] must follow, or the device does nothing any more.
    fn begin_capture(&self) -> Result<(), DriverError> {
        self.bind_outside_capture("cuStreamBeginCapture")?;
        // Other threads may go on calling the driver: a peer's allocation must not break this capture.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives and is not capturing.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(self.context.stream, mode) })?;
        self.capture().active = true;
        Ok(())
    }

    /// Must be called by the thread that began the capture.
    fn end_capture(&self) -> Result<Graph, DriverError> {
        self.context.bind()?;
        let recorded = self.stop_capture();
        let freed = {
            let mut capture = self.capture();
            capture.active = false;
            std::mem::take(&mut capture.freed)
        };
        let graph = recorded.and_then(|recorded| self.instantiate(recorded));
        freed.into_iter().for_each(|address| self.free_now(address));
        graph
    }

    fn replay(&self, graph: &Graph) -> Result<(), DriverError> {
        self.bind_outside_capture("cuGraphLaunch")?;
        // SAFETY: graph and stream live; what the graph uses outlives it, as its owner promises.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(graph.graph, self.context.stream) })
    }
}
