//! Which of the matrix-unit kernels can compute an attention, and the sizes of their launches, by the formulas at the
//! heads of their texts.

use crate::device::gpu::runtime::{DeviceFacts, ModuleText};

macro_rules! texts {
    ($($file:literal),*) => {
        &[$(include_str!(concat!("../../../../kernels/cuda/", $file))),*]
    };
}

pub(super) static FORWARD: ModuleText = ModuleText {
    name: "attention_forward",
    texts: texts!("tiles.cuh", "attention_common.cuh", "attention_forward.cu"),
};

pub(super) static FORWARD_HOPPER: ModuleText = ModuleText {
    name: "attention_forward_hopper",
    texts: texts!("tiles.cuh", "attention_common.cuh", "attention_hopper.cuh", "attention_forward_hopper.cu"),
};

pub(super) static BACKWARD: ModuleText = ModuleText {
    name: "attention_backward",
    texts: texts!("tiles.cuh", "attention_common.cuh", "attention_prepare.cu", "attention_backward.cu"),
};

pub(super) static BACKWARD_HOPPER: ModuleText = ModuleText {
    name: "attention_backward_hopper",
    texts: texts!(
        "tiles.cuh",
        "attention_common.cuh",
        "attention_hopper.cuh",
        "attention_prepare.cu",
        "attention_backward_hopper.cu"
    ),
};

pub(super) static DECODE: ModuleText = ModuleText {
    name: "attention_decode",
    texts: texts!("tiles.cuh", "attention_common.cuh", "attention_decode.cu"),
};

/// Documents with at most so many queries each are divided by their keys instead.
const FEW_QUERIES: usize = 8;

/// Parts that the keys of one query are divided into, at most.
const MOST_SPLITS: usize = 64;

/// Keys that a block of the decode kernel takes at a time.
const DECODE_KEYS: usize = 64;

/// Sizes of an attention.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) tokens: usize,
    pub(super) keys: usize,
    pub(super) heads: usize,
    pub(super) key_heads: usize,
    /// Of keys and of values.
    pub(super) widths: [usize; 2],
    /// The most queries that one document has.
    pub(super) longest: usize,
    /// Whether keys are chosen among those that queries see: of the forms, the plain ones know that.
    pub(super) has_choice: bool,
}

/// How the forward pass is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Forward {
    Decode,
    Hopper { consumers: usize },
    Plain,
}

/// How the backward pass is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Backward {
    Hopper { cluster: usize, consumers: usize },
    Plain,
}

/// Sizes that the plain backward kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tile {
    pub(super) keys: usize,
    pub(super) queries: usize,
    pub(super) stages: usize,
}

impl Shape {
    /// Whether heads are of widths that the kernels exist for.
    pub(super) fn has_kernels(&self, facts: &DeviceFacts) -> bool {
        let is_width = |width: &usize| width.is_multiple_of(8) && (8..=256).contains(width);
        facts.capability >= (8, 0) && self.widths.iter().all(is_width) && self.tokens > 0 && self.keys > 0
    }

    fn pads(&self) -> [usize; 2] {
        self.widths.map(|width| match width {
            ..=64 => 64,
            65..=96 => 96,
            97..=128 => 128,
            129..=192 => 192,
            _ => 256,
        })
    }

    pub(super) fn pieces(&self) -> [usize; 2] {
        self.widths.map(|width| width.div_ceil(64))
    }

    fn is_narrow(&self) -> bool {
        self.pieces().iter().all(|&pieces| pieces <= 2)
    }

    fn is_narrowest(&self) -> bool {
        self.pieces() == [1, 1]
    }

    /// Rows that workspaces have for each head.
    pub(super) fn padded_tokens(&self) -> usize {
        self.tokens.next_multiple_of(128)
    }

    /// The form of the forward pass; `None` where no block has room for any.
    pub(super) fn forward(&self, facts: &DeviceFacts) -> Option<Forward> {
        let fits = |bytes: usize| bytes <= facts.shared_bytes_per_block;
        // Blocks of the other forms hold at least 64 queries and bring in all keys between the first and the last of them.
        let is_thin = self.tokens <= FEW_QUERIES || self.keys >= 16 * self.tokens;
        if !self.has_choice
            && self.longest <= FEW_QUERIES
            && is_thin
            && self.tokens <= 65_535
            && fits(self.decode_shared())
        {
            return Some(Forward::Decode);
        }
        let [key_pieces, value_pieces] = self.pieces();
        if !self.has_choice && facts.capability.0 == 9 && (self.is_narrow() || value_pieces <= key_pieces) {
            let few = self.heads * self.tokens.div_ceil(192) <= facts.multiprocessors;
            let consumers = if self.is_narrowest() && !few { 3 } else { 2 };
            return Some(Forward::Hopper { consumers });
        }
        fits(self.forward_shared()).then_some(Forward::Plain)
    }

    /// The form of the backward pass, and the tile of those of its kernels that are in no form of their own; `None` where
    /// no block has room for any.
    pub(super) fn backward(&self, facts: &DeviceFacts) -> Option<(Backward, Tile)> {
        let form = match facts.capability.0 {
            9 if !self.has_choice => {
                Backward::Hopper { cluster: self.cluster(facts), consumers: self.consumers(facts) }
            }
            _ => Backward::Plain,
        };
        self.tile(facts).map(|tile| (form, tile))
    }

    /// Warpgroups of a block of the Hopper form, each with 64 keys: one where the longest block would take most of the time.
    fn consumers(&self, facts: &DeviceFacts) -> usize {
        let blocks = self.key_heads * self.keys.div_ceil(128);
        if self.is_narrowest() && 2 * blocks <= facts.multiprocessors { 1 } else { 2 }
    }

    /// The most blocks that share a group of heads while the card has room for them.
    fn cluster(&self, facts: &DeviceFacts) -> usize {
        let group = self.heads / self.key_heads;
        let blocks = self.key_heads * self.keys.div_ceil(128);
        if !self.is_narrow() || 2 * blocks > facts.multiprocessors {
            return 1;
        }
        // A little more than one round of blocks was still faster than blocks that do three times the work.
        let most = (facts.multiprocessors * 5 / 4 / blocks).min(8);
        (1..=most).rev().find(|&cluster| group.is_multiple_of(cluster)).unwrap_or(1)
    }

    /// The largest tile of the plain backward kernels that a block has room for.
    fn tile(&self, facts: &DeviceFacts) -> Option<Tile> {
        let [key_pad, value_pad] = self.pads();
        let most_keys = if key_pad.max(value_pad) <= 128 { 128 } else { 64 };
        let tiles = [(most_keys, 64, 2), (64, 64, 1), (32, 32, 1)].map(|(keys, queries, stages)| Tile {
            keys,
            queries,
            stages,
        });
        tiles.into_iter().find(|&tile| {
            let most = self.backward_shared(tile).max(self.queries_shared(tile));
            most <= facts.shared_bytes_per_block
        })
    }

    pub(super) fn forward_threads(&self) -> usize {
        let [key_pad, value_pad] = self.pads();
        if key_pad.max(value_pad) <= 128 { 128 } else { 256 }
    }

    pub(super) fn forward_shared(&self) -> usize {
        let [key_pad, value_pad] = self.pads();
        (192 * key_pad + 64 * value_pad).max(128 * value_pad) * 2 + 1024
    }

    /// Keys of a tile of the Hopper form.
    pub(super) fn forward_keys(&self) -> usize {
        if self.is_narrow() { 128 } else { 64 }
    }

    pub(super) fn forward_hopper_shared(&self, consumers: usize) -> usize {
        let [key_pieces, value_pieces] = self.pieces();
        let kept = key_pieces + if self.is_narrow() { value_pieces } else { 0 };
        consumers * 8192 * kept + 2 * self.forward_keys() * 128 * (key_pieces + value_pieces) + 1024
    }

    pub(super) fn decode_shared(&self) -> usize {
        let [key_pad, value_pad] = self.pads();
        32 * key_pad + 256 * (key_pad + value_pad) + 512
    }

    /// Blocks of the decode kernel for each query, and parts of its keys.
    pub(super) fn decode_grid(&self, facts: &DeviceFacts) -> [usize; 3] {
        let blocks = self.key_heads * (self.heads / self.key_heads).div_ceil(16);
        // A part has at least one round of the block's SIMD groups over their keys.
        let most = self.keys.div_ceil(DECODE_KEYS).clamp(1, MOST_SPLITS);
        let splits = (2 * facts.multiprocessors / (blocks * self.tokens)).clamp(1, most);
        [splits, blocks, self.tokens]
    }

    pub(super) fn backward_shared(&self, tile: Tile) -> usize {
        let both: usize = self.pads().iter().sum();
        2 * (tile.keys * (both + tile.queries) + tile.stages * tile.queries * (both + 8))
    }

    pub(super) fn queries_shared(&self, tile: Tile) -> usize {
        let both: usize = self.pads().iter().sum();
        2 * (64 * both + tile.stages * tile.queries * both)
    }

    /// Queries of a tile of the Hopper form.
    pub(super) fn backward_queries(&self, consumers: usize) -> usize {
        if self.is_narrowest() && consumers == 2 { 128 } else { 64 }
    }

    /// Times that the Hopper form goes over the keys.
    pub(super) fn sweeps(&self) -> usize {
        if self.is_narrow() { 1 } else { 2 }
    }

    pub(super) fn backward_hopper_shared(&self, consumers: usize) -> usize {
        let (pieces, queries) = (self.pieces().iter().sum::<usize>(), self.backward_queries(consumers));
        let (stages, keys) = (if pieces <= 6 { 2 } else { 1 }, 64 * consumers);
        pieces * (128 * keys + stages * 128 * queries) + (4 * keys + 16 * stages) * queries + 1024
    }

    /// Columns of the f32 sums of the queries' gradients.
    pub(super) fn sum_columns(&self, form: Backward) -> usize {
        match form {
            Backward::Hopper { .. } => self.pieces()[0] * 64,
            Backward::Plain => self.pads()[0],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: DeviceFacts = DeviceFacts {
        capability: (9, 0),
        has_paired_products: true,
        multiprocessors: 132,
        shared_bytes_per_block: 232_448,
        deterministic: false,
    };
    const SMALL: DeviceFacts =
        DeviceFacts { capability: (8, 9), multiprocessors: 128, shared_bytes_per_block: 101_376, ..H200 };
    const A100: DeviceFacts =
        DeviceFacts { capability: (8, 0), multiprocessors: 108, shared_bytes_per_block: 166_912, ..H200 };

    fn shape(tokens: usize, [heads, key_heads]: [usize; 2], widths: [usize; 2]) -> Shape {
        Shape { tokens, keys: tokens, heads, key_heads, widths, longest: tokens, has_choice: false }
    }

    #[test]
    fn the_form_follows_the_device_and_the_widths() {
        let wide = shape(4096, [32, 8], [128, 128]);
        assert_eq!(wide.forward(&H200), Some(Forward::Hopper { consumers: 2 }));
        assert_eq!(wide.forward(&A100), Some(Forward::Plain));
        assert_eq!(shape(8192, [32, 8], [64, 64]).forward(&H200), Some(Forward::Hopper { consumers: 3 }));
        assert_eq!(shape(2048, [9, 3], [64, 64]).forward(&H200), Some(Forward::Hopper { consumers: 2 }));
        assert_eq!(shape(512, [8, 8], [128, 192]).forward(&H200), Some(Forward::Plain));
        assert_eq!(shape(512, [8, 8], [192, 128]).forward(&H200), Some(Forward::Hopper { consumers: 2 }));
        assert_eq!(shape(512, [8, 8], [256, 256]).forward(&SMALL), None);
        assert!(!shape(512, [8, 8], [12, 16]).has_kernels(&H200));
        assert!(!shape(512, [8, 8], [264, 16]).has_kernels(&H200));
        assert!(!wide.has_kernels(&DeviceFacts { capability: (7, 5), ..SMALL }));
    }

    #[test]
    fn few_queries_over_many_keys_are_divided_by_keys() {
        let thin = Shape { keys: 4096, ..shape(4, [32, 8], [128, 128]) };
        assert_eq!(thin.forward(&H200), Some(Forward::Decode));
        assert_eq!(thin.decode_grid(&H200), [8, 8, 4]);
        assert_eq!(Shape { tokens: 1, ..thin }.decode_grid(&H200), [33, 8, 1]);
        assert_eq!(Shape { tokens: 1, keys: 256, ..thin }.decode_grid(&H200), [4, 8, 1]);
        let batch = Shape { tokens: 64, keys: 64 * 512, longest: 1, ..thin };
        assert_eq!(batch.forward(&H200), Some(Forward::Decode));
        assert_eq!(batch.decode_grid(&H200), [1, 8, 64]);
        let documents = Shape { tokens: 4096, keys: 4096, longest: 8, ..thin };
        assert_eq!(documents.forward(&A100), Some(Forward::Plain));
    }

    #[test]
    fn backward_tiles_are_those_that_a_block_has_room_for() {
        let tile = |width: usize, facts: &DeviceFacts| {
            let tile = shape(512, [8, 8], [width, width]).tile(facts).unwrap();
            (tile.keys, tile.queries, tile.stages)
        };
        assert_eq!([64, 128, 256].map(|width| tile(width, &H200)), [(128, 64, 2), (128, 64, 2), (64, 64, 2)]);
        assert_eq!([128, 192, 256].map(|width| tile(width, &A100)), [(128, 64, 2), (64, 64, 2), (64, 64, 1)]);
        assert_eq!([128, 192, 256].map(|width| tile(width, &SMALL)), [(64, 64, 1), (32, 32, 1), (32, 32, 1)]);
    }

    #[test]
    fn blocks_share_a_group_of_heads_where_half_of_the_card_would_idle() {
        let cluster = |tokens, heads, width| shape(tokens, heads, [width, width]).cluster(&H200);
        assert_eq!(cluster(2048, [9, 3], 64), 3);
        assert_eq!(cluster(8192, [32, 8], 128), 1);
        assert_eq!(cluster(128, [64, 4], 128), 8);
        assert_eq!(cluster(1024, [32, 8], 128), 2);
        assert_eq!(cluster(128, [8, 1], 256), 1);
    }

    #[test]
    fn blocks_have_half_the_keys_where_the_longest_would_take_most_of_the_time() {
        let form = |tokens, heads, width| shape(tokens, heads, [width, width]).backward(&H200).unwrap().0;
        assert_eq!(form(2048, [9, 3], 64), Backward::Hopper { cluster: 3, consumers: 1 });
        assert_eq!(form(8192, [32, 8], 64), Backward::Hopper { cluster: 1, consumers: 2 });
        assert_eq!(form(2048, [9, 3], 128), Backward::Hopper { cluster: 3, consumers: 2 });
    }

    #[test]
    fn every_hopper_form_has_room_in_a_block() {
        for widths in (8..=256).step_by(8).flat_map(|key| (8..=256).step_by(8).map(move |value| [key, value]))
        {
            let shape = shape(512, [8, 8], widths);
            if let Some(Forward::Hopper { consumers }) = shape.forward(&H200) {
                assert!(shape.forward_hopper_shared(consumers) <= H200.shared_bytes_per_block, "{widths:?}");
            }
            let consumers = shape.consumers(&H200);
            assert!(shape.backward_hopper_shared(consumers) <= H200.shared_bytes_per_block, "{widths:?}");
            assert!(shape.tile(&H200).is_some() && shape.tile(&SMALL).is_some(), "{widths:?}");
        }
    }
}
