//! Netlink's envelope: messages and attributes, written and read (include/uapi/linux/netlink.h, and nfgenmsg of
//! linux/netfilter/nfnetlink.h). Numbers inside attributes of nf_tables are big-endian, headers are the machine's.
//!
//! Reading takes foreign bytes: what does not fit ends the walk, and nothing panics.

use crate::constants::{NFNETLINK_V0, NLA_F_NESTED, NLA_F_NET_BYTEORDER};

/// Bytes of `struct nlmsghdr`.
pub(crate) const HEADER: usize = 16;
/// Bytes of `struct nfgenmsg`.
pub(crate) const FAMILY_HEADER: usize = 4;
/// Bytes of `struct nlattr`.
const ATTRIBUTE: usize = 4;
/// What an attribute can hold: its length, header included, is 16 bits.
pub(crate) const ROOM: usize = u16::MAX as usize - ATTRIBUTE;

/// What begins a message of nfnetlink.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Head {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    pub(crate) family: u8,
    /// A batch's ends name their subsystem; 0 elsewhere.
    pub(crate) resource: u16,
}

/// Messages, one behind the other.
#[derive(Debug, Default)]
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub(crate) fn message(&mut self, head: Head, body: impl FnOnce(&mut Self)) {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 4]);
        self.0.extend_from_slice(&head.kind.to_ne_bytes());
        self.0.extend_from_slice(&head.flags.to_ne_bytes());
        self.0.extend_from_slice(&head.sequence.to_ne_bytes());
        // The kernel answers to the port that the socket is bound to.
        self.0.extend_from_slice(&[0; 4]);
        self.0.extend_from_slice(&[head.family, NFNETLINK_V0]);
        self.0.extend_from_slice(&head.resource.to_be_bytes());
        body(self);
        let length = u32::try_from(self.0.len() - start).expect("a few attributes of 64 KiB at most");
        self.0[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }

    /// Sets flags of the message that starts there.
    pub(crate) fn flag(&mut self, start: usize, flags: u16) {
        if let Some(place) = self.0[start..].first_chunk_mut::<8>() {
            let old = u16::from_ne_bytes([place[6], place[7]]);
            place[6..].copy_from_slice(&(old | flags).to_ne_bytes());
        }
    }

    /// Room for so many bytes more, so that growing copies nothing.
    pub(crate) fn reserve(&mut self, more: usize) {
        self.0.reserve(more);
    }

    pub(crate) fn bytes(&mut self, kind: u16, value: &[u8]) {
        let length = length(ATTRIBUTE + value.len()).to_ne_bytes();
        let kind = kind.to_ne_bytes();
        self.0.extend_from_slice(&[length[0], length[1], kind[0], kind[1]]);
        self.0.extend_from_slice(value);
        self.pad();
    }

    pub(crate) fn byte(&mut self, kind: u16, value: u8) {
        self.bytes(kind, &[value]);
    }

    pub(crate) fn be16(&mut self, kind: u16, value: u16) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub(crate) fn be32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub(crate) fn be64(&mut self, kind: u16, value: u64) {
        self.bytes(kind, &value.to_be_bytes());
    }

    /// With a zero at the end.
    pub(crate) fn text(&mut self, kind: u16, value: &str) {
        self.attribute(kind, |out| {
            out.0.extend_from_slice(value.as_bytes());
            out.0.push(0);
        });
    }

    pub(crate) fn nest(&mut self, kind: u16, body: impl FnOnce(&mut Self)) {
        self.attribute(kind | NLA_F_NESTED, body);
    }

    fn attribute(&mut self, kind: u16, body: impl FnOnce(&mut Self)) {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; ATTRIBUTE]);
        body(self);
        let length = length(self.0.len() - start);
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.0[start + 2..start + ATTRIBUTE].copy_from_slice(&kind.to_ne_bytes());
        self.pad();
    }

    fn pad(&mut self) {
        let whole = self.0.len().next_multiple_of(4);
        // Most attributes end on a whole word.
        if whole > self.0.len() {
            self.0.resize(whole, 0);
        }
    }

    /// Takes back all but the first so many bytes.
    pub(crate) fn cut(&mut self, bytes: usize) {
        self.0.truncate(bytes);
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// Of an attribute. Cut short it could be a wider rule.
fn length(bytes: usize) -> u16 {
    u16::try_from(bytes).expect("an attribute of nf_tables is at most 64 KiB")
}

/// A netlink message as received, envelope taken off.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Received<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    pub(crate) port: u32,
    pub(crate) body: &'a [u8],
}

/// The first message of a buffer and the bytes behind it; none if it is not whole.
pub(crate) fn first(buffer: &[u8]) -> Option<(Received<'_>, &[u8])> {
    let (header, _) = buffer.split_first_chunk::<HEADER>()?;
    let length = usize::try_from(word(header, 0)?).ok()?;
    let body = buffer.get(HEADER..length)?;
    let received = Received {
        kind: half(header, 4)?,
        flags: half(header, 6)?,
        sequence: word(header, 8)?,
        port: word(header, 12)?,
        body,
    };
    // The last message's filling may be missing.
    let rest = buffer.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((received, rest))
}

/// In the machine's byte order.
pub(crate) fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_ne_bytes)
}

/// In the machine's byte order.
pub(crate) fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

/// Attributes one behind the other: each one's type, without its flags, and what it holds. Ends where they end, or where
/// one does not fit.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Attributes<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(half(self.0, 0)?);
        let kind = half(self.0, 2)? & !(NLA_F_NESTED | NLA_F_NET_BYTEORDER);
        let value = self.0.get(ATTRIBUTE..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

impl<'a> Attributes<'a> {
    pub(crate) fn bytes(self, kind: u16) -> Option<&'a [u8]> {
        { self }.find_map(|(found, value)| (found == kind).then_some(value))
    }

    pub(crate) fn has(self, kind: u16) -> bool {
        self.bytes(kind).is_some()
    }

    pub(crate) fn nest(self, kind: u16) -> Option<Self> {
        self.bytes(kind).map(Attributes)
    }

    pub(crate) fn byte(self, kind: u16) -> Option<u8> {
        match self.bytes(kind)? {
            [byte] => Some(*byte),
            _ => None,
        }
    }

    pub(crate) fn be16(self, kind: u16) -> Option<u16> {
        self.bytes(kind)?.try_into().ok().map(u16::from_be_bytes)
    }

    pub(crate) fn be32(self, kind: u16) -> Option<u32> {
        self.bytes(kind)?.try_into().ok().map(u32::from_be_bytes)
    }

    pub(crate) fn be64(self, kind: u16) -> Option<u64> {
        self.bytes(kind)?.try_into().ok().map(u64::from_be_bytes)
    }

    /// Up to the first zero.
    pub(crate) fn text(self, kind: u16) -> Option<&'a str> {
        text(self.bytes(kind)?)
    }
}

/// Up to the first zero.
pub(crate) fn text(bytes: &[u8]) -> Option<&str> {
    bytes.split(|byte| *byte == 0).next().and_then(|text| std::str::from_utf8(text).ok())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEAD: Head = Head { kind: 0xa06, flags: 1, sequence: 7, family: 1, resource: 0 };

    proptest! {
        #[test]
        fn attributes_are_read_as_written(all in prop::collection::vec((1u16..100, prop::collection::vec(any::<u8>(), 0..40)), 0..10)) {
            let mut out = Writer::default();
            out.message(HEAD, |out| out.nest(3, |out| all.iter().for_each(|(kind, value)| out.bytes(*kind, value))));
            let bytes = out.into_bytes();
            let (message, rest) = first(&bytes).expect("a message");
            prop_assert!(rest.is_empty());
            prop_assert_eq!((message.kind, message.flags, message.sequence, message.port), (0xa06, 1, 7, 0));
            let inner = Attributes(&message.body[FAMILY_HEADER..]).nest(3).expect("the nest");
            let read: Vec<(u16, Vec<u8>)> = inner.map(|(kind, value)| (kind, value.to_vec())).collect();
            prop_assert_eq!(read, all);
        }

        #[test]
        fn foreign_bytes_end_the_walk(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut rest = bytes.as_slice();
            while let Some((message, behind)) = first(rest) {
                prop_assert!(behind.len() < rest.len());
                let _ = Attributes(message.body).count();
                rest = behind;
            }
            let _: usize = Attributes(&bytes).map(|(_, value)| Attributes(value).count()).sum();
        }
    }

    #[test]
    fn the_last_one_needs_no_filling() {
        let bytes = [&6_u16.to_ne_bytes()[..], &1_u16.to_ne_bytes(), &[7, 8]].concat();
        assert_eq!(Attributes(&bytes).collect::<Vec<_>>(), [(1, &[7, 8][..])]);
        let longer = [&7_u16.to_ne_bytes()[..], &bytes[2..]].concat();
        assert_eq!(Attributes(&longer).count(), 0);
    }

    #[test]
    fn a_flag_is_added_to_the_message_it_is_for() {
        let mut out = Writer::default();
        out.message(HEAD, |_| ());
        let second = out.len();
        out.message(HEAD, |_| ());
        out.flag(second, 4);
        let bytes = out.into_bytes();
        let (one, rest) = first(&bytes).expect("one");
        let (two, _) = first(rest).expect("two");
        assert_eq!((one.flags, two.flags), (1, 5));
    }
}
