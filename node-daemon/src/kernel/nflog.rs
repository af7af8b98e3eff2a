//! What the containers' firewall decided, as the kernel tells it: its rules log to one NFLOG group, which is read here.
//!
//! Woken by: records of the group (linux/netfilter/nfnetlink_log.h), alone within [`PATIENCE`] and in a flood several at
//! once. Emits: [`Event`]. What the kernel could not deliver is counted, and no error: it numbers its records.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, SystemTime};

use futures::stream::{Stream, unfold};
use netlink_packet_core::Nla;
use netlink_packet_netfilter::nflog::{
    ConfigCmd, ConfigFlags, ConfigMode, ConfigNla, PacketNla, TimeStamp, ULogMessage,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::libc::{EBUSY, EPERM};
use tokio::io::unix::AsyncFd;
use weft_model::traffic::{Decision, Packet, Record};

use super::socket::NetlinkSocket;

/// IPv4 with all its options, and the headers behind it.
const COPY: u32 = 128;
/// How long a record waits for others.
const PATIENCE: Duration = Duration::from_millis(20);
/// Records that are delivered together at the latest, and room for them: about 300 bytes each.
const TOGETHER: u32 = 32;
const ROOM: u32 = 16 << 10;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Decided(Record),
    /// The kernel had no room for so many records: nobody read them in time.
    Lost(u64),
    /// Another rule than ours logs to this group, or the packet is not IPv4.
    Foreign,
}

#[derive(Debug, thiserror::Error)]
pub enum NflogError {
    #[error("traffic_log_group: another program reads NFLOG group {group} already; choose another group")]
    Taken { group: u16 },
    #[error("listen to NFLOG group {group} (traffic_log_group)")]
    Listen {
        group: u16,
        #[source]
        source: io::Error,
    },
}

struct Watch {
    socket: AsyncFd<NetlinkSocket<NetfilterMessage>>,
    /// The number of the next record, if none is lost.
    next: u32,
    ready: VecDeque<Event>,
}

/// Starts to listen at once, in the network namespace of the calling thread; needs a tokio runtime. A group has one
/// reader: until a killed predecessor is out of the kernel, the group is [`NflogError::Taken`].
pub fn listen(group: u16) -> Result<impl Stream<Item = Event> + Send, NflogError> {
    let refused = |source| NflogError::Listen { group, source };
    let mut socket = NetlinkSocket::open(NETLINK_NETFILTER, 0).map_err(refused)?;
    let outcomes = socket.batch(vec![(bind(group), 0)]).map_err(refused)?;
    for outcome in outcomes {
        outcome.map_err(|refusal| match refusal.errno {
            // EPERM is another socket's group: without the rights to ask, opening ours would have failed.
            EPERM | EBUSY => NflogError::Taken { group },
            _ => refused(refusal.into()),
        })?;
    }
    socket.set_non_blocking().map_err(refused)?;
    #[expect(
        deprecated,
        reason = "its successor is unsafe because a type may lie about its descriptor; ours owns it"
    )]
    let socket = AsyncFd::new(socket).map_err(refused)?;
    let watch = Watch { socket, next: 0, ready: VecDeque::new() };
    Ok(unfold(watch, async |mut watch| {
        loop {
            if let Some(event) = watch.ready.pop_front() {
                return Some((event, watch));
            }
            watch.read().await;
        }
    }))
}

fn bind(group: u16) -> NetfilterMessage {
    let settings = vec![
        ConfigNla::Cmd(ConfigCmd::Bind),
        ConfigNla::Mode(ConfigMode::new_packet(COPY)),
        ConfigNla::Flags(ConfigFlags::SEQ),
        ConfigNla::NlBufSiz(ROOM),
        ConfigNla::Timeout(PATIENCE.into()),
        ConfigNla::QThresh(TOGETHER),
    ];
    NetfilterMessage::new(
        NetfilterHeader::new(NetfilterProtoFamily::IPv4, 0, group),
        ULogMessage::Config(settings),
    )
}

impl Watch {
    async fn read(&mut self) {
        let Ok(mut guard) = self.socket.readable_mut().await else { return };
        let read = guard.try_io(|socket| socket.get_mut().notifications());
        if let Ok(Ok(messages)) = read {
            #[expect(clippy::disallowed_methods, reason = "the kernel tells the time of some packets only")]
            let now = SystemTime::now();
            for (_, message) in messages {
                if let NetfilterMessageInner::ULog(ULogMessage::Packet(attributes)) = message.inner {
                    self.take(&attributes, now);
                }
            }
        }
        // An error says that records were lost (ENOBUFS): their numbers tell how many.
    }

    fn take(&mut self, attributes: &[PacketNla], now: SystemTime) {
        let number = attributes.iter().find_map(|attribute| match attribute {
            PacketNla::Seq(number) => Some(*number),
            _ => None,
        });
        if let Some(number) = number {
            let lost = number.wrapping_sub(self.next);
            self.next = number.wrapping_add(1);
            self.ready.extend((lost > 0).then_some(Event::Lost(lost.into())));
        }
        self.ready.push_back(record(attributes, now).map_or(Event::Foreign, Event::Decided));
    }
}

fn record(attributes: &[PacketNla], now: SystemTime) -> Option<Record> {
    let (mut decision, mut packet) = (None, None);
    let (mut at, mut incoming, mut outgoing, mut mark) = (now, None, None, 0);
    for attribute in attributes {
        match attribute {
            PacketNla::Prefix(prefix) => decision = prefix.to_str().ok()?.parse::<Decision>().ok(),
            PacketNla::Payload(bytes) => packet = Packet::parse(bytes),
            PacketNla::Timestamp(stamp) => at = time(stamp).unwrap_or(now),
            PacketNla::IfIndexInDev(index) => incoming = Some(*index),
            PacketNla::IfIndexOutDev(index) => outgoing = Some(*index),
            PacketNla::Mark(set) => mark = *set,
            _ => {}
        }
    }
    Some(Record { decision: decision?, at, incoming, outgoing, mark, packet: packet? })
}

/// Seconds and microseconds, in the network's byte order (struct nfulnl_msg_packet_timestamp); its fields are private.
fn time(stamp: &TimeStamp) -> Option<SystemTime> {
    let mut bytes = [0; 16];
    stamp.emit_value(bytes.get_mut(..stamp.value_len())?);
    let (seconds, micros) = (bytes.first_chunk()?, bytes.last_chunk()?);
    let seconds = Duration::from_secs(u64::from_be_bytes(*seconds));
    let micros = Duration::from_micros(u64::from_be_bytes(*micros));
    SystemTime::UNIX_EPOCH.checked_add(seconds.checked_add(micros)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_time_is_read() {
        let bytes = [1_500_923_950_u64.to_be_bytes(), 331_232_u64.to_be_bytes()].concat();
        let stamp = TimeStamp::parse(&bytes).expect("a time");
        let since = time(&stamp).and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
        assert_eq!(since, Some(Duration::new(1_500_923_950, 331_232_000)));
        let never = TimeStamp::parse(&[0xff; 16]).expect("a time");
        assert_eq!(time(&never), None);
    }

    #[test]
    fn gaps_in_the_numbers_are_lost_records() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        let _inside = runtime.enter();
        let socket = NetlinkSocket::open(NETLINK_NETFILTER, 0).expect("socket");
        #[expect(deprecated, reason = "as above")]
        let socket = AsyncFd::new(socket).expect("registered");
        let mut watch = Watch { socket, next: u32::MAX - 1, ready: VecDeque::new() };
        for number in [u32::MAX - 1, 2, 3] {
            watch.take(&[PacketNla::Seq(number)], SystemTime::UNIX_EPOCH);
        }
        let foreign = Event::Foreign;
        assert_eq!(watch.ready, [foreign.clone(), Event::Lost(3), foreign.clone(), foreign]);
    }
}
