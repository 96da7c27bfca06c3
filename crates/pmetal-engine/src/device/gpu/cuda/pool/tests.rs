use std::cell::RefCell;
use std::rc::Rc;

use proptest::prelude::*;

use super::*;

const BASE: u64 = 0x7000_0000_0000;

/// A device with a fixed amount of memory that never hands an address out twice.
#[derive(Default)]
struct Fake {
    limit: usize,
    used: usize,
    next: u64,
    taken: Vec<usize>,
    given: Vec<usize>,
    locked: bool,
}

#[derive(Clone)]
struct Source(Rc<RefCell<Fake>>);

impl SegmentSource for Source {
    fn take(&mut self, bytes: usize) -> Option<u64> {
        let mut fake = self.0.borrow_mut();
        if fake.used + bytes > fake.limit {
            return None;
        }
        fake.used += bytes;
        fake.taken.push(bytes);
        let address = BASE + fake.next;
        // Segments touch, so that merging across them would be seen.
        fake.next += bytes as u64;
        Some(address)
    }

    fn give(&mut self, _: u64, bytes: usize) {
        let mut fake = self.0.borrow_mut();
        fake.used -= bytes;
        fake.given.push(bytes);
    }

    fn can_give(&self) -> bool {
        !self.0.borrow().locked
    }
}

fn pool(limit: usize) -> (Pool<Source>, Rc<RefCell<Fake>>) {
    let fake = Rc::new(RefCell::new(Fake { limit, ..Fake::default() }));
    (Pool::new(Source(fake.clone())), fake)
}

const MIB: usize = 1 << 20;

/// Everything that must hold between calls.
fn check(pool: &Pool<Source>) {
    let mut end = None;
    let (mut live, mut held, mut free_blocks) = (0, 0, 0);
    for (&address, block) in &pool.blocks {
        assert_eq!((address % ALIGNMENT as u64, block.bytes % ALIGNMENT), (0, 0));
        assert!(block.bytes > 0);
        if address != block.segment {
            assert_eq!(end, Some((address, block.segment)), "blocks cover their segment without gaps");
        }
        end = Some((address + block.bytes as u64, block.segment));
        match block.state {
            State::Live => live += block.bytes,
            State::Held => held += block.bytes,
            State::Free => {
                free_blocks += 1;
                assert!(pool.free.contains(&pool.key(address).unwrap()));
                if let Some(next) = pool.blocks.get(&(address + block.bytes as u64)) {
                    let merged = next.state != State::Free || next.owner != block.owner;
                    assert!(merged || next.segment != block.segment, "free neighbours are merged");
                }
            }
        }
    }
    for (address, segment) in &pool.segments {
        let bytes: usize =
            pool.blocks.values().filter(|block| block.segment == *address).map(|block| block.bytes).sum();
        assert_eq!(bytes, segment.bytes);
    }
    assert_eq!(pool.free.len(), free_blocks);
    assert_eq!((pool.report.live, pool.report.held), (live, held));
    let reserved: usize = pool.segments.values().map(|segment| segment.bytes).sum();
    assert_eq!(pool.report.reserved, reserved);
}

#[test]
fn a_freed_block_is_the_next_one_of_its_size() {
    let (mut pool, fake) = pool(1 << 30);
    let first = pool.allocate(1000).unwrap();
    let second = pool.allocate(1000).unwrap();
    assert_eq!(second, first + 1024);
    assert!(pool.free(first));
    assert_eq!(pool.allocate(1024), Some(first));
    assert_eq!(fake.borrow().taken, [32 * MIB]);
    check(&pool);
}

#[test]
fn the_smallest_block_that_fits_is_taken() {
    let (mut pool, _) = pool(1 << 30);
    let sizes = [4096, 256, 1024, 256, 2048, 256];
    let blocks: Vec<u64> = sizes.iter().map(|&bytes| pool.allocate(bytes).unwrap()).collect();
    assert!(pool.free(blocks[0]) && pool.free(blocks[2]) && pool.free(blocks[4]));
    assert_eq!(pool.allocate(1000), Some(blocks[2]));
    assert_eq!(pool.allocate(1100), Some(blocks[4]));
    assert_eq!(pool.allocate(2100), Some(blocks[0]));
    check(&pool);
}

#[test]
fn neighbours_merge_until_the_segment_is_whole_and_can_be_given_back() {
    let (mut pool, fake) = pool(1 << 30);
    let blocks: Vec<u64> = (0..4).map(|_| pool.allocate(8 * MIB).unwrap()).collect();
    assert_eq!(fake.borrow().taken, [32 * MIB]);
    for index in [1, 3, 0, 2] {
        assert_eq!(pool.trim(), 0);
        assert!(pool.free(blocks[index]));
        check(&pool);
    }
    assert_eq!(pool.free.len(), 1);
    assert_eq!((pool.trim(), pool.report().reserved), (32 * MIB, 0));
    assert_eq!(fake.borrow().used, 0);
}

#[test]
fn small_and_large_blocks_have_segments_of_their_own_until_memory_is_short() {
    let (mut pool, fake) = pool(64 * MIB);
    pool.allocate(2 * MIB).unwrap();
    pool.allocate(300).unwrap();
    assert_eq!(fake.borrow().taken, [32 * MIB, 32 * MIB]);
    let small = pool.allocate(300).unwrap();
    assert_eq!(small - BASE, 32 * MIB as u64 + 512);
    pool.allocate(30 * MIB).unwrap();
    assert!(pool.allocate(31 * MIB).is_some(), "the rest of the small segment serves a large request");
    assert!(pool.allocate(2 * MIB).is_none());
    check(&pool);
}

#[test]
fn segments_grow_with_the_pool_and_huge_requests_are_exact() {
    let (mut pool, fake) = pool(1 << 40);
    pool.allocate((1 << 30) + 1).unwrap();
    pool.allocate(3 * MIB).unwrap();
    pool.allocate(700 * MIB + 1).unwrap();
    pool.allocate(12 << 30).unwrap();
    pool.allocate(170 * MIB).unwrap();
    assert_eq!(fake.borrow().taken, [1026 * MIB, 130 * MIB, 702 * MIB, 12288 * MIB, 512 * MIB]);
    check(&pool);
}

#[test]
fn a_refused_segment_is_asked_for_again_smaller_and_after_empty_ones_were_given_back() {
    let (mut pool, fake) = pool(100 * MIB);
    let first = pool.allocate(60 * MIB).unwrap();
    assert!(pool.free(first));
    assert!(pool.allocate(90 * MIB).is_some());
    assert_eq!(
        (fake.borrow().taken.as_slice(), fake.borrow().given.as_slice()),
        (&[60 * MIB, 90 * MIB][..], &[60 * MIB][..])
    );
    assert!(pool.allocate(9 * MIB).is_some(), "a segment of 32 MiB does not fit, one of 10 does");
    assert!(pool.allocate(MIB + 1).is_none());
    assert!(pool.allocate(usize::MAX - 10).is_none());
    check(&pool);
}

#[test]
fn nothing_is_given_back_while_the_source_forbids_it() {
    let (mut pool, fake) = pool(64 * MIB);
    let first = pool.allocate(40 * MIB).unwrap();
    assert!(pool.free(first));
    fake.borrow_mut().locked = true;
    assert!(pool.allocate(50 * MIB).is_none());
    assert!(fake.borrow().given.is_empty());
    fake.borrow_mut().locked = false;
    assert!(pool.allocate(50 * MIB).is_some());
}

#[test]
fn freeing_twice_or_a_foreign_address_is_noticed() {
    let (mut pool, _) = pool(1 << 30);
    let address = pool.allocate(512).unwrap();
    assert!(!pool.free(address + 256));
    assert!(pool.free(address));
    assert!(!pool.free(address));
    check(&pool);
}

#[test]
fn reserved_memory_is_there_without_asking_again() {
    let (mut pool, fake) = pool(1 << 30);
    assert!(pool.reserve(200 * MIB));
    let taken = fake.borrow().taken.len();
    pool.allocate(100 * MIB).unwrap();
    pool.allocate(100 * MIB).unwrap();
    assert_eq!(fake.borrow().taken.len(), taken);
    assert!(!pool.reserve(2 << 30));
}

#[test]
fn memory_of_a_capture_is_reused_inside_it_and_by_nobody_else_before_release() {
    let (mut pool, _) = pool(1 << 30);
    let before = pool.allocate(4096).unwrap();
    let owner = pool.begin_private().unwrap();
    assert_eq!(pool.begin_private(), None);
    let inside = pool.allocate(4096).unwrap();
    assert!(pool.free(inside));
    assert_eq!(pool.allocate(4096), Some(inside), "reuse inside the capture is ordered by the graph");
    let kept = pool.allocate(4096).unwrap();
    assert!(pool.free(inside) && pool.free(before));
    let other = pool.allocate(4096).unwrap();
    assert_ne!(other, before, "the graph may read what was there before it");
    pool.end_private();
    check(&pool);
    let outside: Vec<u64> = (0..64).map(|_| pool.allocate(4096).unwrap()).collect();
    assert!(pool.free(kept), "a result that outlives the capture");
    assert_eq!(pool.report().held, 8192);
    let again = pool.allocate(4096).unwrap();
    for address in [before, inside, kept, other] {
        assert!(!outside.contains(&address) && address != again);
    }
    pool.release(owner);
    check(&pool);
    assert_eq!(pool.report().held, 0);
    let after: Vec<u64> = (0..3).map(|_| pool.allocate(4096).unwrap()).collect();
    for address in [before, inside, kept] {
        let reused = after.iter().any(|&block| (block..block + 4096).contains(&address));
        assert!(reused || address == other, "{address:x} in {after:x?}");
    }
    assert!(pool.free(other));
    check(&pool);
}

#[test]
fn a_block_that_two_graphs_touch_waits_for_both() {
    for order in [[0, 1], [1, 0]] {
        let (mut pool, _) = pool(1 << 30);
        let first = pool.begin_private().unwrap();
        let result = pool.allocate(4096).unwrap();
        pool.end_private();
        let second = pool.begin_private().unwrap();
        assert!(pool.free(result));
        pool.end_private();
        let owners = [first, second];
        pool.release(owners[order[0]]);
        check(&pool);
        assert_eq!(pool.report().held, 4096);
        pool.release(owners[order[1]]);
        check(&pool);
        assert_eq!(pool.report().held, 0);
    }
}

/// Who may have which bytes, kept apart from the pool's own books.
struct Holder {
    address: u64,
    bytes: usize,
}

fn overlaps(left: &Holder, right: &Holder) -> bool {
    left.address < right.address + right.bytes as u64 && right.address < left.address + left.bytes as u64
}

proptest! {
    #[test]
    fn any_order_of_calls_keeps_live_blocks_apart_and_the_books_right(
        calls in prop::collection::vec((0_u8..12, 0_usize..1 << 24, any::<prop::sample::Index>()), 1..250)
    ) {
        let (mut pool, fake) = pool(160 * MIB);
        let mut live: Vec<Holder> = Vec::new();
        // What a graph that still exists touched.
        let mut graphs: Vec<(Owner, Vec<Holder>)> = Vec::new();
        let mut recording: Option<(Owner, Vec<Holder>)> = None;
        for (call, size, index) in calls {
            match call {
                0..=5 => {
                    let bytes = 1 + (size >> (size % 16));
                    if let Some(address) = pool.allocate(bytes) {
                        let new = Holder { address, bytes };
                        prop_assert!(live.iter().all(|other| !overlaps(other, &new)));
                        prop_assert!(graphs.iter().flat_map(|graph| &graph.1).all(|other| !overlaps(other, &new)));
                        if let Some((_, touched)) = &mut recording {
                            touched.push(Holder { address, bytes });
                        }
                        live.push(new);
                    }
                }
                6..=8 if !live.is_empty() => {
                    let block = live.swap_remove(index.index(live.len()));
                    prop_assert!(pool.free(block.address));
                }
                9 => if recording.is_none() {
                    recording = pool.begin_private().map(|owner| (owner, Vec::new()));
                } else if let Some(done) = recording.take() {
                    pool.end_private();
                    graphs.push(done);
                },
                10 if !graphs.is_empty() => {
                    let (owner, _) = graphs.swap_remove(index.index(graphs.len()));
                    pool.release(owner);
                }
                _ => { pool.trim(); }
            }
            check(&pool);
        }
        if let Some((owner, _)) = recording { pool.release(owner); }
        for (owner, _) in graphs { pool.release(owner); }
        for block in live { prop_assert!(pool.free(block.address)); }
        check(&pool);
        prop_assert_eq!((pool.report().live, pool.report().held), (0, 0));
        pool.trim();
        prop_assert_eq!((pool.report().reserved, fake.borrow().used), (0, 0));
    }
}
