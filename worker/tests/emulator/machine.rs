//! What the tests of kernels run on: the emulator, or with `PHALANX_TEST_GPU=1` the machine's first GPU.

use phalanx_worker::backend::cuda::{
    self,
    device::{self, Device},
    driver::{Address, Arguments, Driver, DriverError, Properties, Shape},
    kernels::KernelFile,
};

use super::emulator::{self, Emulator};

/// The device under test.
pub(crate) enum Machine {
    Emulated(Emulator),
    Gpu(Box<Device>),
}

/// A compiled file of kernels.
pub(crate) enum Module {
    Emulated(emulator::Module),
    Gpu(device::Module),
}

/// A kernel.
pub(crate) enum Function {
    Emulated(emulator::Function),
    Gpu(device::Function),
}

/// Recorded work.
pub(crate) enum Graph {
    Emulated(emulator::Graph),
    Gpu(device::Graph),
}

/// Whether a real GPU is asked for.
pub(crate) fn on_gpu() -> bool {
    std::env::var_os("PHALANX_TEST_GPU").is_some_and(|value| !value.is_empty() && value != "0")
}

impl Machine {
    /// A device. An emulated one shares a grid's blocks over `threads` threads and runs them last to first if told so; a
    /// real one has its own order.
    pub(crate) fn new(threads: u32, backwards: bool) -> Self {
        match on_gpu() {
            true => Self::Gpu(Box::new(cuda::open(0).unwrap_or_else(|error| panic!("PHALANX_TEST_GPU: {error}")))),
            false => Self::Emulated(Emulator::with_order(threads, backwards)),
        }
    }

    /// Whether it is emulated and runs last to first.
    #[allow(dead_code, reason = "not every test that uses a machine asks")]
    pub(crate) fn backwards(&self) -> bool {
        matches!(self, Self::Emulated(emulator) if emulator.backwards())
    }
}

/// Calls the same function of whichever device it is.
macro_rules! either {
    ($machine:expr, $device:ident => $call:expr) => {
        match $machine {
            Machine::Emulated($device) => $call,
            Machine::Gpu($device) => $call,
        }
    };
}

impl Driver for Machine {
    type Module = Module;
    type Function = Function;
    type Graph = Graph;

    fn properties(&self) -> &Properties {
        either!(self, device => device.properties())
    }

    fn free_bytes(&self) -> Result<u64, DriverError> {
        either!(self, device => device.free_bytes())
    }

    fn allocate(&self, bytes: usize) -> Result<Address, DriverError> {
        match self {
            Self::Emulated(emulator) => emulator.allocate(bytes),
            Self::Gpu(device) => {
                let address = device.allocate(bytes)?;
                // Poison, as the emulator's memory is.
                device.upload(address, &vec![0xff; bytes])?;
                Ok(address)
            }
        }
    }

    fn free(&self, address: Address) {
        either!(self, device => device.free(address));
    }

    fn load(&self, file: &KernelFile, definitions: &[(&str, u32)]) -> Result<Module, DriverError> {
        match self {
            Self::Emulated(emulator) => emulator.load(file, definitions).map(Module::Emulated),
            Self::Gpu(device) => device.load(file, definitions).map(Module::Gpu),
        }
    }

    fn function(&self, module: &Module, name: &'static str, shared_bytes: u32) -> Result<Function, DriverError> {
        match (self, module) {
            (Self::Emulated(emulator), Module::Emulated(module)) => {
                emulator.function(module, name, shared_bytes).map(Function::Emulated)
            }
            (Self::Gpu(device), Module::Gpu(module)) => device.function(module, name, shared_bytes).map(Function::Gpu),
            _ => panic!("{name} was compiled for another device"),
        }
    }

    fn launch(&self, function: &Function, shape: Shape, arguments: &Arguments) -> Result<(), DriverError> {
        match (self, function) {
            (Self::Emulated(emulator), Function::Emulated(function)) => emulator.launch(function, shape, arguments),
            (Self::Gpu(device), Function::Gpu(function)) => device.launch(function, shape, arguments),
            _ => panic!("a kernel of another device"),
        }
    }

    fn upload(&self, to: Address, bytes: &[u8]) -> Result<(), DriverError> {
        either!(self, device => device.upload(to, bytes))
    }

    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), DriverError> {
        either!(self, device => device.download(from, bytes))
    }

    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<(), DriverError> {
        either!(self, device => device.copy(to, from, bytes))
    }

    fn clear(&self, at: Address, bytes: usize) -> Result<(), DriverError> {
        either!(self, device => device.clear(at, bytes))
    }

    fn synchronize(&self) -> Result<(), DriverError> {
        either!(self, device => device.synchronize())
    }

    fn begin_capture(&self) -> Result<(), DriverError> {
        either!(self, device => device.begin_capture())
    }

    fn end_capture(&self) -> Result<Graph, DriverError> {
        match self {
            Self::Emulated(emulator) => emulator.end_capture().map(Graph::Emulated),
            Self::Gpu(device) => device.end_capture().map(Graph::Gpu),
        }
    }

    fn replay(&self, graph: &Graph) -> Result<(), DriverError> {
        match (self, graph) {
            (Self::Emulated(emulator), Graph::Emulated(graph)) => emulator.replay(graph),
            (Self::Gpu(device), Graph::Gpu(graph)) => device.replay(graph),
            _ => panic!("a graph of another device"),
        }
    }
}
