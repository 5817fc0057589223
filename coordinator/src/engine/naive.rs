//! Pools and prefix cache against a naive model: sets of holders, whole prefixes compared token by token, no hash, no
//! counter, no index.

use std::{collections::VecDeque, sync::Arc};

use phalanx_proto::{
    geometry::LayerKind::{self, FullAttention, SlidingAttention},
    ids::{BlockId, Step, TokenId},
};
use proptest::prelude::*;

use super::{
    blocks::Pool,
    kv::{Blocks, KvCache, KvShape, Table},
    prefix::PrefixKeys,
};

/// A salt and all tokens up to the end of a block.
type Prefix = (u8, Vec<TokenId>);

#[derive(Clone, Debug, Default)]
struct NaiveBlock {
    /// Sequences whose tables name it.
    holders: Vec<usize>,
    /// References that wait for their step.
    leaving: usize,
    content: Option<Prefix>,
    /// When its last reference was dropped.
    idle_since: u64,
}

impl NaiveBlock {
    fn is_unreferenced(&self) -> bool {
        self.holders.is_empty() && self.leaving == 0
    }
}

#[derive(Debug, Default)]
struct NaivePool {
    blocks: Vec<NaiveBlock>,
    clock: u64,
}

impl NaivePool {
    fn find(&self, prefix: &Prefix) -> Option<usize> {
        self.blocks.iter().position(|block| block.content.as_ref() == Some(prefix))
    }

    /// A block was taken: it must be one that holds nothing, or else the one that nobody has referred to for longest.
    fn taken(&mut self, id: BlockId, holder: usize) {
        let block = &self.blocks[id.index()];
        assert!(block.is_unreferenced(), "block {id} is taken while it is referred to: {block:?}");
        let idle = |block: &&NaiveBlock| block.is_unreferenced();
        if self.blocks.iter().filter(idle).any(|block| block.content.is_none()) {
            assert!(block.content.is_none(), "block {id} loses its content while another one holds nothing");
        } else {
            let oldest = self.blocks.iter().filter(idle).map(|block| block.idle_since).min();
            assert_eq!(Some(block.idle_since), oldest, "block {id} was used more lately than another one");
        }
        self.blocks[id.index()] = NaiveBlock { holders: vec![holder], ..NaiveBlock::default() };
    }

    fn let_go(&mut self, id: BlockId, holder: usize) {
        let block = &mut self.blocks[id.index()];
        let place = block.holders.iter().position(|other| *other == holder).expect("whoever lets go held it");
        block.holders.remove(place);
        block.leaving += 1;
    }

    fn release(&mut self, id: BlockId) {
        self.clock += 1;
        let block = &mut self.blocks[id.index()];
        block.leaving -= 1;
        block.idle_since = self.clock;
    }

    fn check(&self, pool: &Pool) {
        let count = |wanted: fn(&NaiveBlock) -> bool| self.blocks.iter().filter(|block| wanted(block)).count();
        assert_eq!(pool.available(), count(NaiveBlock::is_unreferenced));
        assert_eq!(pool.pending(), count(|block| block.holders.is_empty() && block.leaving > 0));
        let holders: Vec<u32> = self.blocks.iter().map(|block| block.holders.len() as u32).collect();
        let leaving: Vec<u32> = self.blocks.iter().map(|block| block.leaving as u32).collect();
        pool.check(&holders, &leaving).unwrap();
    }
}

struct Sequence {
    salt: u8,
    tokens: Vec<TokenId>,
    keys: PrefixKeys,
    table: Table,
    planned: usize,
}

/// The cache under test beside its model.
struct Pair {
    shape: KvShape,
    real: KvCache,
    full: NaivePool,
    sliding: NaivePool,
    releases: VecDeque<(Step, LayerKind, BlockId)>,
    live: Vec<Option<Sequence>>,
    step: Step,
}

#[derive(Clone, Debug)]
enum Op {
    Start { salt: u8, family: u32, length: usize },
    Compute(prop::sample::Index, usize),
    End(prop::sample::Index),
    Acknowledge,
}

impl Pair {
    fn new(shape: KvShape, full: usize, sliding: usize) -> Self {
        let (full, sliding) = (full.min(shape.each(usize::MAX).full), sliding.min(shape.each(usize::MAX).sliding));
        let pool = |count| NaivePool { blocks: vec![NaiveBlock::default(); count], clock: 0 };
        Self {
            shape,
            real: KvCache::new(shape, Blocks { full, sliding }),
            full: pool(full),
            sliding: pool(sliding),
            releases: VecDeque::new(),
            live: Vec::new(),
            step: Step(1),
        }
    }

    /// The most blocks of a beginning that are there, by looking at every prefix as a whole.
    fn naive_hit(&self, salt: u8, tokens: &[TokenId]) -> usize {
        let size = self.shape.block_size;
        let holds =
            |pool: &NaivePool, index: usize| pool.find(&(salt, tokens[..(index + 1) * size].to_vec())).is_some();
        let usable = |blocks: &usize| {
            let window = self.shape.first_visible(blocks * size)..*blocks;
            (!self.shape.has_full_layers || (0..*blocks).all(|index| holds(&self.full, index)))
                && (!self.shape.has_sliding_layers || window.into_iter().all(|index| holds(&self.sliding, index)))
        };
        (0..=(tokens.len() - 1) / size).rev().find(usable).unwrap_or(0)
    }

    fn start(&mut self, salt: u8, family: u32, length: usize) {
        let tokens: Vec<TokenId> =
            (0..length as u32).map(|i| TokenId(if i % 7 == 6 { family } else { i % 3 })).collect();
        let mut keys = PrefixKeys::new(&salt.to_string());
        keys.extend(&tokens, self.shape.block_size);
        let hit = self.real.longest_hit(&keys, &tokens);
        assert_eq!(hit.blocks, self.naive_hit(salt, &tokens), "of {tokens:?}");
        let (id, size) = (self.live.len(), self.shape.block_size);
        let referred = |pool: &NaivePool, block: &BlockId| !pool.blocks[block.index()].is_unreferenced();
        let unreferenced = |pool, blocks: &[BlockId]| blocks.iter().filter(|block| !referred(pool, block)).count();
        let expected =
            Blocks { full: unreferenced(&self.full, &hit.full), sliding: unreferenced(&self.sliding, &hit.sliding) };
        assert_eq!(hit.unreferenced, expected);
        for (index, block) in hit.full.iter().enumerate() {
            assert_eq!(self.full.blocks[block.index()].content, Some((salt, tokens[..(index + 1) * size].to_vec())));
            self.full.blocks[block.index()].holders.push(id);
        }
        for (offset, block) in hit.sliding.iter().enumerate() {
            let end = (hit.sliding_start + offset + 1) * size;
            assert_eq!(self.sliding.blocks[block.index()].content, Some((salt, tokens[..end].to_vec())));
            self.sliding.blocks[block.index()].holders.push(id);
        }
        let planned = hit.blocks * size;
        let table = self.real.share(hit);
        self.live.push(Some(Sequence { salt, tokens, keys, table, planned }));
    }

    /// Computes some more positions in a step of its own, as far as there is room.
    fn compute(&mut self, id: usize, more: usize) {
        let Some(sequence) = &mut self.live[id] else { return };
        let room = self.real.available();
        let end = (sequence.planned + more).min(sequence.tokens.len()).min(sequence.table.reachable(&self.shape, room));
        if end <= sequence.planned {
            return;
        }
        let before = ids(&sequence.table);
        self.real.grow(&mut sequence.table, end);
        let after = ids(&sequence.table);
        after[0][before[0].len()..].iter().for_each(|&block| self.full.taken(block, id));
        after[1][before[1].len()..].iter().for_each(|&block| self.sliding.taken(block, id));
        let size = self.shape.block_size;
        for index in sequence.planned / size..end / size {
            let prefix = (sequence.salt, sequence.tokens[..(index + 1) * size].to_vec());
            let sliding = index.checked_sub(sequence.table.sliding_start()).and_then(|index| after[1].get(index));
            for (pool, block) in [(&mut self.full, after[0].get(index)), (&mut self.sliding, sliding)] {
                if let Some(block) = block
                    && pool.find(&prefix).is_none()
                    && pool.blocks[block.index()].content.is_none()
                {
                    pool.blocks[block.index()].content = Some(prefix.clone());
                }
            }
            self.real.remember(&sequence.table, index, &sequence.keys, &sequence.tokens);
        }
        sequence.planned = end;
        let first = self.shape.first_visible(end);
        let passed = first.saturating_sub(sequence.table.sliding_start()).min(after[1].len());
        for &block in &after[1][..passed] {
            self.sliding.let_go(block, id);
            self.releases.push_back((self.step, SlidingAttention, block));
        }
        self.real.pass_window(&mut sequence.table, end, self.step);
        self.step = self.step.next();
    }

    fn end(&mut self, id: usize) {
        let Some(sequence) = self.live[id].take() else { return };
        let [full, sliding] = ids(&sequence.table);
        for &block in full.iter().rev() {
            self.full.let_go(block, id);
            self.releases.push_back((self.step, FullAttention, block));
        }
        for &block in sliding.iter().rev() {
            self.sliding.let_go(block, id);
            self.releases.push_back((self.step, SlidingAttention, block));
        }
        self.real.let_go_all(sequence.table, self.step);
        self.step = self.step.next();
    }

    /// All ranks have answered up to the last step but one.
    fn acknowledge(&mut self) {
        let done = Step(self.step.0.saturating_sub(2));
        self.real.acknowledge(done);
        while let Some((_, kind, block)) = self.releases.pop_front_if(|(after, _, _)| *after <= done) {
            match kind {
                FullAttention => self.full.release(block),
                SlidingAttention => self.sliding.release(block),
            }
        }
    }

    fn run(&mut self, op: &Op) {
        match *op {
            Op::Start { salt, family, length } => self.start(salt, family, length),
            Op::Compute(index, more) if !self.live.is_empty() => self.compute(index.index(self.live.len()), more),
            Op::End(index) if !self.live.is_empty() => self.end(index.index(self.live.len())),
            Op::Compute(..) | Op::End(_) => {}
            Op::Acknowledge => self.acknowledge(),
        }
        self.full.check(self.real.full());
        self.sliding.check(self.real.sliding());
    }
}

/// Full and sliding blocks that a table holds.
fn ids(table: &Table) -> [Arc<[BlockId]>; 2] {
    let (full, sliding) = table.held();
    [full.collect(), sliding.collect()]
}

fn op() -> impl Strategy<Value = Op> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        3 => (0..2_u8, 0..3_u32, 1..40_usize).prop_map(|(salt, family, length)| Op::Start { salt, family, length }),
        8 => (index(), 1..14_usize).prop_map(|(index, more)| Op::Compute(index, more)),
        2 => index().prop_map(Op::End),
        3 => Just(Op::Acknowledge),
    ]
}

fn shape() -> impl Strategy<Value = KvShape> {
    (1..6_usize, 1..14_usize, 0..4_u8).prop_map(|(block_size, sliding_window, kinds)| KvShape {
        block_size,
        sliding_window,
        has_full_layers: kinds != 1,
        has_sliding_layers: kinds != 2,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn pools_and_prefix_cache_do_what_a_naive_model_does(
        shape in shape(),
        full in 2..40_usize,
        sliding in 2..30_usize,
        ops in prop::collection::vec(op(), 1..120),
    ) {
        let mut pair = Pair::new(shape, full, sliding);
        ops.iter().for_each(|op| pair.run(op));
        (0..pair.live.len()).for_each(|id| pair.end(id));
        pair.step = pair.step.next();
        pair.acknowledge();
        prop_assert_eq!(pair.real.available(), pair.real.capacity());
    }
}
