//! The suites' own time budgets, at the intervals that operators have: policies every 5 s, security groups every 60 s.

use std::time::Duration;

use serde_json::{Map, json};
use weft_testbed::external_networker::Container;
use weft_testbed::policy_server::{Policy, SecurityGroup};

use crate::world::{
    Ear, Fate, WORLD, added, allow, bind, forbid, group, in_force, instance, lab, opens, quiet, tcp,
    tcp_rule, unbind, with,
};

/// What CATs wait for a policy.
const POLICY: Duration = Duration::from_secs(5);
/// What CATs and the acceptance tests wait for a security group.
const GROUP: Duration = Duration::from_secs(180);
const HTTP: u16 = 8080;

/// All changes of groups at once, since each waits for the next poll: bound, unbound, made a default, another list; and
/// policies come and go meanwhile.
#[test]
fn at_default_intervals_changes_are_in_force_in_the_suites_time() {
    let lab = lab("defaults", Map::new(), &json!({}));
    let _world: Vec<Ear> = [80, 81, 82, 83, 84].map(|port| Ear::at(&lab.underlay, port)).into();
    let to = |port: u16| json!([tcp_rule("10.0.0.1", &port.to_string())]);
    bind(&lab, group("unbound", &to(81), &["space"]));
    bind(&lab, group("edited", &to(83), &["space"]));
    let apps: Vec<Container> = (0..2)
        .flat_map(|cell| [("app", "app"), ("task", "task"), ("app", "staging")].map(|who| (cell, who)))
        .map(|(cell, (app, workload))| {
            let handle = format!("{workload}-{cell}");
            let request = with(instance(&handle, app), &[("container_workload", workload)]);
            added(&lab.cells[cell], &request)
        })
        .collect();
    let running = || apps.iter().filter(|app| !app.handle.starts_with("staging"));
    let _ears: Vec<Ear> = apps.iter().map(|app| Ear::at(&app.place, HTTP)).collect();
    let fates = |of: &Container, ports: [u16; 5]| ports.map(|port| tcp(&of.place, WORLD, port) == Fate::Open);
    let ports = [80, 81, 82, 83, 84];
    let all = |expected: [bool; 5]| running().all(|app| fates(app, ports) == expected);
    // New on the cell: this waits for no poll.
    in_force(&lab, POLICY, "the first groups", || (), || all([false, true, false, true, false]));

    let policies = [("app", "task"), ("task", "app")].map(|(from, to)| Policy::tcp(from, to, HTTP));
    let pairs = || {
        let [app, task] =
            ["app-", "task-"].map(|name| apps.iter().filter(move |app| app.handle.starts_with(name)));
        app.flat_map(move |app| task.clone().flat_map(move |task| [(app, task), (task, app)]))
            .collect::<Vec<_>>()
    };
    let each = |is: bool| pairs().iter().all(|(from, to)| opens(from, to, HTTP) == is);
    assert!(each(false));
    for round in 1..=3 {
        in_force(&lab, POLICY, &format!("policies, time {round}"), || allow(&lab, &policies), || each(true));
        in_force(&lab, POLICY, &format!("none, time {round}"), || forbid(&lab, &policies), || each(false));
    }

    let change = || {
        bind(&lab, group("bound", &to(80), &["space"]));
        unbind(&lab, "unbound");
        bind(&lab, SecurityGroup { running_default: true, ..group("default", &to(82), &[]) });
        bind(&lab, group("edited", &to(84), &["space"]));
    };
    in_force(&lab, GROUP, "groups", change, || all([true, false, true, false, true]));
    let staging = apps.iter().filter(|app| app.handle.starts_with("staging"));
    assert!(staging.into_iter().all(|app| fates(app, ports) == [false; 5]), "none of these is for staging");
    quiet(&lab, &[]);
}
