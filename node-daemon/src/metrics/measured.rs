//! What is read when metrics are asked for: packets and bytes of containers and of the overlay, the firewall's size, and
//! how old the policy server's answers are.
//!
//! Woken by a scrape: [`Measured::measure`] reads the links in one dump, beside the cell's task, and asks that task for the
//! firewall's size. What takes longer than [`WITHIN`] is left out of the answer. Nothing is read for nobody, and no ADD
//! waits for it, but for the task's own count.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use tracing::debug;
use weft_daemon::cause::chain;
use weft_model::address::DeviceName;
use weft_model::container::Container;
use weft_model::firewall::Size;
use weft_model::follow::Subject;

use super::word;
use crate::directory::Directory;
use crate::inbox::Inbox;
use crate::kernel::{LinkCounters, Traffic};
use crate::policy_server::{Known, now};

/// For all that is read at once.
const WITHIN: Duration = Duration::from_secs(2);
/// Of what the platform says of a container's owner, so many characters are told: it decides the size of the answer.
const LONGEST: usize = 128;

/// What there is to read from.
#[derive(Debug)]
pub struct Sources {
    pub vtep: DeviceName,
    pub inbox: Inbox,
    pub links: LinkCounters,
    /// Whose containers there are.
    pub directory: Directory,
    /// None: there is no policy server.
    pub known: Option<watch::Receiver<Known>>,
}

#[derive(Debug)]
pub struct Measured {
    vtep: DeviceName,
    inbox: Inbox,
    links: Mutex<LinkCounters>,
    directory: Directory,
    known: Option<watch::Receiver<Known>>,
    last: Mutex<Reading>,
}

/// Of one scrape; none: not read in time.
#[derive(Debug, Default)]
struct Reading {
    links: Option<Vec<Traffic>>,
    size: Option<Size>,
}

impl Measured {
    pub fn new(Sources { vtep, inbox, links, directory, known }: Sources) -> Arc<Self> {
        let (links, last) = (Mutex::new(links), Mutex::default());
        Arc::new(Self { vtep, inbox, links, directory, known, last })
    }

    pub async fn measure(self: Arc<Self>) {
        let reader = Arc::clone(&self);
        let read = spawn_blocking(move || {
            // If an earlier reading is not done, another would wait as well.
            let mut links = reader.links.try_lock().ok()?;
            links.read().inspect_err(|error| debug!(error = %chain(error), "links' counters not read")).ok()
        });
        let (links, size) = tokio::join!(timeout(WITHIN, read), timeout(WITHIN, self.inbox.measure()));
        let reading = Reading {
            links: links.ok().and_then(Result::ok).flatten(),
            size: size.ok().and_then(Result::ok),
        };
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = reading;
    }
}

impl Collector for Measured {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Size { rules, elements }) = last.size {
            gauge(&mut encoder, "weft_node_firewall_rules", "Rules in the firewall's program", rules)?;
            let help = "Elements of the firewall's sets and maps";
            gauge(&mut encoder, "weft_node_firewall_elements", help, elements)?;
        }
        if let Some(links) = &last.links {
            gauge(&mut encoder, "weft_node_interfaces", "Network devices of the cell", links.len())?;
            containers(&mut encoder, links, &self.directory)?;
            overlay(&mut encoder, links, &self.vtep)?;
        }
        match &self.known {
            Some(known) => ages(&mut encoder, &known.borrow(), now()),
            None => Ok(()),
        }
    }
}

type Labels<'a> = Vec<(&'static str, &'a str)>;

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: usize) -> fmt::Result {
    let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
    gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
}

fn counters<'a>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help): (&str, &str),
    values: impl Iterator<Item = (Labels<'a>, u64)>,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in values {
        ConstCounter::new(value).encode(metric.encode_family(&labels)?)?;
    }
    Ok(())
}

/// What a container has sent is what its link's end on the cell has received.
fn containers(encoder: &mut DescriptorEncoder<'_>, links: &[Traffic], directory: &Directory) -> fmt::Result {
    let known: Vec<(Arc<Container>, &Traffic)> =
        links.iter().filter_map(|link| Some((directory.present(link.container?.get())?, link))).collect();
    let labelled = |value: fn(&Traffic) -> [u64; 2]| {
        known.iter().flat_map(move |(container, link)| {
            ["received", "sent"].into_iter().zip(value(link)).map(|(direction, value)| {
                let owner = &container.owner;
                let labels = vec![
                    ("handle", container.handle.as_str()),
                    ("app", cut(&owner.app_id)),
                    ("space", cut(&owner.space_id)),
                    ("org", cut(&owner.org_id)),
                    ("direction", direction),
                ];
                (labels, value)
            })
        })
    };
    let bytes = ("weft_node_container_bytes", "Bytes of IP packets and their link headers, by container");
    counters(encoder, bytes, labelled(|link| [link.sent_bytes, link.received_bytes]))?;
    let packets = ("weft_node_container_packets", "Packets, by container");
    counters(encoder, packets, labelled(|link| [link.sent_packets, link.received_packets]))
}

fn overlay(encoder: &mut DescriptorEncoder<'_>, links: &[Traffic], vtep: &DeviceName) -> fmt::Result {
    let Some(link) = links.iter().find(|link| link.name == vtep.as_str()) else { return Ok(()) };
    let both = |values: [u64; 2]| {
        let directions = ["received", "sent"].map(|direction| vec![("direction", direction)]);
        directions.into_iter().zip(values)
    };
    let bytes = ("weft_node_overlay_bytes", "Bytes on the VXLAN device");
    counters(encoder, bytes, both([link.received_bytes, link.sent_bytes]))?;
    let dropped = ("weft_node_overlay_dropped", "Packets that the VXLAN device dropped");
    counters(encoder, dropped, both([link.received_dropped, link.sent_dropped]))
}

fn ages(encoder: &mut DescriptorEncoder<'_>, known: &Known, now: SystemTime) -> fmt::Result {
    let policies = known.policies.as_ref().map(|told| (Subject::Policies, told.at));
    let groups = known.groups.as_ref().map(|told| (Subject::Groups, told.at));
    let help = "Since the policy server last confirmed what is in force";
    let unit = Some(&Unit::Seconds);
    let mut metric = encoder.encode_descriptor("weft_node_answer_age", help, unit, MetricType::Gauge)?;
    for (subject, at) in policies.into_iter().chain(groups) {
        let age = now.duration_since(at).unwrap_or_default().as_secs_f64();
        ConstGauge::new(age).encode(metric.encode_family(&[("subject", word(subject))])?)?;
    }
    Ok(())
}

fn cut(text: &str) -> &str {
    text.char_indices().nth(LONGEST).map_or(text, |(end, _)| &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    use prometheus_client::encoding::text;
    use prometheus_client::registry::Registry;
    use weft_model::address::OverlayAddr;
    use weft_model::container::Owner;

    use crate::directory;
    use crate::directory::tests::container;
    use crate::policy_server::Told;

    #[derive(Debug)]
    struct Once(Vec<Traffic>, Directory, Known);

    impl Collector for Once {
        fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
            containers(&mut encoder, &self.0, &self.1)?;
            ages(&mut encoder, &self.2, SystemTime::UNIX_EPOCH + Duration::from_secs(90))
        }
    }

    fn told(links: Vec<Traffic>, directory: Directory, known: Known) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Once(links, directory, known)));
        let mut told = String::new();
        text::encode(&mut told, &registry).expect("text");
        told
    }

    fn link(addr: Option<Ipv4Addr>) -> Traffic {
        Traffic {
            name: "device".into(),
            container: addr.map(OverlayAddr::new),
            received_bytes: 1,
            received_packets: 2,
            received_dropped: 3,
            sent_bytes: 4,
            sent_packets: 5,
            sent_dropped: 6,
        }
    }

    /// What comes from the platform cannot break a line, nor make it long.
    #[test]
    fn labels_are_escaped_and_cut() {
        let addr = Ipv4Addr::new(10, 255, 30, 2);
        let owner =
            Owner { app_id: "a\"}\n\\b".into(), space_id: "ü".repeat(LONGEST + 9), ..Owner::default() };
        let directory = directory::tests::directory(container(addr, owner));
        // Of devices that are nobody's, and of links that nobody knows, nothing is told.
        let links = vec![link(Some(addr)), link(None), link(Some(Ipv4Addr::new(10, 255, 30, 3)))];
        let text = told(links, directory, Known::default());
        let labels = format!(r#"handle="handle-1",app="a\"}}\n\\b",space="{}",org="","#, "ü".repeat(LONGEST));
        for line in [
            format!(r#"weft_node_container_bytes_total{{{labels}direction="received"}} 4"#),
            format!(r#"weft_node_container_bytes_total{{{labels}direction="sent"}} 1"#),
            format!(r#"weft_node_container_packets_total{{{labels}direction="received"}} 5"#),
            format!(r#"weft_node_container_packets_total{{{labels}direction="sent"}} 2"#),
        ] {
            assert!(text.lines().any(|is| is == line), "{line}\n{text}");
        }
        assert_eq!(text.lines().filter(|line| line.starts_with("weft_node_container_")).count(), 4, "{text}");
    }

    #[test]
    fn an_age_is_told_of_what_is_known() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(60);
        let policies = Some(Told { value: Arc::default(), ids: Arc::default(), at, number: 1 });
        let text = told(Vec::new(), Directory::default(), Known { policies, ..Known::default() });
        let ages: Vec<&str> = text.lines().filter(|line| line.starts_with("weft_node_answer_age")).collect();
        assert_eq!(ages, [r#"weft_node_answer_age_seconds{subject="policies"} 30.0"#]);
    }
}
