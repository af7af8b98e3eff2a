//! New on the cell: an app, or a space, that the cell has not had before has its policies and groups at once, and not at
//! the next poll.

use std::net::Ipv4Addr;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Map, json};
use weft_testbed::external_networker::{Container, Request};
use weft_testbed::policy_server::{Fault, Policy, Route, SecurityGroup};
use weft_testbed::{Lab, lab::Cell};

use crate::world::{
    Ear, Fate, WORLD, added, allow, begin, bind, group, instance, lab, opens, quiet, server, tcp, tcp_rule,
    wait_for, with,
};

const ANSWERS_IN: Duration = Duration::from_millis(50);
/// What the issue promises.
const AT_ONCE: Duration = Duration::from_millis(250);
const SERVES: u16 = 8080;
const GROUPS: u16 = 80;
/// The machine may be busy with something else: one round of these has to be as promised, and all have to be told.
const ROUNDS: usize = 5;

/// What a newcomer needs: a policy, and a group.
struct Scene {
    lab: Lab,
    server: Container,
    _ears: [Ear; 2],
}

impl Scene {
    /// At the intervals that operators have: no poll comes to help. Everything is known of the space `space`.
    fn new(purpose: &str) -> Self {
        let lab = lab(purpose, Map::new(), &json!({}));
        allow(&lab, &[Policy::tcp("server", "server", SERVES)]);
        bind(&lab, group("known", &json!([tcp_rule("10.0.0.1", &GROUPS.to_string())]), &["space"]));
        let to = added(&lab.cells[0], &instance("server", "server"));
        let ears = [Ear::at(&to.place, SERVES), Ear::at(&lab.underlay, GROUPS)];
        let other = added(&lab.cells[0], &instance("other-instance", "server"));
        wait_for("the answers that are about the server", || {
            opens(&other, &to, SERVES) && tcp(&other.place, WORLD, GROUPS) == Fate::Open
        });
        server(&lab).set_fault_everywhere(Fault::Slow(ANSWERS_IN));
        Self { lab, server: to, _ears: ears }
    }

    fn cell(&self) -> &Cell {
        &self.lab.cells[0]
    }

    /// Apps of spaces that the cell has not had, with what they may do.
    fn newcomers(&self, names: &[String]) -> Vec<Request> {
        let policies: Vec<Policy> = names.iter().map(|name| Policy::tcp(name, "server", SERVES)).collect();
        allow(&self.lab, &policies);
        let spaces: Vec<String> = names.iter().map(|name| format!("space-of-{name}")).collect();
        let rules = json!([tcp_rule("10.0.0.1", &GROUPS.to_string())]);
        let bound = SecurityGroup { running_space_guids: spaces.clone(), ..group(&names[0], &rules, &[]) };
        bind(&self.lab, bound);
        let pairs = names.iter().zip(&spaces);
        pairs.map(|(name, space)| with(instance(name, name), &[("space_id", space)])).collect()
    }

    fn fetches(&self) -> [u64; 2] {
        [Route::Policies, Route::SecurityGroups].map(|route| server(&self.lab).asked(route))
    }

    /// From the answer of ADD until both count.
    fn takes(&self, request: &Request) -> Duration {
        let container = added(self.cell(), request);
        let start = Instant::now();
        // Packets that come back before the kernel has raised the cell's end of the link are lost: many short attempts.
        let (server, patience) = (self.server.addr, Duration::from_millis(50));
        let until_open = |addr: Ipv4Addr, port: u16| {
            while begin(addr, port, patience) != Fate::Open {
                assert!(start.elapsed() < Duration::from_secs(10), "{}: {addr}:{port}", request.handle);
                thread::sleep(Duration::from_millis(2));
            }
        };
        let wait = || {
            until_open(server, SERVES);
            until_open(WORLD, GROUPS);
            start.elapsed()
        };
        container.place.enter(wait).unwrap()
    }

    /// All at once; the slowest.
    fn all_take(&self, requests: &[Request]) -> Duration {
        let barrier = Barrier::new(requests.len());
        thread::scope(|scope| {
            let one = |request| {
                barrier.wait();
                self.takes(request)
            };
            let all: Vec<_> = requests.iter().map(|request| scope.spawn(move || one(request))).collect();
            all.into_iter().map(|thread| thread.join().unwrap()).max().unwrap()
        })
    }
}

/// Beside a control: another instance of what the cell has just learnt of, for which nothing has to be asked.
#[test]
fn an_app_and_a_space_new_on_the_cell_have_their_policies_and_groups_at_once() {
    let scene = Scene::new("newcomer");
    let mut best = Duration::MAX;
    for round in 0..ROUNDS {
        let name = format!("new-{round}");
        let request = scene.newcomers(std::slice::from_ref(&name)).remove(0);
        let before = scene.fetches();
        let took = scene.takes(&request);
        assert_eq!(scene.fetches(), before.map(|n| n + 1), "one request for each");
        let control = scene.takes(&Request { handle: format!("{name}-again"), ..request });
        println!("new on the cell: in force {took:.1?} after ADD; known already: {control:.1?}");
        assert_eq!(scene.fetches(), before.map(|n| n + 1), "what is known is not asked for again");
        best = best.min(took.saturating_sub(control));
    }
    assert!(best <= AT_ONCE, "{best:?}");
    quiet(&scene.lab, &[]);
}

/// As many requests as there are waves: those that come while one is asked about are asked about together.
#[test]
fn twenty_apps_new_on_the_cell_at_once_share_requests() {
    let scene = Scene::new("twenty");
    let mut best = Duration::MAX;
    for round in 0..ROUNDS {
        let names: Vec<String> = (0..20).map(|n| format!("new-{round}-{n}")).collect();
        let requests = scene.newcomers(&names);
        let (before, start) = (scene.fetches(), Instant::now());
        let took = scene.all_take(&requests);
        let all = start.elapsed();
        let asked: Vec<u64> =
            scene.fetches().iter().zip(before).map(|(after, before)| after - before).collect();
        let waves = u64::try_from(all.as_millis() / ANSWERS_IN.as_millis()).unwrap() + 1;
        let again: Vec<Request> = requests
            .iter()
            .map(|one| Request { handle: format!("{}-again", one.handle), ..one.clone() })
            .collect();
        let control = scene.all_take(&again);
        println!(
            "20 new on the cell at once: in force {took:.1?} after ADD, {all:.1?} with their ADDs, {asked:?} requests; \
             known already: {control:.1?}"
        );
        assert!(asked.iter().all(|asked| (1..=waves).contains(asked)), "{asked:?} in {all:?}");
        best = best.min(took.saturating_sub(control));
        for request in requests.iter().chain(&again) {
            scene.cell().del(&request.handle).unwrap();
        }
    }
    assert!(best <= AT_ONCE, "{best:?}");
    quiet(&scene.lab, &[]);
}

/// While the server is away, ADD does not wait; and what is new has its own with the next poll that succeeds.
#[test]
fn while_the_server_is_away_newcomers_wait_for_the_next_poll_and_not_in_add() {
    let scene = Scene::new("waits");
    let request = scene.newcomers(&["new".into()]).remove(0);
    server(&scene.lab).stop();
    let container = added(scene.cell(), &request);
    let open = |addr, port| tcp(&container.place, addr, port) == Fate::Open;
    thread::sleep(Duration::from_secs(1));
    assert!(!open(scene.server.addr, SERVES) && !open(WORLD, GROUPS));
    server(&scene.lab).start().unwrap();
    wait_for("the policy", || open(scene.server.addr, SERVES) && open(WORLD, GROUPS));
    quiet(&scene.lab, &[crate::world::AWAY]);
}
