//! A container's limits as netlink messages, and what of them is there.
//!
//! What a container receives waits in a token bucket (tc-tbf(8)) at the cell's end of its link. What it sends comes in
//! there, where nothing can wait; it is redirected to an IFB device, waits in that one's bucket, and comes in again.

use std::collections::HashMap;
use std::io;

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, Nla, NlasIterator};
use netlink_packet_route::RouteNetlinkMessage as Rtnl;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcMessage, TcMirror,
    TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};
use nix::libc::{EEXIST, EINVAL, ENODEV, ENOENT};
use weft_model::address::OverlayAddr;
use weft_model::bandwidth::{Bandwidth, Limit, ShapingSpec, device_index};
use weft_model::cell::{Belief, Object};
use weft_model::link::index;

use super::dump::RouteSocket;
use super::message::{Request, delete_link, deletion, no_link_local, request, set_link};

const CREATE: u16 = NLM_F_CREATE | NLM_F_EXCL;
const REPLACE: u16 = NLM_F_CREATE | NLM_F_REPLACE;
/// Our buckets' handle ("we"): those of others, another plugin's for example, are not touched.
const BUCKET: TcHandle = TcHandle { major: 0x7765, minor: 0 };
/// The one handle of what stands before all that comes in (linux/pkt_sched.h, TC_H_INGRESS).
const INGRESS: TcHandle = TcHandle { major: 0xffff, minor: 0 };
/// Priority 1 and ETH_P_ALL, as tc-filters carry them in one number.
const ALL_PACKETS: u32 = 1 << 16 | (3u16.to_be() as u32);

// linux/pkt_sched.h, TCA_TBF_*; struct tc_tbf_qopt holds two rates of 12 bytes, and queue, buffer and MTU.
const PARMS: u16 = 1;
const RATE64: u16 = 4;
const BURST: u16 = 6;
const PARMS_LENGTH: usize = 36;
const RATE_AT: usize = 8;
const PEAK_AT: usize = 12;
const QUEUE_AT: usize = 24;
const BUFFER_AT: usize = 28;
/// TC_LINKLAYER_ETHERNET: the kernel needs no table of transmission times.
const ETHERNET: u8 = 1;
/// The kernel's unit of time in these messages.
const TICK_NS: u128 = 64;

/// Everything, on a link that is there. `newborn`: nothing was on it before.
pub(super) fn lay(spec: &ShapingSpec, was: Option<&Belief>, newborn: bool) -> Vec<Request> {
    let (link, Bandwidth { to, from }) = (index(spec.addr), spec.bandwidth);
    let redirected = matches!(was, Some(Belief::Holds(Object::Shaping(is))) if is.bandwidth.from.is_some());
    let mut all = Vec::new();
    match to {
        Some(limit) => all.push(bucket(link, limit)),
        None if !newborn => all.push(delete_bucket(link)),
        None => {}
    }
    let stays = redirected && from.is_some();
    if !newborn && !stays {
        all.push(delete_ingress(link));
    }
    match from {
        Some(limit) => {
            let device = spec.device_index();
            let exists = Request { tolerates: &[EEXIST], ..ifb(spec) };
            all.extend([exists, no_link_local(device)]);
            all.push(set_link("raise", device, Vec::new(), LinkFlags::Up));
            all.push(bucket(device, limit));
            if newborn || !stays {
                all.extend([ingress(link), redirect(link, device)]);
            }
        }
        None if !newborn => all.push(delete_link(&spec.device())),
        None => {}
    }
    all
}

/// Takes from a link what stays while the link does. The device goes as links go.
pub(super) fn unlay(addr: OverlayAddr) -> Vec<Request> {
    vec![delete_bucket(index(addr)), delete_ingress(index(addr))]
}

fn ifb(spec: &ShapingSpec) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = spec.device_index();
    message.attributes = vec![
        LinkAttribute::IfName(spec.device().to_string()),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Ifb)]),
    ];
    request("create the device of", Rtnl::NewLink(message), CREATE)
}

fn bucket(device: u32, limit: Limit) -> Request {
    let message = tc(device, TcHandle::ROOT, BUCKET, "tbf", tbf(limit));
    request("limit", Rtnl::NewQueueDiscipline(message), REPLACE)
}

fn tbf(limit: Limit) -> Vec<TcOption> {
    let mut parms = vec![0; PARMS_LENGTH];
    let short = u32::try_from(limit.rate()).unwrap_or(u32::MAX);
    parms[1] = ETHERNET;
    parms[RATE_AT..RATE_AT + 4].copy_from_slice(&short.to_ne_bytes());
    parms[PEAK_AT + 1] = ETHERNET;
    parms[QUEUE_AT..QUEUE_AT + 4].copy_from_slice(&limit.queue().to_ne_bytes());
    let option = |kind, bytes: &[u8]| TcOption::Other(DefaultNla::new(kind, bytes.to_vec()));
    vec![
        option(PARMS, &parms),
        option(RATE64, &limit.rate().to_ne_bytes()),
        option(BURST, &limit.burst().to_ne_bytes()),
    ]
}

fn delete_bucket(link: u32) -> Request {
    let message = Rtnl::DelQueueDiscipline(tc(link, TcHandle::ROOT, BUCKET, "tbf", Vec::new()));
    // EINVAL: another one stands there, or none.
    Request { tolerates: &[EINVAL, ENOENT, ENODEV], ..deletion("take the limit from", message) }
}

fn ingress(link: u32) -> Request {
    let message = tc(link, TcHandle::INGRESS, INGRESS, "ingress", Vec::new());
    request("look at what comes in by", Rtnl::NewQueueDiscipline(message), CREATE)
}

fn delete_ingress(link: u32) -> Request {
    let message = Rtnl::DelQueueDiscipline(tc(link, TcHandle::INGRESS, INGRESS, "ingress", Vec::new()));
    Request { tolerates: &[EINVAL, ENOENT, ENODEV], ..deletion("take the redirection from", message) }
}

/// All packets (a key that is no key): stolen here, and sent by the device.
fn redirect(link: u32, device: u32) -> Request {
    let mut generic = TcActionGeneric::default();
    generic.action = TcActionType::Stolen;
    let mut mirror = TcMirror::default();
    (mirror.generic, mirror.eaction, mirror.ifindex) = (generic, TcMirrorActionType::EgressRedir, device);
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.into()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    let mut selector = TcU32Selector::default();
    (selector.flags, selector.nkeys) = (TcU32SelectorFlags::Terminal, 1);
    selector.keys = vec![TcU32Key::default()];
    let options = vec![
        TcOption::U32(TcFilterU32Option::Selector(selector)),
        TcOption::U32(TcFilterU32Option::Action(vec![action])),
    ];
    let mut message = tc(link, INGRESS, TcHandle::UNSPEC, TcFilterU32::KIND, options);
    message.header.info = ALL_PACKETS;
    request("redirect what comes in by", Rtnl::NewTrafficFilter(message), CREATE)
}

fn tc(device: u32, parent: TcHandle, handle: TcHandle, kind: &str, options: Vec<TcOption>) -> TcMessage {
    let mut message = TcMessage::with_index(device.cast_signed());
    (message.header.parent, message.header.handle) = (parent, handle);
    message.attributes.push(TcAttribute::Kind(kind.into()));
    if !options.is_empty() {
        message.attributes.push(TcAttribute::Options(options));
    }
    message
}

// === what is there ===

/// Our buckets, by device. One that is not whole has no limit.
#[derive(Debug, Default)]
pub(super) struct Buckets(HashMap<u32, Option<Limit>>);

impl Buckets {
    pub(super) fn read(socket: &mut RouteSocket) -> io::Result<Self> {
        let all = socket.dump(|| Rtnl::GetQueueDiscipline(TcMessage::default()))?;
        let ours = all.into_iter().filter_map(|message| match message {
            Rtnl::NewQueueDiscipline(m) if m.header.handle == BUCKET && m.header.parent == TcHandle::ROOT => {
                Some((m.header.index.cast_unsigned(), limit(&m.attributes)))
            }
            _ => None,
        });
        Ok(Self(ours.collect()))
    }

    /// What is on the link of this address, and on the device beside it. `device`: whether that one, if there is one, has
    /// our index and is up.
    pub(super) fn of(
        &self,
        socket: &mut RouteSocket,
        addr: OverlayAddr,
        device: Option<bool>,
    ) -> io::Result<Option<Belief>> {
        let to = self.0.get(&index(addr)).copied();
        if to.is_none() && device.is_none() {
            return Ok(None);
        }
        let from = match device {
            None => Some(None),
            Some(true) if redirects(socket, index(addr), device_index(addr))? => {
                self.0.get(&device_index(addr)).copied().flatten().map(Some)
            }
            Some(_) => None,
        };
        let to = to.map_or(Some(None), |limit| limit.map(Some));
        let whole = to
            .zip(from)
            .map(|(to, from)| Object::Shaping(ShapingSpec { addr, bandwidth: Bandwidth { to, from } }));
        Ok(Some(whole.map_or(Belief::Unknown, Belief::Holds)))
    }
}

fn limit(attributes: &[TcAttribute]) -> Option<Limit> {
    let options = attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => options.first(),
        _ => None,
    })?;
    let mut bytes = vec![0; options.value_len()];
    options.emit_value(&mut bytes);
    let nlas: HashMap<u16, Vec<u8>> =
        NlasIterator::new(&bytes).flatten().map(|nla| (nla.kind(), nla.value().to_vec())).collect();
    let parms = nlas.get(&PARMS)?;
    let number = |at: usize| Some(u32::from_ne_bytes(*parms.get(at..)?.first_chunk()?));
    let long = nlas.get(&RATE64).and_then(|bytes| bytes.first_chunk()).map(|rate| u64::from_ne_bytes(*rate));
    let limit = Limit::of_queue(long.unwrap_or(number(RATE_AT)?.into()), number(QUEUE_AT)?)?;
    (number(PEAK_AT + RATE_AT)? == 0 && is_time_of(limit, number(BUFFER_AT)?)).then_some(limit)
}

/// Whether the kernel's buffer, a time, is that of the limit's burst, rounded as it may be. It shows 32 bits of it.
#[expect(clippy::cast_possible_truncation, reason = "the kernel truncates as well")]
fn is_time_of(limit: Limit, ticks: u32) -> bool {
    let expected = u128::from(limit.burst()) * 1_000_000_000 / u128::from(limit.rate()) / TICK_NS;
    let off = ticks.wrapping_sub(expected as u32).cast_signed().unsigned_abs();
    u128::from(off) <= expected / 1000 + 2
}

/// Whether all that comes in by a link goes to the device, and only there.
fn redirects(socket: &mut RouteSocket, link: u32, device: u32) -> io::Result<bool> {
    let request = || {
        let mut message = TcMessage::with_index(link.cast_signed());
        message.header.parent = INGRESS;
        Rtnl::GetTrafficFilter(message)
    };
    let filters = match socket.dump(request) {
        Err(gone) if gone.raw_os_error() == Some(ENODEV) => return Ok(false),
        filters => filters?,
    };
    let options: Vec<TcFilterU32Option> = filters
        .into_iter()
        .filter_map(|message| match message {
            Rtnl::NewTrafficFilter(message) => Some(message.attributes),
            _ => None,
        })
        .flatten()
        .filter_map(|attribute| match attribute {
            TcAttribute::Options(options) => Some(options),
            _ => None,
        })
        .flatten()
        .filter_map(|option| match option {
            TcOption::U32(option) => Some(option),
            _ => None,
        })
        .collect();
    let keys = options.iter().filter_map(|option| match option {
        TcFilterU32Option::Selector(selector) => Some(&selector.keys),
        _ => None,
    });
    let matches_all = keys.flatten().all(|key| key.mask == 0 && key.val == 0);
    let targets = options.iter().filter_map(|option| match option {
        TcFilterU32Option::Action(actions) => Some(actions.iter().filter_map(target)),
        _ => None,
    });
    Ok(matches_all && targets.flatten().eq([device]))
}

fn target(action: &TcAction) -> Option<u32> {
    let options = action.attributes.iter().find_map(|attribute| match attribute {
        TcActionAttribute::Options(options) => Some(options),
        _ => None,
    })?;
    options.iter().find_map(|option| match option {
        TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))
            if mirror.eaction == TcMirrorActionType::EgressRedir =>
        {
            Some(mirror.ifindex)
        }
        _ => None,
    })
}
