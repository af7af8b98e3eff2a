//! What keys of sets are made of.

/// One part of a key. Says how long it is, and how `nft list` prints it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Field {
    /// An IPv4 address, as on the wire.
    Ipv4,
    /// A protocol number of IPv4 (one byte).
    Protocol,
    /// A port of TCP or UDP, as on the wire.
    Port,
    IcmpType,
    IcmpCode,
    /// A packet's or a connection's mark, in the machine's byte order.
    Mark,
    /// A device's index, in the machine's byte order.
    InterfaceIndex,
    /// A device's name, filled with zeros to 16 bytes.
    InterfaceName,
}

impl Field {
    pub const ALL: [Self; 8] = [
        Self::Ipv4,
        Self::Protocol,
        Self::Port,
        Self::IcmpType,
        Self::IcmpCode,
        Self::Mark,
        Self::InterfaceIndex,
        Self::InterfaceName,
    ];

    /// Bytes. None is empty.
    #[expect(clippy::len_without_is_empty, reason = "a field always has bytes")]
    pub const fn len(self) -> u32 {
        match self {
            Self::Protocol | Self::IcmpType | Self::IcmpCode => 1,
            Self::Port => 2,
            Self::Ipv4 | Self::Mark | Self::InterfaceIndex => 4,
            Self::InterfaceName => 16,
        }
    }

    /// Bytes that it takes in a key: registers are filled up to four.
    pub const fn padded(self) -> u32 {
        self.len().next_multiple_of(4)
    }
}

/// The fields of a set's key, in order: one, or a concatenation.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub Vec<Field>);

impl Key {
    /// Bytes: a single field is not filled up, those of a concatenation are.
    pub fn len(&self) -> u32 {
        match self.0.as_slice() {
            [one] => one.len(),
            fields => fields.iter().map(|field| field.padded()).sum(),
        }
    }

    /// Bytes that each field takes.
    pub fn widths(&self) -> Vec<usize> {
        match self.0.as_slice() {
            [one] => vec![one.len() as usize],
            fields => fields.iter().map(|field| field.padded() as usize).collect(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<const N: usize> From<[Field; N]> for Key {
    fn from(fields: [Field; N]) -> Self {
        Self(fields.to_vec())
    }
}
