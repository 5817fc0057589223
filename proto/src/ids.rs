//! Newtypes for everything that is counted, so that a rank is never passed where a block is meant.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl From<$inner> for $name {
            fn from(value: $inner) -> Self {
                Self(value)
            }
        }
    };
}

id! {
    /// One running completion. Never used twice by one coordinator.
    SequenceId(u64)
}
id! {
    /// A worker's place in its group, below the world size.
    Rank(u32)
}
id! {
    /// One formation of a group. Grows each time the group forms anew; 0 is no epoch.
    Epoch(u64)
}
id! {
    /// A plan's number within its epoch, counted from 1.
    Step(u64)
}
id! {
    /// A block of one of the two KV pools.
    BlockId(u32)
}
id! {
    /// A row of the embedding table.
    TokenId(u32)
}

impl Rank {
    /// The rank as an index.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl BlockId {
    /// The block as an index.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl TokenId {
    /// The token as a row number.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl Step {
    /// The step after this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}
