//! What is going to happen, in order of time; what is due at the same time happens in the order it was ordered in.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// See the module's description. Times are milliseconds of the world.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    order: BinaryHeap<Reverse<(u64, u64, usize)>>,
    slots: Vec<Option<T>>,
    free: Vec<usize>,
    count: u64,
}

impl<T> Queue<T> {
    pub(crate) fn new() -> Self {
        Self { order: BinaryHeap::new(), slots: Vec::new(), free: Vec::new(), count: 0 }
    }

    pub(crate) fn push(&mut self, when: u64, what: T) {
        self.count += 1;
        let slot = match self.free.pop() {
            Some(slot) => {
                self.slots[slot] = Some(what);
                slot
            }
            None => {
                self.slots.push(Some(what));
                self.slots.len() - 1
            }
        };
        self.order.push(Reverse((when, self.count, slot)));
    }

    pub(crate) fn pop(&mut self) -> Option<(u64, T)> {
        let Reverse((when, _, slot)) = self.order.pop()?;
        let what = self.slots[slot].take()?;
        self.free.push(slot);
        Some((when, what))
    }
}
