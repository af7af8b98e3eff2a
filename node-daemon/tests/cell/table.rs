//! The firewall's table as a whole: a part that is refused, what somebody else does to it, a chain that is changed in place.

use std::sync::atomic::Ordering;

use weft_model::firewall::Guard;
use weft_model::reason::Reason;

use crate::{NEVER, World, namespace, nft, own_lease, table, wait_for, within};

/// A map of somebody's, whose element leads to somebody's chain.
const LEADS_ELSEWHERE: &str = "add chain inet weft intruder ; add map inet weft intruders { type ipv4_addr : verdict ; \
    elements = { 10.0.0.77 : goto intruder } ; }";

/// The program is a whole: what cannot do without the part that was refused is refused with it.
#[test]
fn whichever_part_of_the_firewall_is_refused_nothing_is_left_and_the_next_add_works() {
    within(async || {
        let world = World::start(own_lease()).await;
        let before = table();
        let mut refused = 0;
        loop {
            world.refuses.store(refused, Ordering::Relaxed);
            let added = world.add(1, namespace()).await;
            world.refuses.store(NEVER, Ordering::Relaxed);
            let Err(reason) = added else { break };
            assert!(matches!(reason, Reason::Kernel { .. }), "{reason}");
            world.empty().await;
            assert_eq!(table(), before, "part {refused}");
            refused += 1;
        }
        let parts = "three chains, five elements that lead to them, one for answers, and two for routers";
        assert_eq!(refused, 11, "{parts}");
        assert_ne!(table(), before);
    });
}

/// dataplane.md, "Whose rules": what somebody else does to our table does not last.
#[test]
fn a_table_that_somebody_changed_is_repaired_and_the_next_add_works() {
    within(async || {
        let world = World::start(own_lease()).await;
        let kept = namespace();
        world.add(1, kept.try_clone().unwrap()).await.unwrap();
        let before = table();
        for command in [
            "delete table inet weft",
            "flush ruleset",
            "flush chain inet weft egress",
            "flush map inet weft sources",
            "add rule inet weft forward accept",
            "insert rule inet weft forward accept",
            "add chain inet weft intruder",
            "add element inet weft leased { 10.0.0.77 }",
            "delete element inet weft metadata { 169.254.169.254 }",
            "add set inet weft intruder { type ipv4_addr ; flags interval ; }",
            "add set inet weft intruder { type ipv4_addr ; elements = { 10.0.0.77 } ; }",
            LEADS_ELSEWHERE,
        ] {
            nft(command);
            // Whether it is told of it ...
            world.touched.send(()).unwrap();
            wait_for(|| table() == before, command).await;
            nft(command);
            // ... or finds out when it changes something.
            world.add(2, namespace()).await.unwrap();
            world.delete(2).await.unwrap();
            world.touched.send(()).unwrap();
            wait_for(|| table() == before, command).await;
        }
    });
}

/// dataplane.md, "To the cell": who rejects is changed in place.
#[test]
fn the_guard_changes_one_chain() {
    within(async || {
        let world = World::start(own_lease()).await;
        let chain = || nft("list chain inet weft refused-by-cell");
        assert!(chain().contains("reject"), "{}", chain());
        world.guard.send(Guard::Iptables).unwrap();
        wait_for(|| chain().contains("mark set 0x01000000"), "the chain marks").await;
        world.guard.send(Guard::Ours).unwrap();
        wait_for(|| chain().contains("reject"), "the chain rejects").await;
    });
}
