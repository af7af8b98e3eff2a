//! Policies that change while packets fly between containers.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use weft_model::asg::PortRange;
use weft_model::container::Owner;
use weft_model::firewall::explain::Probe;
use weft_model::policy::{Policy, PolicyTag, by_app};
use weft_model::profile::{Profile, Transport};

use crate::packet::{Ears, Packet};
use crate::watch::Speaker;
use crate::world::World;

const PORT: u16 = 8080;

fn policy(from: u16, to: u16, port: u16) -> Policy {
    let app = |n: u16| format!("app-{n}").parse().expect("an app");
    Policy {
        source: app(from),
        source_tag: PolicyTag::new(from.try_into().expect("a tag")),
        destination: app(to),
        transport: Transport::Udp,
        ports: PortRange::new(port, port).expect("a range"),
    }
}

/// dataplane.md, "Whose rules": what a policy allows is not stopped while others of the same app come and go.
#[tokio::test]
async fn nothing_that_a_policy_allows_is_stopped_while_others_change() {
    let mut world = World::new(true).await;
    let mut containers = Vec::new();
    for app in ["app-1", "app-2"] {
        let owner = Owner { policy_group_id: app.into(), ..Owner::default() };
        let instance = world.site.wish_of(owner, Profile::default(), &[]);
        world.site.settle().await;
        world.site.lay_inside(&instance);
        containers.push(instance);
    }
    let kept = policy(1, 2, PORT);
    world.site.cell.policies(by_app([kept.clone()]));
    world.site.settle().await;
    let ears = Ears::in_space(&containers[1].space, &[17]);
    let speaker = Speaker::of(&containers[0]);
    let to = containers[1].addr;
    let end = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&end);
    let flood = thread::spawn(move || {
        let packet = speaker.packet(to, Probe::Udp { port: PORT }, 1);
        let mut sent = 0_usize;
        while !ended.load(Ordering::Relaxed) {
            speaker.send(&Packet {
                source_port: 1024 + u16::try_from(sent % 60_000).expect("16 bits"),
                ..packet
            });
            sent += 1;
        }
        sent
    });
    let mut heard = 0;
    let listen = |heard: &mut usize| *heard += ears.hear().iter().filter(|heard| heard.id == 1).count();
    for n in 0..500_u16 {
        let others: BTreeSet<Policy> = (0..n % 50).map(|of| policy(3 + of, 2, 9000 + n % 7)).collect();
        world.site.cell.policies(by_app(others.into_iter().chain([kept.clone()])));
        world.site.settle().await;
        listen(&mut heard);
    }
    end.store(true, Ordering::Relaxed);
    let sent = flood.join().expect("sent");
    let deadline = Instant::now() + Duration::from_secs(5);
    while heard < sent && Instant::now() < deadline {
        listen(&mut heard);
    }
    let refused = world.site.space.run("nft list chain inet weft strangers");
    assert!(refused.contains("counter packets 0 "), "of {sent} some were refused: {refused}");
    assert!(heard > 1000 && heard > sent / 2, "{heard} of {sent} arrived");
}
