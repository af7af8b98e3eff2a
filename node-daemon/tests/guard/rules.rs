//! What becomes of the rules while operators and others write theirs, and when iptables does not work.

use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use weft_node::guard::{Guard, Wish};

use crate::world::{BOTH, FORWARD, INPUT, Kept, Space, eventually, script};

#[test]
fn appended_after_the_operators_rules_and_once() {
    for (program, wish) in BOTH {
        let cell = Space::new();
        cell.run(&format!(
            "{program} -w 5 -A INPUT -p tcp -m tcp --dport 22 -j ACCEPT && {program} -w 5 -P FORWARD DROP && \
             {program} -w 5 -N other && {program} -w 5 -A FORWARD -j other"
        ));
        for again in [false, true] {
            let kept = Kept::start(&cell, wish);
            match again {
                false => kept.appends(program),
                true => {
                    assert_eq!(kept.next(), Guard::Iptables, "{program}: no doubt about a rule that is there")
                }
            }
            eventually("both rules", || cell.has_ours(program));
            drop(kept);
            assert_eq!(
                cell.chain(program, "INPUT"),
                ["-P INPUT ACCEPT", "-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT", INPUT],
                "{program}"
            );
            assert_eq!(
                cell.chain(program, "FORWARD"),
                ["-P FORWARD DROP", "-A FORWARD -j other", FORWARD],
                "{program}"
            );
        }
        assert_eq!(cell.run(&format!("{program} -w 5 -S | grep -c ' other$'")).trim(), "2", "{program}");
    }
}

#[test]
fn put_back_when_flushed_and_meanwhile_ours_refuses() {
    for (program, wish) in BOTH {
        let cell = Space::new();
        let kept = Kept::start(&cell, wish);
        kept.appends(program);
        eventually("both rules", || cell.has_ours(program));
        let accident = match wish {
            Wish::Nft => {
                ["iptables-nft -F INPUT", "nft delete table ip filter", "nft flush ruleset"].as_slice()
            }
            _ => ["iptables-legacy -w 5 -F INPUT", "iptables-legacy -w 5 -F"].as_slice(),
        };
        for accident in accident {
            cell.run(accident);
            assert_eq!(kept.next(), Guard::Ours, "{accident}");
            assert_eq!(kept.next(), Guard::Iptables, "{accident}");
            eventually(accident, || cell.has_ours(program));
            assert_eq!(cell.chain(program, "INPUT"), ["-P INPUT ACCEPT", INPUT], "{accident}");
            assert_eq!(cell.chain(program, "FORWARD"), ["-P FORWARD ACCEPT", FORWARD], "{accident}");
        }
        cell.run(&format!("{program} -w 5 -F FORWARD"));
        eventually("put back into FORWARD", || cell.has_ours(program));
    }
}

/// What others do in other chains, or add, is none of our business.
#[test]
fn foreign_rules_come_and_go() {
    let cell = Space::new();
    let kept = Kept::start(&cell, Wish::Nft);
    kept.appends("iptables-nft");
    cell.run("iptables-nft -N other && iptables-nft -A other -j ACCEPT && iptables-nft -A FORWARD -j other");
    cell.run("iptables-nft -F other && iptables-nft -I INPUT -p tcp --dport 8898 -j ACCEPT");
    cell.run("iptables-nft -t nat -A INPUT -j ACCEPT && iptables-nft -t nat -F INPUT");
    // The first thing that is published comes of what is done now.
    cell.run("iptables-nft -D INPUT -p tcp --dport 8898 -j ACCEPT");
    assert_eq!(kept.next(), Guard::Ours);
    assert_eq!(kept.next(), Guard::Iptables, "ours was there all the time");
    assert_eq!(kept.published.try_iter().next(), None);
    assert_eq!(cell.chain("iptables-nft", "INPUT"), ["-P INPUT ACCEPT", INPUT]);
}

#[test]
fn without_a_program_ours_refuses_until_there_is_one() {
    let cell = Space::new();
    let directory = tempfile::tempdir().expect("directory");
    let kept = Kept::among(&cell, Wish::Auto, vec![directory.path().to_owned()]);
    assert_eq!(kept.next(), Guard::Ours);
    assert_eq!(kept.published.recv_timeout(Duration::from_secs(1)), Err(RecvTimeoutError::Timeout));
    let program = "/usr/sbin/iptables-nft";
    std::os::unix::fs::symlink(program, directory.path().join("iptables-nft")).expect("linked");
    assert_eq!(kept.next(), Guard::Iptables);
    assert!(cell.chain("iptables-nft", "INPUT").contains(&INPUT.to_owned()));
}

#[test]
fn while_the_program_fails_ours_refuses() {
    let cell = Space::new();
    let directory = tempfile::tempdir().expect("directory");
    let at = directory.path().display();
    script(
        &directory.path().join("iptables-nft"),
        &format!(
            "echo x >> {at}/calls\nif [ -e {at}/mended ]; then exec iptables-nft \"$@\"; fi\n\
             echo \"table \\`filter' is incompatible, use 'nft' tool.\" >&2\nexit 1"
        ),
    );
    let kept = Kept::among(&cell, Wish::Nft, vec![directory.path().to_owned()]);
    // One looks, then INPUT's rule is not there and cannot be appended, then FORWARD's.
    let calls =
        || std::fs::read_to_string(directory.path().join("calls")).unwrap_or_default().lines().count();
    eventually("it was tried", || calls() >= 5);
    let published: Vec<Guard> = kept.published.try_iter().collect();
    assert_eq!(published, [Guard::Ours], "the rule is not there");
    std::fs::write(directory.path().join("mended"), "").expect("written");
    assert_eq!(kept.next(), Guard::Iptables);
    assert!(cell.chain("iptables-nft", "INPUT").contains(&INPUT.to_owned()));
}
