//! The few functions of NVRTC that compile a kernel: our own binding, since it must be found at run time and a missing
//! library must be a value.

#![allow(unsafe_code, reason = "calls of a C library")]

use std::{
    ffi::{CStr, CString, NulError},
    os::raw::{c_char, c_int},
    ptr,
};

use thiserror::Error;

use super::library::{self, LibraryError, Loaded, NVRTC};

/// `nvrtcResult`: 0 is success.
type Code = c_int;
/// `nvrtcProgram`: an opaque pointer.
type Program = *mut u8;

/// Why nothing was compiled.
#[derive(Debug, Error)]
pub enum CompileError {
    /// The compiler is not there.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// The source is wrong, or the compiler does not know the architecture; its log says which.
    #[error("{0}")]
    Rejected(String),
    /// The compiler itself failed.
    #[error("{call}: {message}")]
    Call {
        /// What was called.
        call: &'static str,
        /// What the compiler said.
        message: String,
    },
    /// A source, name or option holds a zero byte.
    #[error("a zero byte in what is to be compiled: {0}")]
    Zero(#[from] NulError),
}

/// What is compiled.
#[derive(Debug)]
pub struct Unit<'a> {
    /// The source's name, for messages.
    pub name: &'a str,
    /// The source.
    pub source: &'a str,
    /// Names and texts of what it may include.
    pub headers: &'a [(&'a str, &'a str)],
    /// Options as on a command line.
    pub options: &'a [String],
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// Machine code in ELF, as the driver loads it.
    pub cubin: Vec<u8>,
    /// What compiler and assembler said: warnings, registers, spills.
    pub log: String,
}

/// The loaded compiler.
pub struct Nvrtc {
    /// Where it lies.
    pub path: std::path::PathBuf,
    /// Such as `(12, 9)`.
    pub version: (u32, u32),
    error_string: unsafe extern "C" fn(Code) -> *const c_char,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Code,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Code,
    destroy: unsafe extern "C" fn(*mut Program) -> Code,
    log_size: SizeOf,
    log: BytesOf,
    cubin_size: SizeOf,
    cubin: BytesOf,
    /// Keeps the functions where they are.
    _library: Loaded,
}

type SizeOf = unsafe extern "C" fn(Program, *mut usize) -> Code;
type BytesOf = unsafe extern "C" fn(Program, *mut c_char) -> Code;

/// `NVRTC_ERROR_INVALID_OPTION` and `NVRTC_ERROR_COMPILATION`: the log says more than the code.
const REJECTED: [Code; 2] = [5, 6];

/// A program that ends with its scope.
struct Owned<'a>(&'a Nvrtc, Program);

impl Drop for Owned<'_> {
    fn drop(&mut self) {
        // SAFETY: the program was created by `create` and is destroyed this once.
        unsafe { (self.0.destroy)(&raw mut self.1) };
    }
}

impl Nvrtc {
    /// Loads the compiler.
    ///
    /// # Errors
    /// When it is not on this machine or is no NVRTC.
    pub fn open() -> Result<Self, CompileError> {
        Self::of(library::open(&NVRTC)?)
    }

    /// The compiler in a loaded library.
    ///
    /// # Errors
    /// When a function is missing.
    pub fn of(library: Loaded) -> Result<Self, CompileError> {
        /// Looks a function of the given type up; its type is the one in `nvrtc.h`.
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the field or binding that takes it has the type that `nvrtc.h` declares.
                unsafe { library.function($name) }?
            };
        }
        let version_of: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Code = function!("nvrtcVersion");
        let (mut major, mut minor) = (0, 0);
        // SAFETY: two places for the two numbers.
        unsafe { version_of(&raw mut major, &raw mut minor) };
        Ok(Self {
            path: library.path.clone(),
            version: (major.unsigned_abs(), minor.unsigned_abs()),
            error_string: function!("nvrtcGetErrorString"),
            create: function!("nvrtcCreateProgram"),
            compile: function!("nvrtcCompileProgram"),
            destroy: function!("nvrtcDestroyProgram"),
            log_size: function!("nvrtcGetProgramLogSize"),
            log: function!("nvrtcGetProgramLog"),
            cubin_size: function!("nvrtcGetCUBINSize"),
            cubin: function!("nvrtcGetCUBIN"),
            _library: library,
        })
    }

    /// Compiles to machine code.
    ///
    /// # Errors
    /// When the source or an option is not accepted, or the compiler fails.
    pub fn compile(&self, unit: &Unit<'_>) -> Result<Compiled, CompileError> {
        let program = self.program(unit)?;
        let options = strings(unit.options.iter().map(String::as_str))?;
        let pointers = pointers(&options);
        // SAFETY: the program lives, and so do the options, as many as are said.
        let code = unsafe { (self.compile)(program.1, pointers.len() as c_int, pointers.as_ptr()) };
        let log = self.bytes(&program, "nvrtcGetProgramLog", self.log_size, self.log)?;
        let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned();
        match code {
            0 => {}
            code if REJECTED.contains(&code) && !log.is_empty() => return Err(CompileError::Rejected(log)),
            code => {
                let Err(CompileError::Call { call, message }) = self.check("nvrtcCompileProgram", code) else {
                    return Err(CompileError::Rejected(log));
                };
                let message = if log.is_empty() { message } else { format!("{message}; {log}") };
                return Err(CompileError::Call { call, message });
            }
        }
        let cubin = self.bytes(&program, "nvrtcGetCUBIN", self.cubin_size, self.cubin)?;
        Ok(Compiled { cubin, log })
    }

    fn program(&self, unit: &Unit<'_>) -> Result<Owned<'_>, CompileError> {
        let (source, name) = (CString::new(unit.source)?, CString::new(unit.name)?);
        let names = strings(unit.headers.iter().map(|(name, _)| *name))?;
        let texts = strings(unit.headers.iter().map(|(_, text)| *text))?;
        let (names, texts) = (pointers(&names), pointers(&texts));
        let mut program = ptr::null_mut();
        let count = names.len() as c_int;
        // SAFETY: every string lives until the call returns, which copies them, and the counts are right.
        let code = unsafe {
            (self.create)(&raw mut program, source.as_ptr(), name.as_ptr(), count, texts.as_ptr(), names.as_ptr())
        };
        self.check("nvrtcCreateProgram", code)?;
        Ok(Owned(self, program))
    }

    fn bytes(
        &self,
        program: &Owned<'_>,
        call: &'static str,
        size_of: SizeOf,
        bytes_of: BytesOf,
    ) -> Result<Vec<u8>, CompileError> {
        let mut size = 0;
        // SAFETY: the program lives, and there is a place for the size.
        self.check(call, unsafe { size_of(program.1, &raw mut size) })?;
        let mut bytes = vec![0_u8; size];
        // SAFETY: as many bytes as were just asked for.
        self.check(call, unsafe { bytes_of(program.1, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }

    fn check(&self, call: &'static str, code: Code) -> Result<(), CompileError> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: it answers with a text for any code.
        let text = unsafe { (self.error_string)(code) };
        // SAFETY: a string that lives as long as the library.
        let text = (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned());
        Err(CompileError::Call { call, message: text.unwrap_or_else(|| format!("code {code}")) })
    }
}

fn strings<'a>(texts: impl Iterator<Item = &'a str>) -> Result<Vec<CString>, NulError> {
    texts.map(CString::new).collect()
}

/// The strings' addresses; they are valid as long as the strings.
fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).collect()
}
