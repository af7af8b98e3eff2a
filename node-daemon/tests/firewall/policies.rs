//! Policies and security groups that change while packets fly: what both the old and the new ones allow is not stopped.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use weft_model::asg::{PortRange, Traffic};
use weft_model::container::Owner;
use weft_model::firewall::explain::Probe;
use weft_model::policy::{Policy, PolicyTag, by_app};
use weft_model::profile::{Profile, Transport};

use crate::cast::{ports, rule};
use crate::packet::{Ears, Packet};
use crate::watch::Speaker;
use crate::world::{Instance, Site, World};

const PORT: u16 = 8080;
const FAR: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
/// Who refuses is the firewall, and not who receives.
const MUTE: &str =
    "nft 'add table ip mute; add chain ip mute out { type filter hook output priority 0; policy drop; }'";

/// A container of an app, if it has a name.
async fn container(site: &mut Site, app: &str, profile: Profile) -> Instance {
    let owner = Owner { policy_group_id: app.into(), ..Owner::default() };
    let instance = site.wish_of(owner, profile, &[]);
    site.settle().await;
    site.lay_inside(&instance).await;
    instance
}

/// Sends without a pause to a port that is allowed all the time, while 500 changes are made. Returns how many packets were
/// sent, how many were heard, and whether the sender was told that one was refused.
async fn through(
    world: &mut World,
    from: &Instance,
    to: Ipv4Addr,
    ears: Ears,
    change: impl Fn(&mut Site, u16),
) -> (usize, usize, bool) {
    let end = Arc::new(AtomicBool::new(false));
    let (speaker, ended) = (Speaker::of(from), Arc::clone(&end));
    let flood = thread::spawn(move || {
        let packet = speaker.packet(to, Probe::Udp { port: PORT }, 1);
        let mut sent = 0_usize;
        while !ended.load(Ordering::Relaxed) {
            let source_port = 1024 + u16::try_from(sent % 60_000).expect("16 bits");
            speaker.send(&Packet { source_port, ..packet });
            sent += 1;
        }
        sent
    });
    let told = Ears::in_space(&from.space, &[1]);
    let (mut heard, mut refused) = (0, false);
    let mut listen = || {
        heard += ears.hear().iter().filter(|heard| heard.id == 1).count();
        refused |= told.hear().iter().any(|heard| heard.refuses().is_some());
        heard
    };
    for n in 0..500 {
        change(&mut world.site, n);
        world.site.settle().await;
        listen();
    }
    end.store(true, Ordering::Relaxed);
    let sent = flood.join().expect("sent");
    let deadline = Instant::now() + Duration::from_secs(5);
    while listen() < sent && Instant::now() < deadline {}
    (sent, heard, refused)
}

/// dataplane.md, "Whose rules".
#[tokio::test]
async fn nothing_that_a_policy_allows_is_stopped_while_others_change() {
    let policy = |from: u16, port: u16| Policy {
        source: format!("app-{from}").parse().expect("an app"),
        source_tag: PolicyTag::new(from.try_into().expect("a tag")),
        destination: "app-2".parse().expect("an app"),
        transport: Transport::Udp,
        ports: PortRange::new(port, port).expect("a range"),
    };
    let mut world = World::new(true).await;
    let one = container(&mut world.site, "app-1", Profile::default()).await;
    let two = container(&mut world.site, "app-2", Profile::default()).await;
    let kept = policy(1, PORT);
    world.site.cell.policies(by_app([kept.clone()]));
    world.site.settle().await;
    two.space.run(MUTE);
    let ears = Ears::in_space(&two.space, &[17]);
    let (sent, heard, refused) = through(&mut world, &one, two.addr, ears, |site, n| {
        let others: BTreeSet<Policy> = (0..n % 50).map(|of| policy(3 + of, 9000 + n % 7)).collect();
        site.cell.policies(by_app(others.into_iter().chain([kept.clone()])));
    })
    .await;
    assert!(!refused && heard > 1000 && heard > sent / 2, "{heard} of {sent} arrived, refused: {refused}");
}

/// dataplane.md, "Whose rules".
#[tokio::test]
async fn nothing_that_a_security_group_allows_is_stopped_while_others_change() {
    let profile = |n: u16| {
        let rules = [(0, PORT), (1, 9000 + n)].map(|(index, port)| {
            rule(index, [198, 51, 100, 0], [198, 51, 100, 255], Traffic::Udp(ports(port, port)), false)
        });
        Profile { rules: rules.into(), ..Profile::default() }
    };
    let mut world = World::new(true).await;
    world.outside.run(MUTE);
    let one = container(&mut world.site, "", profile(0)).await;
    let ears = Ears::in_space(&world.outside, &[17]);
    let handle = one.handle.clone();
    let (sent, heard, refused) = through(&mut world, &one, FAR, ears, |site, n| {
        site.cell.assign(&handle, Arc::new(profile(1 + n).into())).expect("it is there");
    })
    .await;
    assert!(!refused && heard > 1000 && heard > sent / 2, "{heard} of {sent} arrived, refused: {refused}");
}
