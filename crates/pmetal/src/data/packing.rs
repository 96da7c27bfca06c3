//! Documents into windows of a fixed number of tokens, so that few slots stay empty.

/// Puts each document into the first window that has room, longest documents first (first fit decreasing).
///
/// Returns the documents of each window. Documents of equal length keep their order, so the result depends on the
/// lengths alone. O(n log n). A document longer than `capacity` gets a window of its own.
pub fn first_fit_decreasing(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&document| std::cmp::Reverse(lengths[document]));
    let mut windows: Vec<Vec<usize>> = Vec::new();
    let mut room = Room::new(lengths.len(), capacity);
    for document in order {
        let window = room.take(lengths[document].min(capacity));
        if window == windows.len() {
            windows.push(Vec::new());
        }
        windows[window].push(document);
    }
    windows
}

/// The room left in each window, as a tree of maxima, so that the first window with enough is found in O(log n).
struct Room {
    tree: Vec<usize>,
    leaves: usize,
}

impl Room {
    fn new(windows: usize, capacity: usize) -> Self {
        let leaves = windows.max(1).next_power_of_two();
        Self { tree: vec![capacity; 2 * leaves], leaves }
    }

    /// Takes `length` out of the first window that has it. There are as many windows as documents, so one has.
    fn take(&mut self, length: usize) -> usize {
        let mut node = 1;
        while node < self.leaves {
            node *= 2;
            if self.tree[node] < length {
                node += 1;
            }
        }
        self.tree[node] -= length;
        let window = node - self.leaves;
        while node > 1 {
            node /= 2;
            self.tree[node] = self.tree[2 * node].max(self.tree[2 * node + 1]);
        }
        window
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The same rule, window by window.
    fn reference(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
        let mut order: Vec<usize> = (0..lengths.len()).collect();
        order.sort_by(|a, b| lengths[*b].cmp(&lengths[*a]).then(a.cmp(b)));
        let mut windows: Vec<(usize, Vec<usize>)> = Vec::new();
        for document in order {
            match windows.iter_mut().find(|(used, _)| used + lengths[document] <= capacity) {
                Some((used, documents)) => {
                    *used += lengths[document];
                    documents.push(document);
                }
                None => windows.push((lengths[document], vec![document])),
            }
        }
        windows.into_iter().map(|(_, documents)| documents).collect()
    }

    #[test]
    fn known_case_is_packed_as_by_hand() {
        assert_eq!(first_fit_decreasing(&[3, 7, 5, 2, 5, 1], 10), [vec![1, 0], vec![2, 4], vec![3, 5]]);
        assert!(first_fit_decreasing(&[], 10).is_empty());
    }

    proptest! {
        #[test]
        fn every_document_once_within_capacity_as_the_plain_rule_does(
            lengths in proptest::collection::vec(1_usize..=64, 0..200),
            extra in 0_usize..100,
        ) {
            let capacity = 64 + extra;
            let windows = first_fit_decreasing(&lengths, capacity);
            let mut seen: Vec<usize> = windows.iter().flatten().copied().collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
            for window in &windows {
                prop_assert!(!window.is_empty());
                prop_assert!(window.iter().map(|&document| lengths[document]).sum::<usize>() <= capacity);
            }
            prop_assert_eq!(windows, reference(&lengths, capacity));
        }
    }
}
