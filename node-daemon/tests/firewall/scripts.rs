//! Random scripts of policies, security groups, containers and a failing policy server, for the node's own tasks: after
//! each step the table is what a plan from scratch says, and every connection has the fate that `explain` says.
//!
//! `WEFT_SCRIPTS` sets how many scripts are played (4), `WEFT_SEED` which: a failure says its own.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use weft_model::asg::group::SecurityGroup;
use weft_model::asg::{EgressRule, Traffic};
use weft_model::bandwidth::Bandwidth;
use weft_model::cell::{Cell, Wanted};
use weft_model::container::{Container, Owner};
use weft_model::follow::Subject;
use weft_model::profile::{Known as Profiled, Profile, Workload};
use weft_node::calls::Calls;
use weft_node::policy_server::snapshot::{self, Saved};
use weft_testbed::policy_server::{self as served, Fault, PolicyServer, Route as Asked};

use crate::cast::{ports, rule};
use crate::expected::said;
use crate::node::{ANSWERS_WITHIN, Node};
use crate::ruleset::Ruleset;
use crate::space::Space;
use crate::world::{Instance, World};

/// Apps of the cell's containers; policies have two more, which are elsewhere.
pub(crate) const APPS: u8 = 4;
const PATIENCE: Duration = Duration::from_secs(10);
/// What a server says that is in a bad way; the last one is late.
const FAULTS: [Fault; 6] = [
    Fault::Error,
    Fault::EmptyError,
    Fault::Garbage,
    Fault::Truncated,
    Fault::DropInHeaders,
    Fault::Slow(Duration::from_secs(2)),
];
/// What groups are made of; one is none.
const RULES: [&str; 6] = [
    r#"{"protocol": "tcp", "destination": "198.51.100.0/28", "ports": "80, 443"}"#,
    r#"{"protocol": "udp", "destination": "198.51.100.1-198.51.100.9", "ports": "53"}"#,
    r#"{"protocol": "all", "destination": "198.51.100.16/28"}"#,
    r#"{"protocol": "icmp", "destination": "198.51.100.0/24", "type": 8, "code": -1}"#,
    r#"{"protocol": "tcp", "destination": "198.51.100.4,198.51.100.33", "ports": "1-1000", "log": true}"#,
    r#"{"protocol": "tcp", "destination": "no address", "ports": "80"}"#,
];
#[derive(Debug, Clone)]
enum Event {
    /// Each is added if it is not there, else removed: source, destination, whether TCP, first port.
    Policies(BTreeSet<(u8, u8, bool, u8)>),
    /// Put under this number, with these rules, for whom.
    Group(u8, Vec<usize>, For),
    NoGroup(u8),
    Add(u8),
    Remove(u8),
    Server(Server),
    /// The server's clock is set back, then its data changes.
    Back,
    /// The node is killed and started.
    Restart,
}

#[derive(Debug, Clone, Copy)]
enum For {
    All,
    Space(u8),
    Staging,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Server {
    Well,
    Fails(Fault),
    /// It says whether something changed, but not what.
    FailsToList(Fault),
    Away,
}

fn script() -> impl Strategy<Value = Vec<Event>> {
    let policy = (0u8..APPS + 2, 0u8..APPS + 2, any::<bool>(), 0u8..3);
    let whom = prop_oneof![
        2 => Just(For::All),
        3 => (0u8..2).prop_map(For::Space),
        1 => Just(For::Staging),
    ];
    let fault = || proptest::sample::select(&FAULTS[..]);
    let server = prop_oneof![
        4 => Just(Server::Well),
        2 => fault().prop_map(Server::Fails),
        2 => fault().prop_map(Server::FailsToList),
        1 => Just(Server::Away),
    ];
    let rules = proptest::collection::vec(0..RULES.len(), 0..4);
    let event = prop_oneof![
        6 => proptest::collection::btree_set(policy, 1..6).prop_map(Event::Policies),
        4 => (0u8..3, rules, whom).prop_map(|(n, rules, whom)| Event::Group(n, rules, whom)),
        1 => (0u8..3).prop_map(Event::NoGroup),
        4 => (0u8..6).prop_map(Event::Add),
        3 => (0u8..6).prop_map(Event::Remove),
        4 => server.prop_map(Event::Server),
        1 => Just(Event::Back),
        2 => Just(Event::Restart),
    ];
    let begin = (0..4).map(Event::Add).collect::<Vec<_>>();
    proptest::collection::vec(event, 12).prop_map(move |events| [begin.clone(), events].concat())
}

pub(crate) fn app(n: u8) -> String {
    format!("app-{n}")
}

pub(crate) fn space(n: u8) -> String {
    format!("space-{}", n % 2)
}

/// As the platform passes it: it counts while nothing is known of the container's space.
pub(crate) fn passed() -> Vec<EgressRule> {
    vec![rule(0, [198, 51, 100, 9], [198, 51, 100, 9], Traffic::Tcp(ports(9, 9)), false)]
}

pub(crate) struct Play {
    pub(crate) world: World,
    node: Option<Node>,
    server: PolicyServer,
    state: TempDir,
    /// A cell without containers that knows what the node's cell knows of the overlay.
    pub(crate) empty: Cell,
    pub(crate) containers: BTreeMap<u8, (Instance, Container, Arc<Profiled>)>,
    pub(crate) policies: BTreeSet<(u8, u8, bool, u8)>,
    pub(crate) groups: BTreeMap<u8, served::SecurityGroup>,
    server_is: Server,
    /// How often a connection was made, and refused: between containers, and to the world.
    pub(crate) fates: BTreeMap<(bool, bool), usize>,
}

impl Play {
    /// On the cell's network.
    async fn new(world: World) -> Self {
        let (server, state) =
            (PolicyServer::scratch().expect("a server"), TempDir::new().expect("directory"));
        let empty = world.site.cell.clone();
        let node = Some(Node::start(&empty, state.path(), &server).await);
        let (containers, policies, groups) = Default::default();
        let (server_is, fates) = (Server::Well, BTreeMap::new());
        Self { world, node, server, state, empty, containers, policies, groups, server_is, fates }
    }

    pub(crate) fn node(&self) -> &Node {
        self.node.as_ref().expect("it runs")
    }

    async fn step(&mut self, event: &Event) {
        let before = self.node().known.borrow().clone();
        match event {
            Event::Policies(toggled) => self.toggle(toggled),
            Event::Group(n, rules, whom) => self.put_group(*n, rules, *whom),
            Event::NoGroup(n) => {
                self.groups.remove(n);
                self.server.change(|state| state.remove_group(&format!("group-{n}"))).expect("changed");
            }
            Event::Add(n) => self.add(*n).await,
            Event::Remove(n) => {
                if let Some((instance, ..)) = self.containers.remove(n) {
                    let interface = "eth0".parse().expect("name");
                    self.node().inbox.delete(instance.handle, interface).await.expect("deleted");
                }
            }
            Event::Server(is) => self.set(*is),
            Event::Back => {
                self.server.change(|state| state.set_clock_back(Duration::from_secs(3600))).expect("changed");
                self.toggle(&[(0, 1, true, 0)].into());
            }
            Event::Restart => self.restart().await,
        }
        if self.server_is == Server::Well {
            let deadline = Instant::now() + PATIENCE;
            while let Some(why) = self.behind().await {
                assert!(Instant::now() < deadline, "{why}");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        } else {
            self.polls().await;
            let now = self.node().known.borrow().clone();
            assert_eq!(said(&now), said(&before), "a server that is {:?} changes nothing", self.server_is);
            let differs = self.differences(&now).await;
            assert!(differs.is_empty(), "{differs:#?}");
        }
        self.connect();
    }

    // === events ===

    fn toggle(&mut self, toggled: &BTreeSet<(u8, u8, bool, u8)>) {
        let policy = |(source, destination, tcp, port): &(u8, u8, bool, u8)| served::Policy {
            protocol: if *tcp { "tcp" } else { "udp" }.into(),
            start: 8080 + u16::from(*port),
            end: 8081 + u16::from(*port),
            ..served::Policy::tcp(&app(*source), &app(*destination), 0)
        };
        let gone: Vec<_> = toggled.intersection(&self.policies).map(policy).collect();
        let new: Vec<_> = toggled.difference(&self.policies).map(policy).collect();
        // Those that come get the tags of those that go.
        let change = |state: &mut served::State| {
            state.remove_policies(&gone);
            state.add_policies(new)
        };
        self.server.change(change).expect("changed").expect("there are tags");
        self.policies = self.policies.symmetric_difference(toggled).copied().collect();
    }

    fn put_group(&mut self, n: u8, rules: &[usize], whom: For) {
        let rules: Vec<&str> = rules.iter().map(|n| RULES[*n]).collect();
        let text = format!("[{}]", rules.join(","));
        let mut group = served::SecurityGroup::named(&format!("group-{n}"), &text);
        match whom {
            For::All => group.running_default = true,
            For::Space(n) => group.running_space_guids = vec![space(n)],
            For::Staging => group.staging_default = true,
        }
        self.groups.insert(n, group.clone());
        self.server.change(|state| state.put_group(group)).expect("changed");
    }

    async fn add(&mut self, n: u8) {
        if self.containers.contains_key(&n) {
            return;
        }
        let owner = Owner {
            policy_group_id: app(n % APPS),
            space_id: space(n / 2),
            container_workload: "app".into(),
            ..Owner::default()
        };
        let profile = Profile { workload: Workload::Running, rules: passed(), ..Profile::default() };
        let profile: Arc<Profiled> = Arc::new(profile.into());
        let wanted = Wanted {
            handle: format!("container-{n}").parse().expect("handle"),
            interface: "eth0".parse().expect("name"),
            mtu: None,
            owner: owner.clone(),
            network: "weft".into(),
            bandwidth: Bandwidth::default(),
            namespace: String::new(),
            ports: Vec::new(),
            profile: Arc::clone(&profile),
        };
        let namespace = Space::bare();
        let own = namespace.0.try_clone().expect("a descriptor");
        let link = self.node().inbox.add(wanted, own).await.expect("added");
        let instance = Instance { space: namespace, addr: link.addr.get(), handle: link.handle.clone() };
        instance.wait_until_it_hears();
        let container = Container {
            handle: link.handle,
            addr: link.addr,
            interface: link.interface,
            mtu: link.mtu,
            wanted_mtu: None,
            owner,
            network: "weft".into(),
            bandwidth: Bandwidth::default(),
            namespace: String::new(),
            ports: Vec::new(),
            profile: Some(profile.digest()),
            passed: Some(profile.digest()),
        };
        self.containers.insert(n, (instance, container, profile));
    }

    fn set(&mut self, is: Server) {
        if self.server_is == Server::Away {
            self.server.start().expect("started");
        }
        self.server.set_fault_everywhere(None);
        match is {
            Server::Well => {}
            Server::Fails(fault) => self.server.set_fault_everywhere(fault),
            Server::FailsToList(fault) => {
                for route in [Asked::Policies, Asked::SecurityGroups] {
                    self.server.set_fault(route, fault);
                }
            }
            Server::Away => self.server.stop(),
        }
        self.server_is = is;
    }

    /// Nothing changes: what the node has on disk is what it knew.
    async fn restart(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while let Some(why) = self.unsaved() {
            assert!(Instant::now() < deadline, "{why:?} as they are known are not on disk");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let ruleset = Ruleset::of(&self.world.site.space);
        let before = ruleset.generation();
        self.node.take().expect("it runs").kill().await;
        self.node = Some(Node::start(&self.empty, self.state.path(), &self.server).await);
        assert_eq!(ruleset.generation(), before, "a start changes nothing in the kernel");
    }

    fn unsaved(&self) -> Option<Subject> {
        let known = self.node().known.borrow();
        let state = self.state.path();
        let policies = snapshot::load(state, Subject::Policies).expect("loaded");
        let policies = match (&known.policies, policies) {
            (Some(told), Some(Saved { ids, value, .. })) => *told.value == value && told.ids == ids,
            (told, saved) => told.is_none() && saved.is_none(),
        };
        let groups = snapshot::load::<Arc<[SecurityGroup]>>(state, Subject::Groups).expect("loaded");
        let groups = match (&known.groups, groups) {
            (Some(told), Some(Saved { ids, value, .. })) => told.value == value && told.ids == ids,
            (told, saved) => told.is_none() && saved.is_none(),
        };
        let unsaved = [(Subject::Policies, !policies), (Subject::Groups, !groups)];
        unsaved.into_iter().find_map(|(subject, unsaved)| unsaved.then_some(subject))
    }

    /// The server has had its say, or the node has noticed that it says nothing.
    async fn polls(&self) {
        if self.server_is == Server::Away {
            return tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let routes = [Asked::PoliciesLastUpdated, Asked::SecurityGroupsLastUpdated];
        let before = routes.map(|route| self.server.asked(route));
        let deadline = Instant::now() + PATIENCE;
        while routes.iter().zip(before).any(|(route, before)| self.server.asked(*route) < before + 2) {
            assert!(Instant::now() < deadline, "the server is not asked");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if matches!(self.server_is, Server::Fails(Fault::Slow(_)) | Server::FailsToList(Fault::Slow(_))) {
            tokio::time::sleep(ANSWERS_WITHIN).await;
        }
    }
}

#[test]
fn whatever_happens_the_kernel_holds_what_a_plan_from_scratch_says_and_packets_meet_it() {
    let number = |name: &str| std::env::var(name).ok().map(|n| n.parse::<u64>().expect(name));
    let cases = u32::try_from(number("WEFT_SCRIPTS").unwrap_or(4)).expect("so many");
    let seed = number("WEFT_SEED").unwrap_or_else(|| getrandom::u64().expect("chance"));
    println!("WEFT_SEED={seed} WEFT_SCRIPTS={cases}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let config = Config { cases, max_shrink_iters: 8, failure_persistence: None, ..Config::default() };
    let all = std::cell::RefCell::new(BTreeMap::<(bool, bool), usize>::new());
    let mut runner = TestRunner::new_with_rng(config, rng);
    // A few scripts may be all refusals; ten times as many are not.
    for _ in 0..10 {
        let played = runner.run(&script(), |events| {
            let fates = play(&events);
            fates.into_iter().for_each(|(fate, times)| *all.borrow_mut().entry(fate).or_default() += times);
            Ok(())
        });
        if let Err(fault) = played {
            panic!("{fault}");
        }
        if all.borrow().len() == 4 {
            return;
        }
    }
    panic!("connections made and refused, near and far: {all:?}");
}

/// Within the cell's namespace, as the node itself runs.
fn play(events: &[Event]) -> BTreeMap<(bool, bool), usize> {
    let runtime = Runtime::new().expect("a runtime");
    let world = runtime.block_on(World::new(true));
    let space = world.site.space.clone();
    space.enter(|| {
        let runtime = Runtime::new().expect("a runtime");
        runtime.block_on(async {
            let mut play = Play::new(world).await;
            for event in events {
                play.step(event).await;
            }
            play.fates
        })
    })
}
