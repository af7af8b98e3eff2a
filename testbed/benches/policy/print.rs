//! The report for people.

use super::Report;
use super::changes::Row;
use super::foundation;
use crate::common::figure::show;

pub(super) fn tables(report: &Report) {
    println!("{}; medians of {} rounds (least..most)", report.machine, report.rounds);
    if !report.changes.is_empty() {
        println!("\nAn answer of the policy server, for 50 containers (milliseconds)");
        changes(&report.changes);
    }
    if !report.foundation.is_empty() {
        println!("\nA cell's share of a foundation (each poll; milliseconds of CPU, KiB, MiB resident)");
        foundation(&report.foundation);
    }
}

fn changes(rows: &[Row]) {
    println!(
        "{:<36} {:>13} {:>13} {:>13} {:>13} {:>20} {:>20} {:>20} {:>17} {:>17} {:>8}  goal",
        "wall / CPU",
        "fetch",
        "decode",
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
        let pair = |wall: f64, cpu: f64| format!("{wall:.2} / {cpu:.2}");
        println!(
            "{:<36} {:>13} {:>13} {:>13} {:>13} {:>20} {:>20} {:>20} {:>17} {:>17} {:>8.2}  {}",
            row.case,
            pair(row.fetch_ms.median, row.fetch_cpu_ms.median),
            pair(row.decode_ms.median, row.decode_cpu_ms.median),
            pair(row.plan_ms.median, row.plan_cpu_ms.median),
            pair(row.kernel_ms.median, row.kernel_cpu_ms.median),
            show(row.whole_ms, 2),
            show(row.whole_cpu_ms, 2),
            show(row.bare_cpu_ms, 2),
            show(row.cpu_to_bare, 2),
            show(row.wall_to_bare, 2),
            row.journal_ms.median,
            row.goal
        );
    }
}

fn foundation(rows: &[foundation::Row]) {
    println!(
        "{:<26} {:>9} {:>11} {:>9} {:>8} {:>12} {:>14} {:>9} {:>9}",
        "the server has",
        "policies",
        "containers",
        "requests",
        "KiB",
        "CPU changed",
        "CPU unchanged",
        "resident",
        "at most"
    );
    for row in rows {
        let mib = |kib: u64| f64::from(u32::try_from(kib).unwrap_or(u32::MAX)) / 1024.0;
        println!(
            "{:<26} {:>9} {:>11} {:>9.2} {:>8.1} {:>12.2} {:>14.2} {:>9.1} {:>9.1}",
            row.server,
            row.policies,
            row.containers,
            row.requests,
            row.answer_bytes / 1024.0,
            row.cpu_ms_per_changed_poll,
            row.cpu_ms_per_unchanged_poll,
            mib(row.resident_kib),
            mib(row.peak_kib)
        );
    }
}
