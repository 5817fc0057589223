//! Device memory: buffers that give themselves back, and a pool of them for activations.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use super::driver::{Address, Driver, DriverError};

/// Device memory of one owner.
pub(super) struct Buffer<D: Driver> {
    driver: Arc<D>,
    address: Address,
    bytes: usize,
}

impl<D: Driver> Buffer<D> {
    /// Memory whose contents are undefined.
    pub(super) fn new(driver: &Arc<D>, bytes: usize) -> Result<Self, DriverError> {
        let address = driver.allocate(bytes)?;
        Ok(Self { driver: Arc::clone(driver), address, bytes })
    }

    /// Memory that holds `bytes`.
    pub(super) fn holding(driver: &Arc<D>, bytes: &[u8]) -> Result<Self, DriverError> {
        let buffer = Self::new(driver, bytes.len())?;
        driver.upload(buffer.address, bytes)?;
        Ok(buffer)
    }

    pub(super) fn address(&self) -> Address {
        self.address
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl<D: Driver> Drop for Buffer<D> {
    fn drop(&mut self) {
        self.driver.free(self.address);
    }
}

/// Buffers for activations. What is given back is given out again, so that after the first steps nothing is allocated,
/// and a step that does the same as one before gets the same addresses.
pub(super) struct Pool<D: Driver> {
    driver: Arc<D>,
    unused: Mutex<HashMap<usize, Vec<Buffer<D>>>>,
}

/// A buffer of a pool, to which it returns.
pub(super) struct Pooled<D: Driver> {
    pool: Arc<Pool<D>>,
    /// Present until it is dropped.
    buffer: Option<Buffer<D>>,
}

/// Sizes are rounded up so that batches of similar sizes share buffers.
fn class(bytes: usize) -> usize {
    let step = (bytes.next_power_of_two() / 8).max(256);
    bytes.next_multiple_of(step)
}

impl<D: Driver> Pool<D> {
    pub(super) fn new(driver: &Arc<D>) -> Arc<Self> {
        Arc::new(Self { driver: Arc::clone(driver), unused: Mutex::default() })
    }

    /// At least `bytes`, with undefined contents.
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Result<Pooled<D>, DriverError> {
        let class = class(bytes);
        let unused = self.unused.lock().unwrap_or_else(PoisonError::into_inner).get_mut(&class).and_then(Vec::pop);
        let buffer = match unused {
            Some(buffer) => buffer,
            None => Buffer::new(&self.driver, class)?,
        };
        Ok(Pooled { pool: Arc::clone(self), buffer: Some(buffer) })
    }
}

impl<D: Driver> Pooled<D> {
    pub(super) fn address(&self) -> Address {
        self.buffer.as_ref().map_or(Address(0), Buffer::address)
    }
}

impl<D: Driver> Drop for Pooled<D> {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            let mut unused = self.pool.unused.lock().unwrap_or_else(PoisonError::into_inner);
            unused.entry(buffer.bytes()).or_default().push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::class;

    #[test]
    fn similar_sizes_share_a_class_and_little_is_wasted() {
        assert_eq!(class(1), 256);
        assert_eq!(class(257), 512);
        assert_eq!(class(1 << 20), 1 << 20);
        for bytes in (1000..5_000_000).step_by(997) {
            assert!(class(bytes) >= bytes && class(bytes) <= bytes + (bytes / 4).max(256), "{bytes}");
        }
    }
}
