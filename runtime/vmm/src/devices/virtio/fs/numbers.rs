//! A hash for tables of files, whose keys are numbers.
//!
//! The standard library's takes several hundred instructions for the identity of a file, and
//! a request asks three tables. This one takes a multiplication for each number. A guest
//! chooses which files there are and which of them it keeps, so the multiplication has a
//! secret in it: numbers that fall together with one secret do not with another.

use std::hash::{BuildHasher, Hasher, RandomState};

/// Makes the hashers of one table.
#[derive(Debug, Clone)]
pub struct Numbers {
    secret: u64,
    factor: u64,
}

impl Default for Numbers {
    fn default() -> Self {
        let random = RandomState::new();
        // Odd, so that no bit of a number is lost.
        Self { secret: random.hash_one(0), factor: random.hash_one(1) | 1 }
    }
}

impl BuildHasher for Numbers {
    type Hasher = NumberHasher;

    fn build_hasher(&self) -> NumberHasher {
        NumberHasher { state: self.secret, secret: self.secret, factor: self.factor }
    }
}

/// Spreads the bits of the last product: a factor may be a small one. Of the golden ratio.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// What became of the numbers so far.
#[derive(Debug)]
pub struct NumberHasher {
    state: u64,
    secret: u64,
    factor: u64,
}

impl Hasher for NumberHasher {
    #[inline]
    fn write_u64(&mut self, number: u64) {
        self.state = fold(self.state ^ number, self.factor);
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut number = [0; 8];
            number[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(number));
        }
    }

    #[inline]
    fn finish(&self) -> u64 {
        fold(self.state ^ self.secret, SPREAD)
    }
}

/// Both halves of a product.
#[inline]
fn fold(one: u64, other: u64) -> u64 {
    let product = u128::from(one) * u128::from(other);
    product as u64 ^ (product >> 64) as u64
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn numbers_that_are_alike_are_spread() {
        for _ in 0..20 {
            let numbers = Numbers::default();
            // What counts up, in steps of any power of two, as inodes and chosen ids do.
            for shift in [0, 1, 7, 16, 32, 48] {
                let hashes: Vec<u64> = (0..4096_u64).map(|number| numbers.hash_one(number << shift)).collect();
                for bits in [0, 7, 52] {
                    // The table's place is in the low bits, a mark in the high ones.
                    let places: HashSet<u64> = hashes.iter().map(|hash| hash >> bits & 0xfff).collect();
                    assert!(places.len() > 2048, "{} places for 4096, shift {shift}, bits {bits}", places.len());
                }
            }
        }
    }

    #[test]
    fn each_table_has_its_own_secret() {
        let hashes: HashSet<u64> = (0..50).map(|_| Numbers::default().hash_one((1_u64, 2_u64))).collect();
        assert_eq!(hashes.len(), 50);
    }
}
