//! Limits of connections: by rate, by number; and what becomes of both when the kernel cannot count any more.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use weft_model::cell::{Key, Object, Step};
use weft_model::firewall::explain::{Probe, Verdict};
use weft_model::firewall::{Content, Part};
use weft_model::profile::{ConnectionRate, Profile};

use crate::cast::open;
use crate::packet::Packet;
use crate::watch::{Fate, Speaker, Watch};
use crate::world::{Instance, World};

const FAR: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

fn count(n: u32) -> NonZeroU32 {
    NonZeroU32::new(n).expect("not none")
}

fn with_rate(burst: u32, per_sec: u32, dry_run: bool) -> Profile {
    let rate = ConnectionRate { burst: count(burst), per_sec: count(per_sec), dry_run, log: false };
    let mut profile = open();
    profile.settings.outbound_connections.rate = Some(rate);
    profile
}

fn with_max(max: u32) -> Profile {
    let mut profile = open();
    profile.settings.outbound_connections.max = Some(count(max));
    profile
}

struct Counted {
    world: World,
    watch: Watch,
}

impl Counted {
    async fn new() -> Self {
        let mut world = World::new(true).await;
        let neighbour = world.site.add(Profile::default(), &[]).await;
        let watch = Watch::new(&mut world, &neighbour).await;
        Self { world, watch }
    }

    /// Sends the first packets of so many connections. How many of them arrive, one after the other.
    fn passes(&self, from: &Instance, probe: Probe, ids: std::ops::Range<u16>) -> Vec<bool> {
        let speaker = Speaker::of(from);
        let packets: Vec<Packet> = ids.map(|id| speaker.packet(FAR, probe, id)).collect();
        let fates = self.watch.fates(&speaker, &packets);
        let passes = |fate: &Fate| match fate {
            Fate::Arrived { .. } => true,
            Fate::Refused => false,
            Fate::Dropped => panic!("dropped without a word"),
        };
        fates.iter().map(passes).collect()
    }
}

fn tcp(port: u16) -> Probe {
    Probe::Tcp { port }
}

/// dataplane.md, "To the world", 6.
#[tokio::test]
async fn new_connections_to_one_destination_are_limited_beyond_a_burst() {
    let mut counted = Counted::new().await;
    let limited = counted.world.site.add(with_rate(5, 2, false), &[]).await;
    let other = counted.world.site.add(with_rate(5, 2, false), &[]).await;
    let begun = Instant::now();
    let passes = counted.passes(&limited, tcp(80), 1..21);
    // Two more for each second that it took, however slow the machine is.
    let more = usize::try_from(begun.elapsed().as_secs()).expect("seconds") * 2 + 2;
    let passed = passes.iter().filter(|passes| **passes).count();
    assert_eq!(passes[..5], [true; 5], "the burst");
    assert!((5..=5 + more).contains(&passed) && passed < 20, "{passed} of 20, {more} by time");
    // Others have bursts of their own: another port, another container; and UDP is not counted.
    assert_eq!(counted.passes(&limited, tcp(81), 21..26), [true; 5]);
    assert_eq!(counted.passes(&other, tcp(80), 26..31), [true; 5]);
    assert_eq!(counted.passes(&limited, Probe::Udp { port: 80 }, 31..51), [true; 20]);
    // The first packet of a connection is what `explain` speaks of.
    let told = counted.world.site.explain(limited.addr, FAR, tcp(80)).await;
    assert_eq!(told.verdict, Verdict::Allowed);
}

#[tokio::test]
async fn a_rate_that_is_only_tried_refuses_nothing() {
    let mut counted = Counted::new().await;
    let limited = counted.world.site.add(with_rate(5, 2, true), &[]).await;
    assert_eq!(counted.passes(&limited, tcp(80), 1..21), [true; 20]);
}

/// A limit is no permission.
#[tokio::test]
async fn within_a_rate_only_what_a_security_group_allows_passes() {
    let mut counted = Counted::new().await;
    let profile = Profile { rules: Vec::new(), ..with_rate(5, 2, false) };
    let limited = counted.world.site.add(profile, &[]).await;
    assert_eq!(counted.passes(&limited, tcp(80), 1..4), [false; 3]);
}

/// dataplane.md, "To the world", 5.
#[tokio::test]
async fn as_many_connections_are_held_as_are_allowed() {
    let mut world = World::new(true).await;
    let (held, other) = (world.site.add(with_max(40), &[]).await, world.site.add(with_max(40), &[]).await);
    let _listener = world.outside.enter(|| TcpListener::bind((FAR, 80))).expect("listening");
    let to = SocketAddr::from((FAR, 80));
    let connect =
        |from: &Instance| from.space.enter(|| TcpStream::connect_timeout(&to, Duration::from_secs(10)));
    let refused = |from: &Instance| match connect(from) {
        Ok(_) => false,
        Err(e) => {
            assert_eq!(e.kind(), ErrorKind::ConnectionRefused, "{e}");
            true
        }
    };
    let mut streams: Vec<TcpStream> =
        (0..40).map(|n| connect(&held).unwrap_or_else(|e| panic!("{n}: {e}"))).collect();
    assert!(refused(&held), "one too many");
    assert!(!refused(&other), "another container has its own");
    // Whoever hangs up leaves room: the kernel counts those that are alive.
    for stream in streams.drain(..10) {
        rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).expect("reset at its end");
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    for n in 0..10 {
        loop {
            assert!(Instant::now() < deadline, "only {n} of 10 came free");
            if let Ok(stream) = connect(&held) {
                streams.push(stream);
                break;
            }
        }
    }
    assert!(refused(&held), "full again");
}

/// Sets of that name take no more than this: the same program, on a smaller machine.
fn smaller(step: &mut Step, prefix: &str, size: u32) {
    let mut found = 0;
    for change in &mut step.firewall.changes {
        if let (Key::Firewall(Part::Set(name)), Some(Object::Firewall(Content::Set(set)))) =
            (&change.key, &mut change.will)
            && name.as_str().starts_with(prefix)
        {
            let set = Arc::make_mut(set);
            let dynamic = set.set.dynamic.as_mut().expect("a set that counts");
            assert!(dynamic.size > 1000, "as large as the page says");
            dynamic.size = size;
            found += 1;
        }
    }
    assert_eq!(found, 1, "the set is in this step");
}

/// dataplane.md, "To the world", 6: a full table is no hole.
#[tokio::test]
async fn a_connection_that_cannot_be_counted_by_rate_is_refused() {
    for full in [false, true] {
        let mut counted = Counted::new().await;
        // Nothing is forgotten while this runs: a burst that takes so long to come back.
        let profile = with_rate(10_000, 1, false);
        let limited = counted.world.site.wish(profile.clone(), &[]);
        counted
            .world
            .site
            .step(|step| {
                if full {
                    smaller(step, "rate-", 2)
                }
            })
            .await;
        counted.world.site.lay_inside(&limited).await;
        let passes = |port, id| counted.passes(&limited, tcp(port), id..id + 3);
        assert_eq!(passes(1, 1), [true; 3]);
        assert_eq!(passes(2, 4), [true; 3]);
        assert_eq!(passes(3, 7), [!full; 3], "the third destination");
        assert_eq!(passes(4, 10), [!full; 3]);
        assert_eq!(passes(1, 13), [true; 3], "those that are counted go on");
        assert_eq!(counted.passes(&limited, Probe::Udp { port: 3 }, 16..19), [true; 3]);
    }
}

/// The same of connections at once; here the set has an element for each container that has some.
#[tokio::test]
async fn a_connection_of_a_container_that_cannot_be_counted_is_refused() {
    for full in [false, true] {
        let mut counted = Counted::new().await;
        let first = counted.world.site.wish(with_max(5), &[]);
        counted
            .world
            .site
            .step(|step| {
                if full {
                    smaller(step, "connections-", 2)
                }
            })
            .await;
        counted.world.site.lay_inside(&first).await;
        let second = counted.world.site.add(with_max(5), &[]).await;
        let third = counted.world.site.add(with_max(5), &[]).await;
        // What asks and gets no answer is a connection for half a minute and more.
        assert_eq!(counted.passes(&first, tcp(80), 1..4), [true; 3]);
        assert_eq!(counted.passes(&second, tcp(80), 4..7), [true; 3]);
        assert_eq!(counted.passes(&third, tcp(80), 7..10), [!full; 3]);
        assert_eq!(
            counted.passes(&third, Probe::Udp { port: 80 }, 10..13),
            [!full, !full, false],
            "five at once"
        );
        assert_eq!(counted.passes(&first, tcp(80), 13..17), [true, true, false, false], "five at once");
    }
}
