//! Memory from the system for weights and the KV cache: zeroed, page-aligned, in huge pages where the system has them.

use std::{
    ops::{Deref, DerefMut},
    ptr::NonNull,
};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::backend::BackendError;

/// What `MADV_HUGEPAGE` works in.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Plain numbers: no padding, no drop, and all bits zero is a value.
///
/// # Safety
/// The type must be so, and its alignment at most a page's.
pub(crate) unsafe trait Plain: Copy + Send + Sync {}

// SAFETY: arrays of numbers.
unsafe impl<const N: usize> Plain for [f32; N] {}
// SAFETY: arrays of numbers.
unsafe impl<const N: usize> Plain for [u32; N] {}
// SAFETY: arrays of numbers.
unsafe impl<const N: usize> Plain for [u8; N] {}

/// A slice in memory of its own. Pages that were never written take no memory.
pub(crate) struct Slab<T: Plain> {
    start: NonNull<T>,
    len: usize,
    /// The whole mapping, which begins up to a huge page before `start`.
    mapping: NonNull<std::ffi::c_void>,
    mapped_bytes: usize,
}

// SAFETY: the mapping belongs to the slab alone, and `Plain` values may be sent.
unsafe impl<T: Plain> Send for Slab<T> {}
// SAFETY: a shared slab can only be read, and `Plain` values may be shared.
unsafe impl<T: Plain> Sync for Slab<T> {}

impl<T: Plain> Slab<T> {
    /// `len` zeroed values; `what` names them in the error.
    pub(crate) fn zeroed(what: &str, len: usize) -> Result<Self, BackendError> {
        let out_of_memory = |needed: u64| BackendError::OutOfMemory {
            what: what.to_owned(),
            needed,
            available: available_bytes().unwrap_or(0),
        };
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| out_of_memory(u64::MAX))?;
        if available_bytes().is_some_and(|available| bytes as u64 > available) {
            return Err(out_of_memory(bytes as u64));
        }
        // Room to move the start to a huge page; the slack is never touched and so costs nothing. What fills half of its
        // last huge page gets all of it: decoding reads more small matrices than the address cache has small pages for.
        let slack = if bytes >= HUGE_PAGE_BYTES / 2 { HUGE_PAGE_BYTES } else { 0 };
        let advised = if bytes % HUGE_PAGE_BYTES >= HUGE_PAGE_BYTES / 2 {
            bytes.next_multiple_of(HUGE_PAGE_BYTES)
        } else {
            bytes
        };
        let mapped_bytes = bytes.max(1).max(advised) + slack;
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
        let mapped = unsafe { mmap_anonymous(std::ptr::null_mut(), mapped_bytes, access, flags) };
        let mapping = mapped.ok().and_then(NonNull::new).ok_or_else(|| out_of_memory(bytes as u64))?;
        let offset = if slack > 0 { mapping.as_ptr().align_offset(HUGE_PAGE_BYTES).min(slack) } else { 0 };
        let start = mapping.map_addr(|address| address.saturating_add(offset));
        if slack > 0 {
            // Without huge pages all works, only slower: the answer does not matter.
            // SAFETY: the range lies within the new mapping, and the advice changes no content.
            let _ = unsafe { madvise(start.as_ptr(), advised, Advice::LinuxHugepage) };
        }
        Ok(Self { start: start.cast(), len, mapping, mapped_bytes })
    }

    /// Bytes of the values.
    pub(crate) fn bytes(&self) -> usize {
        size_of_val::<[T]>(self)
    }
}

impl<T: Plain> Deref for Slab<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` values from `start` are mapped, aligned, zeroed or written, and only written through `&mut self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Slab<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as for `deref`, and `&mut self` is the only access.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T: Plain> Drop for Slab<T> {
    fn drop(&mut self) {
        // It can fail only for a range that was never mapped.
        // SAFETY: the mapping is this slab's own, and no borrow of it outlives the slab.
        let _ = unsafe { munmap(self.mapping.as_ptr(), self.mapped_bytes) };
    }
}

/// Memory that the system says it can still give, where it says so.
fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
