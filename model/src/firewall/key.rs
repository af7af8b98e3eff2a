//! The key of an element.

use std::cmp::Ordering;
use std::fmt;
use std::ops::Deref;

/// The bytes of a key: at most 15. Held and compared as one number, since maps of all that a cell holds are searched by it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ElementKey([u8; 16]);

impl ElementKey {
    const MOST: usize = 15;

    /// None: none of our maps has keys of that length.
    pub fn new(key: &[u8]) -> Option<Self> {
        let mut held = [0; 16];
        held[Self::MOST] = u8::try_from(key.len()).ok().filter(|_| key.len() <= Self::MOST)?;
        held[..key.len()].copy_from_slice(key);
        Some(Self(held))
    }
}

impl<const LENGTH: usize> From<[u8; LENGTH]> for ElementKey {
    fn from(key: [u8; LENGTH]) -> Self {
        const { assert!(LENGTH <= Self::MOST) };
        Self::new(&key).unwrap_or_else(|| unreachable!("it fits"))
    }
}

impl Deref for ElementKey {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0[..usize::from(self.0[Self::MOST])]
    }
}

impl Ord for ElementKey {
    fn cmp(&self, other: &Self) -> Ordering {
        u128::from_be_bytes(self.0).cmp(&u128::from_be_bytes(other.0))
    }
}

impl PartialOrd for ElementKey {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Debug for ElementKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_key_is_its_bytes(one in proptest::collection::vec(0..3_u8, 0..18), other in proptest::collection::vec(0..3_u8, 0..18)) {
            let keys = [&one, &other].map(|bytes| ElementKey::new(bytes));
            for (bytes, key) in [&one, &other].into_iter().zip(keys) {
                prop_assert_eq!(key.map(|key| key.to_vec()), (bytes.len() <= 15).then(|| bytes.clone()));
            }
            if let [Some(first), Some(second)] = keys {
                prop_assert_eq!(first.cmp(&second), one.cmp(&other));
            }
        }
    }
}
