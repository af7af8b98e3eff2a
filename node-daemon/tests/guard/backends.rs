//! Which backend the rules are in.

use weft_node::guard::Wish;

use crate::world::{Kept, Space, eventually, script};

const LEGACY_TABLES: &str = "cat /proc/thread-self/net/ip_tables_names";

/// Directories in which plain `iptables` is this backend's.
fn programs(plain: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("directory");
    for (name, program) in
        [("iptables", plain), ("iptables-nft", "iptables-nft"), ("iptables-legacy", "iptables-legacy")]
    {
        script(&directory.path().join(name), &format!("exec {program} \"$@\""));
    }
    directory
}

#[test]
fn auto_takes_the_backend_that_is_in_use() {
    let rule = "-A INPUT -p tcp --dport 22 -j ACCEPT";
    for (used, plain, chosen) in [
        (vec!["iptables-nft"], "iptables-legacy", "iptables-nft"),
        (vec!["iptables-legacy"], "iptables-nft", "iptables-legacy"),
        (vec!["iptables-nft", "iptables-legacy"], "iptables-nft", "iptables-nft"),
        (vec!["iptables-nft", "iptables-legacy"], "iptables-legacy", "iptables-legacy"),
        (vec![], "iptables-nft", "iptables-nft"),
        (vec![], "iptables-legacy", "iptables-legacy"),
    ] {
        let cell = Space::new();
        for program in &used {
            cell.run(&format!("{program} -w 5 {rule}"));
        }
        let directory = programs(plain);
        let kept = Kept::among(&cell, Wish::Auto, vec![directory.path().to_owned()]);
        kept.appends(&format!("{used:?}, plain {plain}"));
        eventually("both rules", || cell.has_ours(chosen));
        // Nothing was made in the other one by looking at it.
        let (legacy, nft) = (cell.run(LEGACY_TABLES), cell.run("nft list tables"));
        let in_use = |program| chosen == program || used.contains(&program);
        assert_eq!(legacy.contains("filter"), in_use("iptables-legacy"), "{used:?}, plain {plain}: {legacy}");
        assert_eq!(nft.contains("filter"), in_use("iptables-nft"), "{used:?}, plain {plain}: {nft}");
    }
}

#[test]
fn only_one_program_is_reason_enough() {
    let cell = Space::new();
    cell.run("iptables-nft -A INPUT -p tcp --dport 22 -j ACCEPT");
    let directory = tempfile::tempdir().expect("directory");
    script(&directory.path().join("iptables"), "exec iptables-legacy \"$@\"");
    let kept = Kept::among(&cell, Wish::Auto, vec![directory.path().to_owned()]);
    kept.appends("iptables");
    eventually("both rules", || cell.has_ours("iptables-legacy"));
}

/// Left in the other backend, the rule would refuse what an operator accepts in this one.
#[test]
fn another_wish_moves_our_rules_and_none_of_others() {
    let cell = Space::new();
    for program in ["iptables-nft", "iptables-legacy"] {
        cell.run(&format!("{program} -w 5 -A INPUT -p tcp -m tcp --dport 22 -j ACCEPT"));
    }
    for (wish, here, there) in [
        (Wish::Nft, "iptables-nft", "iptables-legacy"),
        (Wish::Legacy, "iptables-legacy", "iptables-nft"),
        (Wish::Nft, "iptables-nft", "iptables-legacy"),
    ] {
        let kept = Kept::start(&cell, wish);
        kept.appends(here);
        eventually("here", || cell.has_ours(here));
        eventually("not there", || {
            cell.chain(there, "INPUT") == ["-P INPUT ACCEPT", "-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT"]
                && cell.chain(there, "FORWARD") == ["-P FORWARD ACCEPT"]
        });
    }
}
