//! A keyed permutation of `0..n` in constant memory and time: a balanced Feistel network of four rounds,
//! walked until the value lies in range (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

/// Mixes 64 bits (the finaliser of splitmix64; Steele, Lea and Flood, 2014).
#[must_use]
pub fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A hash of several numbers, in order.
#[must_use]
pub fn key(parts: &[u64]) -> u64 {
    parts.iter().fold(0x5374_6163_6b42_6e63, |hash, part| mix(hash ^ mix(*part)))
}

/// A permutation of `0..n`, determined by its key.
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
    keys: [u64; 4],
}

impl Permutation {
    /// The permutation of `0..n` under `key`.
    #[must_use]
    pub fn new(n: u64, key: u64) -> Self {
        let bits = (64 - n.saturating_sub(1).leading_zeros()).max(2);
        let keys = std::array::from_fn(|round| mix(key ^ mix(round as u64)));
        Self { n, half_bits: bits.div_ceil(2), keys }
    }

    /// Where `index` goes.
    ///
    /// # Panics
    /// Where `index >= n`.
    #[must_use]
    pub fn at(&self, index: u64) -> u64 {
        assert!(index < self.n, "index {index} of a permutation of {}", self.n);
        let mut x = index;
        loop {
            x = self.round_trip(x);
            if x < self.n {
                return x;
            }
        }
    }

    fn round_trip(&self, x: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        (left << self.half_bits) | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn is_a_permutation(n in 1u64..5000, key: u64) {
            let permutation = Permutation::new(n, key);
            let mut seen = vec![false; n as usize];
            for i in 0..n {
                let at = permutation.at(i);
                prop_assert!(at < n && !seen[at as usize]);
                seen[at as usize] = true;
            }
        }
    }

    #[test]
    fn keys_give_different_orders_and_large_ranges_work() {
        let orders: Vec<Vec<u64>> = (0..4)
            .map(|k| {
                let p = Permutation::new(100, k);
                (0..100).map(|i| p.at(i)).collect()
            })
            .collect();
        assert!(orders.windows(2).all(|pair| pair[0] != pair[1]));
        let huge = Permutation::new(u64::MAX / 2, 7);
        assert_ne!(huge.at(0), huge.at(1));
    }

    #[test]
    fn spreads_neighbours() {
        // Not a statistical test: that neighbours do not stay neighbours, which a weak round function would give.
        let p = Permutation::new(10_000, 1);
        let near = (1..10_000).filter(|&i| p.at(i).abs_diff(p.at(i - 1)) < 10).count();
        assert!(near < 100, "{near}");
    }
}
