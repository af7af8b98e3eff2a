//! A foundation's worth of apps and policies, of which a cell has few: for what has to follow the cell, not the
//! foundation.

use std::collections::BTreeSet;

use anyhow::Result;
use serde_json::Value;

use crate::external_networker::Request;
use crate::interrupt;
use crate::lab::Cell;
use crate::policy_server::Policy;

/// As many as cf-networking-release was validated with.
pub const APPS: u32 = 20_000;
/// Each app sends to so many others.
const EACH: u32 = 3;
/// That a cell has.
pub const CONTAINERS: u32 = 250;

/// As Cloud Foundry names an app.
pub fn guid(app: u32) -> String {
    format!("{app:08x}-5c1e-4a0e-9d4b-0242ac{app:06x}")
}

/// The apps of which the cell has one container each: spread over all.
fn on_the_cell() -> BTreeSet<u32> {
    (0..CONTAINERS).map(|n| n * (APPS / CONTAINERS)).collect()
}

/// All policies: those that the cell's apps are in, and the others.
pub fn policies() -> (Vec<Policy>, Vec<Policy>) {
    let here = on_the_cell();
    let all = (0..APPS).flat_map(|from| (0..EACH).map(move |n| (from, (from + 1 + n * 6_661) % APPS)));
    let (concerned, others): (Vec<_>, Vec<_>) =
        all.partition(|(from, to)| here.contains(from) || here.contains(to));
    let policy = |(from, to): (u32, u32)| Policy::tcp(&guid(from), &guid(to), 8080);
    (concerned.into_iter().map(policy).collect(), others.into_iter().map(policy).collect())
}

/// The cell's containers, one after the other.
pub fn fill(cell: &Cell) -> Result<()> {
    for app in on_the_cell() {
        interrupt::check()?;
        let mut request = Request::app(&format!("of-{app}"));
        for key in ["app_id", "policy_group_id"] {
            request.properties.insert(key.to_owned(), Value::from(guid(app)));
        }
        cell.add(&request)?;
    }
    Ok(())
}
