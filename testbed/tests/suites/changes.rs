//! A policy change never opens a window and never closes one: what is forbidden never arrives, and what is allowed always
//! does, while policies and groups change all the time.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::json;
use weft_testbed::Lab;
use weft_testbed::dice::Dice;
use weft_testbed::external_networker::Container;
use weft_testbed::policy_server::{Policy, Route};

use crate::world::{
    Ear, Fate, WORLD, added, allow, begin, bind, forbid, group, instance, opens, polled_with, quiet, server,
    tcp, tcp_rule, wait_for,
};

const HTTP: u16 = 8080;
const FORBIDDEN: u16 = 8081;
const CHANGES: u32 = 500;
/// About as long as it takes until the next poll, so that most changes are transactions of their own.
const BETWEEN: Duration = Duration::from_millis(70);
/// A connection that is not there by then has lost a packet.
const LOST: Duration = Duration::from_millis(900);

struct Scene {
    lab: Lab,
    a: Container,
    b: Container,
    c: Container,
    d: Container,
    /// Who takes what is allowed, and what is not.
    _open: Vec<Ear>,
    forbidden: Vec<Ear>,
}

impl Scene {
    /// `a` may reach `b` on its cell, `c` on the other, and the world. `d` may reach somebody else.
    fn new() -> Self {
        let often = json!({"policy_poll_interval_seconds": 0.1, "asg_poll_interval_seconds": 0.1});
        let lab = polled_with("changes", &often, &json!({}));
        lab.tell_bursts_of_refusals().unwrap();
        let [a, b, d] = ["a", "b", "d"].map(|name| added(&lab.cells[0], &instance(name, name)));
        let c = added(&lab.cells[1], &instance("c", "c"));
        for n in 0..3 {
            added(&lab.cells[n % 2], &instance(&format!("other-{n}"), &format!("other-{n}")));
        }
        let places = [&b.place, &c.place, &lab.underlay];
        let open = places.map(|place| Ear::at(place, HTTP)).into();
        // The same port that others may reach.
        let also = [Ear::at(&a.place, HTTP), Ear::at(&d.place, HTTP)];
        let forbidden = places.map(|place| Ear::at(place, FORBIDDEN)).into_iter().chain(also).collect();
        let scene = Self { lab, a, b, c, d, _open: open, forbidden };
        allow(&scene.lab, &["b", "c"].map(|to| Policy::tcp("a", to, HTTP)));
        allow(&scene.lab, &[Policy::tcp("d", "elsewhere", HTTP)]);
        bind(&scene.lab, group("world", &json!([tcp_rule("10.0.0.1", "8080")]), &["space"]));
        let Self { a, b, c, .. } = &scene;
        wait_for("policies and the group", || {
            opens(a, b, HTTP) && opens(a, c, HTTP) && tcp(&a.place, WORLD, HTTP) == Fate::Open
        });
        scene
    }

    fn allowed(&self) -> [(&Container, Ipv4Addr); 3] {
        [(&self.a, self.b.addr), (&self.a, self.c.addr), (&self.a, WORLD)]
    }

    fn flooded(&self) -> Vec<(&Container, Ipv4Addr, u16)> {
        let Self { a, b, c, d, .. } = self;
        vec![
            // Another port than the allowed one.
            (a, b.addr, FORBIDDEN),
            (a, c.addr, FORBIDDEN),
            (a, WORLD, FORBIDDEN),
            // The way back; who has no policy at all, and who has one for others.
            (b, a.addr, HTTP),
            (c, a.addr, HTTP),
            (b, d.addr, HTTP),
            (d, b.addr, FORBIDDEN),
            (d, c.addr, FORBIDDEN),
        ]
    }

    /// Makes connections at a steady pace while `work` goes on: how many were made, and how many were lost.
    fn paced(&self, pause: Duration, work: impl FnOnce()) -> (usize, usize) {
        let stop = AtomicBool::new(false);
        let stream = |from: &Container, to: Ipv4Addr| {
            from.place.move_thread().unwrap();
            let (mut made, mut lost) = (0, 0);
            while !stop.load(Ordering::Relaxed) {
                made += 1;
                lost += usize::from(begin(to, HTTP, LOST) != Fate::Open);
                thread::sleep(pause);
            }
            (made, lost)
        };
        thread::scope(|scope| {
            let streams = self.allowed().map(|(from, to)| scope.spawn(move || stream(from, to)));
            work();
            stop.store(true, Ordering::Relaxed);
            let ended = streams.map(|stream| stream.join().unwrap());
            ended.iter().fold((0, 0), |(made, lost), one| (made + one.0, lost + one.1))
        })
    }

    /// Sends SYNs that are forbidden, while `work` goes on: how many.
    fn flood(&self, work: impl FnOnce()) -> usize {
        let stop = AtomicBool::new(false);
        let send = |from: &Container, to: Ipv4Addr, port: u16| {
            from.place.move_thread().unwrap();
            let mut sent = 0;
            while !stop.load(Ordering::Relaxed) {
                // Whatever comes of it is counted at the other end.
                let _ = begin(to, port, Duration::from_millis(20));
                sent += 1;
                thread::sleep(Duration::from_millis(2));
            }
            sent
        };
        thread::scope(|scope| {
            let floods: Vec<_> = self
                .flooded()
                .into_iter()
                .map(|(from, to, port)| scope.spawn(move || send(from, to, port)))
                .collect();
            work();
            stop.store(true, Ordering::Relaxed);
            floods.into_iter().map(|flood| flood.join().unwrap()).sum()
        })
    }

    /// Policies of everybody but those that are watched come and go, and so do tags; now and then a group is another.
    fn change(&self) {
        let mut dice = Dice(4);
        let mut there: BTreeSet<(u64, u64, u16)> = BTreeSet::new();
        let policy = |(from, to, port): (u64, u64, u16)| {
            let to = ["a", "b", "c", "d", "other-0", "other-1", "other-2", "elsewhere-2"]
                [usize::try_from(to).unwrap()];
            let kind = if from < 3 { "other" } else { "elsewhere" };
            Policy::tcp(&format!("{kind}-{from}"), to, port)
        };
        for _ in 0..CHANGES {
            let one = (dice.below(12), dice.below(8), HTTP + u16::try_from(dice.below(3)).unwrap());
            match dice.below(8) {
                0 => {
                    let port = 9000 + dice.below(50);
                    let rules =
                        json!([tcp_rule("10.0.0.1", "8080"), tcp_rule("10.0.0.1", &port.to_string())]);
                    bind(&self.lab, group("world", &rules, &["space"]));
                }
                // All at once, so that tags are free again.
                1 => {
                    let all: Vec<Policy> = std::mem::take(&mut there).into_iter().map(policy).collect();
                    forbid(&self.lab, &all);
                }
                _ if there.remove(&one) => forbid(&self.lab, &[policy(one)]),
                _ => {
                    there.insert(one);
                    allow(&self.lab, &[policy(one)]);
                }
            }
            thread::sleep(BETWEEN);
        }
    }
}

/// The pace is one at which the same paths without changes lose none, in the same run.
#[test]
fn five_hundred_changes_open_no_window_and_close_none() {
    let scene = Scene::new();
    let calm = |pause| {
        scene.paced(pause, || {
            scene.flood(|| thread::sleep(Duration::from_secs(4)));
        })
    };
    let mut pause = Duration::from_millis(4);
    let (mut made, mut lost) = calm(pause);
    while lost > 0 {
        assert!(pause < Duration::from_millis(100), "{lost} of {made} lost without any change");
        pause *= 2;
        (made, lost) = calm(pause);
    }
    println!("without changes: {made} connections, {pause:?} apart on each path, none lost");
    let before = server(&scene.lab).asked(Route::Policies) + server(&scene.lab).asked(Route::SecurityGroups);
    let mut sent = 0;
    let (made, lost) = scene.paced(pause, || sent = scene.flood(|| scene.change()));
    let fetched =
        server(&scene.lab).asked(Route::Policies) + server(&scene.lab).asked(Route::SecurityGroups) - before;
    let passed: usize = scene.forbidden.iter().map(Ear::taken).sum();
    println!(
        "{CHANGES} changes, fetched {fetched} times: {passed} of {sent} forbidden SYNs passed, {lost} of {made} allowed connections lost"
    );
    assert_eq!((passed, lost), (0, 0));
    assert!(sent > 10_000 && made > 1_000 && fetched > u64::from(CHANGES) / 2, "{sent}, {made}, {fetched}");
    // They would be heard.
    allow(&scene.lab, &[Policy::tcp("d", "b", FORBIDDEN)]);
    wait_for("what is allowed now", || opens(&scene.d, &scene.b, FORBIDDEN));
    wait_for("and is heard", || scene.forbidden[0].taken() > 0);
    quiet(&scene.lab, &[]);
}
