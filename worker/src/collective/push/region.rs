//! How the memory that a rank exports to its peers is laid out: one channel for sums, one for small exchanges.

use super::{MAX_WORLD, PushError};

/// Bytes that one block of a small exchange moves: four for each of its threads' sixteen-byte words would be 24 KB, but
/// more blocks of less are quicker.
pub const GATHER_ROW_BYTES: usize = 4096;

/// Devices give out memory at multiples of this, and channels begin at them too.
const ALIGNMENT: usize = 256;

/// The part of a region for one kind of call: `rows` independent exchanges of up to `row_bytes` a rank.
///
/// `slots [2][world][rows][row_bytes]`, `flags u32 [2][world][rows]`, which peers write; then, for the rank alone,
/// `calls u32 [rows]` and `failed u32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Channel {
    offset: usize,
    world_size: usize,
    rows: usize,
    row_bytes: usize,
}

impl Channel {
    /// Rows, which is to say blocks, that a call may have.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Bytes from the region's start to the channel's.
    pub(super) fn offset(&self) -> usize {
        self.offset
    }

    fn flags_offset(&self) -> usize {
        2 * self.world_size * self.rows * self.row_bytes
    }

    /// Bytes from the channel's start to `calls`.
    pub fn calls_offset(&self) -> usize {
        (self.flags_offset() + 4 * 2 * self.world_size * self.rows).next_multiple_of(ALIGNMENT)
    }

    /// Bytes from the channel's start to `failed`.
    pub fn failed_offset(&self) -> usize {
        self.calls_offset() + 4 * self.rows
    }

    /// Bytes from the region's start to what follows the channel.
    fn end(&self) -> usize {
        (self.offset + self.failed_offset() + 4).next_multiple_of(ALIGNMENT)
    }
}

/// A rank's exported memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    hidden: usize,
    sums: Channel,
    gathers: Channel,
}

impl Region {
    /// For sums of up to `rows` rows of `hidden` values and exchanges of up to `gather_bytes` bytes a rank, on devices
    /// with so many multiprocessors.
    ///
    /// # Errors
    /// When there are too many ranks or rows, or rows that do not divide into messages.
    pub fn new(
        world_size: usize,
        hidden: usize,
        rows: usize,
        gather_bytes: usize,
        multiprocessors: usize,
    ) -> Result<Self, PushError> {
        if !(1..=MAX_WORLD).contains(&world_size) {
            return Err(PushError::World(world_size));
        }
        if hidden == 0 || !hidden.is_multiple_of(8) {
            return Err(PushError::Hidden(hidden));
        }
        let gather_rows = gather_bytes.div_ceil(GATHER_ROW_BYTES).max(1);
        for rows in [rows, gather_rows] {
            if !(1..=multiprocessors).contains(&rows) {
                return Err(PushError::Rows { rows, multiprocessors });
            }
        }
        // A slot has room for f32, of which bf16 use half.
        let sums = Channel { offset: 0, world_size, rows, row_bytes: 4 * hidden };
        let gathers = Channel { offset: sums.end(), world_size, rows: gather_rows, row_bytes: GATHER_ROW_BYTES };
        Ok(Self { hidden, sums, gathers })
    }

    /// Ranks that push to each other.
    pub fn world_size(&self) -> usize {
        self.sums.world_size
    }

    /// Bytes of device memory, to be cleared before any peer knows of them.
    pub fn bytes(&self) -> usize {
        self.gathers.end()
    }

    /// What `all_reduce.cu` is compiled with.
    pub fn definitions(&self) -> [(&'static str, u32); 2] {
        [("WORLD", self.sums.world_size as u32), ("HIDDEN", self.hidden as u32)]
    }

    /// The channel for sums.
    pub fn sums(&self) -> &Channel {
        &self.sums
    }

    /// The channel for small exchanges.
    pub fn gathers(&self) -> &Channel {
        &self.gathers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_do_not_overlap_and_slots_hold_f32() {
        let region = Region::new(4, 2880, 64, 20_000, 108).unwrap();
        assert_eq!(region.sums.row_bytes, 11_520);
        assert_eq!(region.sums.calls_offset(), 2 * 4 * 64 * 11_520 + 2 * 4 * 64 * 4);
        assert_eq!(region.gathers.rows, 5);
        assert_eq!(region.gathers.offset, (region.sums.calls_offset() + 65 * 4).next_multiple_of(256));
        assert_eq!(region.bytes(), region.gathers.end());
    }

    #[test]
    fn shapes_that_the_kernels_cannot_serve_are_refused() {
        assert_eq!(Region::new(9, 2880, 1, 0, 108), Err(PushError::World(9)));
        assert_eq!(Region::new(0, 2880, 1, 0, 108), Err(PushError::World(0)));
        assert_eq!(Region::new(2, 2884, 1, 0, 108), Err(PushError::Hidden(2884)));
        assert_eq!(Region::new(2, 2880, 109, 0, 108), Err(PushError::Rows { rows: 109, multiprocessors: 108 }));
        assert_eq!(Region::new(2, 2880, 1, 1 << 20, 108), Err(PushError::Rows { rows: 256, multiprocessors: 108 }));
    }
}
