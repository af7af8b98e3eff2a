//! A netlink socket that is written and read by one thread: many messages in one send, one acknowledgement each.
//!
//! Owns: framing, sequence numbers, buffers. Knows nothing of what is sent. It works in the network namespace in
//! which its thread was when it was opened.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkBuffer, NetlinkDeserializable,
    NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable, NlasIterator,
};
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

/// Messages in one send: their acknowledgements (about 1 KiB of the receive buffer each) must fit the buffer.
const BATCH: usize = 512;
const BUFFER: usize = 4 << 20;
/// A dump returns at most 32 KiB at once, whatever is offered; notifications are shorter.
pub(super) const READ: usize = 32 << 10;
/// An acknowledgement, or one object: sockets that live for one container need no more.
const ANSWER: usize = 8 << 10;
/// How often a dump is begun anew that was disturbed by changes.
const DUMP_TRIES: usize = 20;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;
/// The error's code and the header of the message that it answers.
const ERROR_PREFIX: usize = 4 + 16;

#[derive(Debug)]
pub(super) struct NetlinkSocket<M> {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
    speaks: PhantomData<fn() -> M>,
}

/// A message that the kernel did not carry out, with what it says about it beside the number.
#[derive(Debug, Clone)]
pub(super) struct Refusal {
    pub(super) errno: i32,
    text: Option<String>,
}

impl std::error::Error for Refusal {}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", nix::errno::Errno::from_raw(self.errno).desc())?;
        self.text.as_ref().map_or(Ok(()), |text| write!(f, ": {text}"))
    }
}

impl From<Refusal> for io::Error {
    fn from(refusal: Refusal) -> Self {
        if refusal.text.is_some() { Self::other(refusal) } else { Self::from_raw_os_error(refusal.errno) }
    }
}

/// One message as it was received.
enum Received<M> {
    Message(NetlinkHeader, M),
    /// An acknowledgement, the end of a dump, or the refusal of either.
    Answer(NetlinkHeader, Result<(), Refusal>),
}

/// A socket that says why it refuses something, with room for many messages.
pub(super) fn open(protocol: isize, groups: u32) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind(&SocketAddr::new(0, groups))?;
    socket.set_ext_ack(true)?;
    socket.set_cap_ack(true)?;
    setsockopt(&socket, sockopt::SndBufForce, &BUFFER)?;
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
    // The kernel answers before `send` returns; waiting longer means a bug, and must not hang the cell.
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(10, 0))?;
    Ok(socket)
}

impl<M: NetlinkSerializable + NetlinkDeserializable> NetlinkSocket<M> {
    /// `groups`: notifications to receive, as a mask (linux/rtnetlink.h, RTMGRP_*).
    pub(super) fn open(protocol: isize, groups: u32) -> io::Result<Self> {
        let socket = open(protocol, groups)?;
        // Dumps can be restricted to one device, and one that is asked for in a wrong way fails.
        socket.set_netlink_get_strict_chk(true)?;
        Ok(Self { socket, sequence: 0, buffer: Vec::new(), speaks: PhantomData })
    }

    pub(super) fn set_non_blocking(&self) -> io::Result<()> {
        self.socket.set_non_blocking(true)
    }

    /// Sends messages with their flags and says how each went, in order. Each is carried out, whatever became of
    /// those before it.
    pub(super) fn batch(&mut self, messages: Vec<(M, u16)>) -> io::Result<Vec<Result<(), Refusal>>> {
        let mut outcomes = Vec::with_capacity(messages.len());
        let mut messages = messages.into_iter();
        loop {
            let mut bytes = Vec::new();
            let first = self.sequence.wrapping_add(1);
            let mut sent = 0;
            for (message, flags) in messages.by_ref().take(BATCH) {
                self.write(message, NLM_F_REQUEST | NLM_F_ACK | flags, &mut bytes);
                sent += 1;
            }
            if sent == 0 {
                return Ok(outcomes);
            }
            self.socket.send(&bytes, 0)?;
            let begin = outcomes.len();
            while outcomes.len() - begin < sent {
                for received in self.read(ANSWER)? {
                    if let Received::Answer(header, result) = received
                        && header.sequence_number.wrapping_sub(first) as usize == outcomes.len() - begin
                    {
                        outcomes.push(result);
                    }
                }
            }
        }
    }

    /// The one object that a request names.
    pub(super) fn get(&mut self, request: M) -> io::Result<Result<M, Refusal>> {
        let mut bytes = Vec::new();
        self.write(request, NLM_F_REQUEST, &mut bytes);
        self.socket.send(&bytes, 0)?;
        loop {
            for received in self.read(ANSWER)? {
                match received {
                    Received::Message(header, message) if header.sequence_number == self.sequence => {
                        return Ok(Ok(message));
                    }
                    Received::Answer(header, Err(refusal)) if header.sequence_number == self.sequence => {
                        return Ok(Err(refusal));
                    }
                    _ => {}
                }
            }
        }
    }

    /// All objects that a request asks for, as of one moment.
    pub(super) fn dump(&mut self, request: impl Fn() -> M) -> io::Result<Vec<M>> {
        for _ in 0..DUMP_TRIES {
            let mut bytes = Vec::new();
            self.write(request(), NLM_F_REQUEST | NLM_F_DUMP, &mut bytes);
            self.socket.send(&bytes, 0)?;
            if let Some(all) = self.read_dump()? {
                return Ok(all);
            }
        }
        Err(io::Error::other(format!("changed while it was read, {DUMP_TRIES} times")))
    }

    /// None if the kernel says that it changed in between.
    fn read_dump(&mut self) -> io::Result<Option<Vec<M>>> {
        let mut all = Vec::new();
        let mut whole = true;
        loop {
            for received in self.read(READ)? {
                match received {
                    Received::Message(header, message) if header.sequence_number == self.sequence => {
                        whole &= header.flags & NLM_F_DUMP_INTR == 0;
                        all.push(message);
                    }
                    Received::Answer(header, result) if header.sequence_number == self.sequence => {
                        result?;
                        whole &= header.flags & NLM_F_DUMP_INTR == 0;
                        return Ok(whole.then_some(all));
                    }
                    _ => {}
                }
            }
        }
    }

    /// Notifications that have arrived, each with the port of the socket that caused it, or 0.
    pub(super) fn notifications(&mut self) -> io::Result<Vec<(u32, M)>> {
        let message = |received| match received {
            Received::Message(header, message) => Some((header.port_number, message)),
            Received::Answer(..) => None,
        };
        Ok(self.read(READ)?.into_iter().filter_map(message).collect())
    }

    fn write(&mut self, message: M, flags: u16, bytes: &mut Vec<u8>) {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let start = bytes.len();
        bytes.resize(start + message.buffer_len(), 0);
        message.serialize(&mut bytes[start..]);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }

    fn read(&mut self, most: usize) -> io::Result<Vec<Received<M>>> {
        self.buffer.clear();
        self.buffer.reserve(most);
        while let Err(e) = self.socket.recv(&mut self.buffer, 0) {
            if e.kind() != io::ErrorKind::Interrupted {
                return Err(e);
            }
        }
        let mut received = Vec::new();
        let mut rest = self.buffer.as_slice();
        while !rest.is_empty() {
            let frame = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?;
            let length = frame.length() as usize;
            received.extend(parse(&rest[..length]));
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(received)
    }
}

fn parse<M: NetlinkDeserializable>(bytes: &[u8]) -> Option<Received<M>> {
    let frame = NetlinkBuffer::new(bytes);
    let mut header = NetlinkHeader::default();
    header.message_type = frame.message_type();
    header.flags = frame.flags();
    header.sequence_number = frame.sequence_number();
    header.port_number = frame.port_number();
    let payload = frame.payload();
    match header.message_type {
        NLMSG_ERROR | NLMSG_DONE => {
            let code = payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
            let prefix = if header.message_type == NLMSG_ERROR { ERROR_PREFIX } else { 4 };
            let said = || payload.get(prefix..).filter(|_| header.flags & NLM_F_ACK_TLVS != 0).and_then(text);
            let result = if code == 0 { Ok(()) } else { Err(Refusal { errno: -code, text: said() }) };
            Some(Received::Answer(header, result))
        }
        _ => match M::deserialize(&header, payload) {
            Ok(message) => Some(Received::Message(header, message)),
            // Not one of ours, whose forms are known. A foreign object must not stop the cell.
            Err(e) => {
                tracing::warn!(kind = header.message_type, error = %e, "unreadable netlink message skipped");
                None
            }
        },
    }
}

fn text(attributes: &[u8]) -> Option<String> {
    let message = NlasIterator::new(attributes).flatten().find(|nla| nla.kind() == NLMSGERR_ATTR_MSG)?;
    Some(String::from_utf8_lossy(message.value()).trim_end_matches('\0').to_owned())
}

impl<M> AsFd for NetlinkSocket<M> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl<M> AsRawFd for NetlinkSocket<M> {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
