//! The report for people.

use super::Report;
use super::changes::Row;
use super::packets;
use crate::common::figure::show;

pub(super) fn tables(report: &Report) {
    println!("{}; medians of {} rounds (least..most)", report.machine, report.rounds);
    if !report.add.is_empty() {
        println!("\nA container's rules added (milliseconds; a list that nobody has, or that somebody has)");
        changes(&report.add);
    }
    if !report.change.is_empty() {
        println!("\nOne rule of a group that 50 of 250 containers have changed (milliseconds)");
        println!("goals up to 1,000 rules: whole CPU <= 10, CPU / bare <= 1.3");
        changes(&report.change);
    }
    if !report.packets.is_empty() {
        println!("\nPackets");
        println!("goals at 5,000 rules: datagrams >= 0.95 of 10 rules, >= 0.9 of the shortcut alone");
        packets(&report.packets);
    }
    if let Some(memory) = &report.memory {
        println!(
            "\nMemory of {} containers with {} rules (MiB resident: with an empty cell, with all, at most)",
            memory.containers, memory.rules
        );
        for (who, is) in [("model and kernel's shell", &memory.parts), ("weft-node", &memory.daemon)] {
            let [before, after, peak] = [is.before_kib, is.after_kib, is.peak_kib].map(mib);
            println!("{who:<28} {before:>9.1} {after:>9.1} {peak:>9.1}");
        }
    }
}

fn changes(rows: &[Row]) {
    println!(
        "{:>6} {:<12} {:>7} {:>9} {:>9} {:>9} {:>9} {:>20} {:>20} {:>20} {:>17} {:>17} {:>9}",
        "rules",
        "list",
        "present",
        "decode",
        "known",
        "plan",
        "kernel",
        "whole",
        "whole CPU",
        "bare CPU",
        "CPU / bare",
        "wall / bare",
        "journal"
    );
    for row in rows {
        println!(
            "{:>6} {:<12} {:>7} {:>9.3} {:>9.3} {:>9.3} {:>9.3} {:>20} {:>20} {:>20} {:>17} {:>17} {:>9.3}",
            row.rules,
            row.list,
            row.present,
            row.decode_ms.median,
            row.known_ms.median,
            row.plan_ms.median,
            row.kernel_ms.median,
            show(row.whole_ms, 2),
            show(row.whole_cpu_ms, 2),
            show(row.bare_cpu_ms, 2),
            show(row.cpu_to_bare, 2),
            show(row.wall_to_bare, 2),
            row.journal_ms.median
        );
    }
}

fn packets(rows: &[packets::Row]) {
    let names = rows.first().map(|row| row.quantities.iter().map(|quantity| quantity.name).enumerate());
    for (n, name) in names.into_iter().flatten() {
        println!(
            "\n{name:<28} {:>26} {:>17} {:>17} {:>17} {:>17} {:>17}",
            "", "/ 10 rules", "/ 1 rule", "/ shortcut", "/ with masq.", "/ none"
        );
        for row in rows {
            let quantity = &row.quantities[n];
            let digits = if quantity.value.median < 1000.0 { 2 } else { 0 };
            println!(
                "{:<28} {:>26} {:>17} {:>17} {:>17} {:>17} {:>17}",
                row.case,
                show(quantity.value, digits),
                show(quantity.to_ten_rules, 2),
                show(quantity.to_one_rule, 2),
                show(quantity.to_shortcut, 2),
                show(quantity.to_shortcut_and_masquerade, 2),
                show(quantity.to_none, 2)
            );
        }
    }
}

fn mib(kib: u64) -> f64 {
    f64::from(u32::try_from(kib).unwrap_or(u32::MAX)) / 1024.0
}
