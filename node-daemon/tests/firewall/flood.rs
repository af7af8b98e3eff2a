//! A flood of forbidden packets while everything changes: none passes, at no time, and none that is allowed is stopped.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use weft_model::asg::Traffic;
use weft_model::cell::{Belief, Key, Scope};
use weft_model::firewall::explain::Probe;
use weft_model::firewall::{Guard, Part};
use weft_model::profile::Profile;
use weft_node::kernel::Kernel;

use crate::cast::{open, ports, rule};
use crate::packet::{Ears, Packet};
use crate::ruleset::Ruleset;
use crate::watch::Speaker;
use crate::world::{CELL, Instance, World};

const FAR: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
/// In a security group, and in a denied network.
const DENIED: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 200);
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const ALLOWED: u16 = 80;
/// The identification of packets that are allowed, and of those that are not.
const CONTROL: u16 = 1;
const FORBIDDEN: u16 = 2;

/// What was sent, of each kind.
type Sent = (usize, usize);

/// A thread that sends until it is told to end.
struct Flood {
    end: Arc<AtomicBool>,
    thread: JoinHandle<Sent>,
}

impl Flood {
    /// One allowed packet for each round of forbidden ones.
    fn start(speaker: &Arc<Speaker>, forbidden: Vec<Packet>, pause: Duration) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let (speaker, ended) = (Arc::clone(speaker), Arc::clone(&end));
        // One that is not ended, since a test fails, ends with it.
        Self { end, thread: thread::spawn(move || flood(&speaker, &forbidden, pause, &ended)) }
    }

    fn end(self) -> Sent {
        self.end.store(true, Ordering::Relaxed);
        self.thread.join().expect("sent")
    }
}

fn flood(speaker: &Speaker, forbidden: &[Packet], pause: Duration, end: &AtomicBool) -> Sent {
    let (mut allowed, mut refused) = (0, 0);
    let mut port = 1024;
    let control = speaker.packet(FAR, Probe::Tcp { port: ALLOWED }, CONTROL);
    while !end.load(Ordering::Relaxed) {
        port = if port == u16::MAX { 1024 } else { port + 1 };
        speaker.send(&Packet { source_port: port, ..control });
        allowed += 1;
        for packet in forbidden {
            speaker.send(&Packet { source_port: port, ..*packet });
            refused += 1;
        }
        thread::sleep(pause);
    }
    (allowed, refused)
}

struct Scene {
    world: World,
    neighbour: Instance,
    speaker: Arc<Speaker>,
    ruleset: Ruleset,
    ears: [(&'static str, Ears); 3],
    /// What was heard so far: allowed, and forbidden.
    control: usize,
    passed: Vec<String>,
}

impl Scene {
    async fn new() -> Self {
        let mut world = World::new(true).await;
        let neighbour = world.site.add(open(), &[]).await;
        let port = Traffic::Tcp(ports(ALLOWED, ALLOWED));
        let rules = [(FAR, DENIED), (METADATA, METADATA)];
        let rules = rules.map(|(first, last)| rule(0, first.octets(), last.octets(), port, false)).into();
        let profile = with_denied(Profile { rules, ..Profile::default() });
        let speaker = Speaker::of(&world.site.add(profile, &[]).await);
        world.site.check_no_sources();
        // Either of the guards refuses.
        world.site.space.run("iptables -A INPUT -m mark --mark 0x01000000/0xff000000 -j REJECT");
        world.outside.run(
            "nft 'add table ip mute; add chain ip mute out { type filter hook output priority 0; policy drop; }'",
        );
        let ears = |space| Ears::in_space(space, &[1, 6, 17]);
        Self {
            ears: [
                ("outside", ears(&world.outside)),
                ("in the cell", ears(&world.site.space)),
                ("in a container", ears(&neighbour.space)),
            ],
            ruleset: Ruleset::of(&world.site.space),
            speaker: Arc::new(speaker),
            world,
            neighbour,
            control: 0,
            passed: Vec::new(),
        }
    }

    fn forbidden(&self) -> Vec<Packet> {
        let tcp = |port| Probe::Tcp { port };
        let (own, neighbour) = (self.speaker.addr, self.neighbour.addr);
        let all = [
            (own, FAR, tcp(ALLOWED + 1)),
            (own, FAR, Probe::Udp { port: ALLOWED }),
            (own, DENIED, tcp(ALLOWED)),
            (own, METADATA, tcp(ALLOWED)),
            (own, neighbour, tcp(8080)),
            (own, CELL, tcp(22)),
            (own, CELL, Probe::Udp { port: 4789 }),
            // Another's address, of whom more is allowed.
            (neighbour, FAR, tcp(ALLOWED)),
        ];
        all.map(|(from, to, probe)| Packet::new(from, to, probe, FORBIDDEN)).into()
    }

    fn flood(&self) -> Flood {
        // The others on this machine have something to do as well.
        Flood::start(&self.speaker, self.forbidden(), Duration::from_micros(200))
    }

    fn listen(&mut self) {
        for (place, ears) in &self.ears {
            for heard in ears.hear() {
                match heard.id {
                    CONTROL => self.control += 1,
                    FORBIDDEN => self.passed.push(format!("{place}: {heard:?}")),
                    _ => {}
                }
            }
        }
    }

    /// Listens until it is as expected, or for long enough to say that it will never be.
    fn listen_until(&mut self, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !done(self) && Instant::now() < deadline {
            self.listen();
        }
    }

    /// One change is one transaction.
    async fn step(&mut self) {
        let before = self.ruleset.generation();
        self.world.site.step(|_| ()).await;
        assert_eq!(self.ruleset.generation(), before + 1);
        self.listen();
    }

    async fn add(&mut self, profile: Profile) -> Instance {
        let instance = self.world.site.wish(profile, &[]);
        self.step().await;
        instance
    }

    /// With its profile, if nobody else has it.
    async fn remove(&mut self, instance: &Instance) {
        self.world.site.cell.drop(&instance.handle);
        while self.world.site.cell.unsettled() {
            self.step().await;
        }
        let resting = self.world.site.cell.roster().resting().clone();
        self.world.site.cell.forgotten(&resting);
    }

    /// The whole table, as after somebody has changed it.
    async fn replace(&mut self) {
        let mut seen = self.world.site.kernel.see(Scope::Firewall).await.expect("seen");
        let chain = Part::Chain("egress".parse().expect("name"));
        *seen.get_mut(&Key::Firewall(chain)).expect("there") = Belief::Unknown;
        self.world.site.cell.audit(Scope::Firewall, seen);
        self.step().await;
    }

    async fn change_everything(&mut self, replacing: bool) {
        let mut added = Vec::new();
        for n in 0..200u16 {
            let instance = self.add(profile(n % 40)).await;
            self.world.site.lay_inside(&instance).await;
            added.push(instance);
            if replacing && n % 10 == 9 {
                self.replace().await;
            }
        }
        for n in 0..200u16 {
            match n % 4 {
                0 => {
                    let guard = if n % 8 == 0 { Guard::Iptables } else { Guard::Ours };
                    self.world.site.cell.guard(guard);
                    self.step().await;
                }
                1 => {
                    let way = |name: &str| name.parse().expect("name");
                    let second = (n % 8 == 1).then(|| way("eth1"));
                    self.world.site.cell.ways([way("eth0")].into_iter().chain(second).collect());
                    self.step().await;
                }
                // A container that comes with another profile.
                _ => {
                    let instance = added.pop().expect("there are more");
                    self.remove(&instance).await;
                    self.add(profile(100 + n)).await;
                }
            }
        }
    }

    /// Everything changes, while packets fly.
    async fn flooded(replacing: bool) -> (Self, Sent) {
        let mut scene = Self::new().await;
        let flood = scene.flood();
        scene.change_everything(replacing).await;
        let sent = flood.end();
        scene.listen_until(|scene| scene.control == sent.0);
        (scene, sent)
    }
}

fn profile(n: u16) -> Profile {
    let range = ports(1_000 + n, 1_100 + n);
    let rule = rule(0, [0, 0, 0, 0], [255, 255, 255, 255], Traffic::Tcp(range), n.is_multiple_of(2));
    with_denied(Profile { rules: vec![rule], ..Profile::default() })
}

fn with_denied(mut profile: Profile) -> Profile {
    profile.settings.deny_networks.always = vec!["198.51.100.192/26".parse().expect("network")];
    profile
}

/// dataplane.md, "Whose rules": a packet meets the old rules or the new ones.
#[tokio::test]
async fn no_forbidden_packet_passes_while_everything_changes() {
    let (mut scene, (allowed, forbidden)) = Scene::flooded(true).await;
    assert_eq!(scene.passed, Vec::<String>::new(), "of {forbidden}");
    // While the table is replaced some may be refused.
    assert!(scene.control > 100 && scene.control > allowed / 2, "{} of {allowed} arrived", scene.control);
    // The same packets arrive where there are no rules: something was there to be stopped.
    scene.world.site.lose_table();
    let flood = scene.flood();
    scene.listen_until(|scene| scene.passed.len() >= 100);
    flood.end();
    assert!(scene.passed.len() >= 100, "{:?}", scene.passed);
}

/// The same, without a table that is replaced.
#[tokio::test]
async fn nothing_that_is_allowed_is_stopped_by_a_change() {
    let (scene, (allowed, forbidden)) = Scene::flooded(false).await;
    assert_eq!(scene.passed, Vec::<String>::new(), "of {forbidden}");
    assert!(allowed > 100 && scene.control == allowed, "{} of {allowed} arrived", scene.control);
}

/// The kernel shows packets one set of ranges after the other: never a security group before what denies parts of it.
#[tokio::test]
async fn no_denied_network_is_open_while_the_table_is_replaced() {
    let mut scene = Scene::new().await;
    for n in 0..150 {
        scene.world.site.wish(profile(n), &[]);
    }
    scene.step().await;
    let denied = |to| scene.speaker.packet(to, Probe::Tcp { port: ALLOWED }, FORBIDDEN);
    let packets = [denied(DENIED), denied(METADATA)].repeat(32);
    let flood = Flood::start(&scene.speaker, packets, Duration::from_micros(100));
    for _ in 0..30 {
        scene.replace().await;
    }
    let (_, forbidden) = flood.end();
    scene.listen_until(|scene| scene.control > 0);
    assert_eq!(scene.passed, Vec::<String>::new(), "of {forbidden}");
    assert!(scene.control > 0 && forbidden > 1_000, "{} arrived, {forbidden} were sent", scene.control);
}
