//! What a newcomer sees first: two cells, two containers on each, and every pair talking.

use std::fmt::Display;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::Value;
use weft_testbed::external_networker::{Container, Request};
use weft_testbed::prober::{self, Pair};
use weft_testbed::{Lab, Options, interrupt};

const WORLD: [(&str, &str); 4] =
    [("cell1", "frontend"), ("cell1", "backend"), ("cell2", "cache"), ("cell2", "worker")];

/// The largest IP packet that fits a VXLAN frame on the lab's underlay.
const OVERLAY_MTU: u32 = weft_testbed::lab::UNDERLAY_MTU - 50;

pub(crate) fn run() -> Result<ExitCode> {
    interrupt::watch()?;
    let page = Page { colour: std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() };
    let lab = page
        .step("an underlay, a controller, two cells as namespaces", || Lab::up(&Options::unique("demo")?))?;
    // An error below drops the lab, and with it everything.
    let containers = page.step("two containers on each, by the CNI call that Garden makes", || {
        WORLD.iter().map(|(cell, handle)| add(&lab, cell, handle)).collect::<Result<Vec<_>>>()
    })?;
    let pairs = page.step("TCP and ICMP, each container to every other", || {
        interrupt::check()?;
        Ok(prober::matrix(&containers))
    })?;
    let whole = page.step(
        &format!("a packet of {OVERLAY_MTU} bytes from cell to cell, not to be fragmented"),
        || {
            interrupt::check()?;
            prober::ping_whole(&containers[0].place, containers[2].addr, OVERLAY_MTU)
        },
    );

    page.title("Leases, as the controller has them");
    print!("{}", indented(&lab.controllers[0].leases(&[])?));
    page.title("Containers, as the nodes have them");
    page.containers(&lab)?;
    page.title("Who reaches whom (TCP connect and answer / ICMP round trip, milliseconds)");
    page.matrix(&containers, &pairs);

    let failed = pairs.iter().filter(|pair| !pair.reached()).count();
    let good = failed == 0 && whole.is_ok();
    let verdict = match (&whole, failed) {
        (Ok(_), 0) => format!(
            "All {} pairs reach each other, each peer sees the container's own address, and {OVERLAY_MTU} bytes pass whole.",
            pairs.len()
        ),
        (Err(error), 0) => format!("A packet of {OVERLAY_MTU} bytes did not pass: {error:#}"),
        _ => format!("{failed} of {} pairs do not reach each other.", pairs.len()),
    };
    println!("\n  {}\n", page.verdict(good, &verdict));
    page.step("everything removed", || lab.down())?;
    println!("\n  Next: scripts/lab up, and play with it: docs/lab.md says how.\n");
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn add(lab: &Lab, cell: &str, handle: &str) -> Result<Container> {
    interrupt::check()?;
    let cell = lab.cell(cell)?;
    let container =
        cell.add(&Request::app(handle)).with_context(|| format!("add {handle} to {}", cell.name))?;
    cell.serve(&container)?;
    Ok(container)
}

/// Standard output, with or without colours.
struct Page {
    colour: bool,
}

impl Page {
    fn paint(&self, code: &str, text: impl Display) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
    }

    fn verdict(&self, good: bool, text: &str) -> String {
        self.paint(if good { "1;32" } else { "1;31" }, text)
    }

    fn title(&self, text: &str) {
        println!("\n  {}", self.paint("1", text));
    }

    /// Does something and says how long it took.
    fn step<T>(&self, what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let result = work();
        let mark = if result.is_ok() { self.paint("32", "ok") } else { self.paint("31", "--") };
        let took = start.elapsed();
        let took =
            if took.as_secs() == 0 { format!("{} ms", took.as_millis()) } else { format!("{took:.1?}") };
        println!("  {mark}  {what} {}", self.paint("2", format!("({took})")));
        result
    }

    fn containers(&self, lab: &Lab) -> Result<()> {
        println!("  {:<8} {:<10} {:<15} {:<16} {:>5}", "CELL", "HANDLE", "ADDRESS", "HOST INTERFACE", "MTU");
        for cell in &lab.cells {
            let status = cell.status()?;
            for container in status["containers"].as_array().into_iter().flatten() {
                let text = |key: &str| container[key].as_str().unwrap_or_default().to_owned();
                println!(
                    "  {:<8} {:<10} {:<15} {:<16} {:>5}",
                    cell.name,
                    text("handle"),
                    text("address"),
                    text("host_interface"),
                    container["mtu"]
                );
            }
            println!(
                "  {}",
                self.paint(
                    "2",
                    format!(
                        "{}: {} at {}, {} of MTU {}",
                        cell.name,
                        plain(&status["subnet"]),
                        cell.underlay,
                        plain(&status["vtep"]),
                        status["mtu"]
                    )
                )
            );
        }
        Ok(())
    }

    fn matrix(&self, containers: &[Container], pairs: &[Pair]) {
        const WIDTH: usize = 15;
        print!("  {:<22}", "from \\ to");
        for container in containers {
            print!(" {:>WIDTH$}", container.handle);
        }
        println!();
        for (from, container) in containers.iter().enumerate() {
            print!("  {:<22}", format!("{} ({})", container.handle, container.cell));
            for to in 0..containers.len() {
                let pair = pairs.iter().find(|pair| (pair.from, pair.to) == (from, to));
                // Padded before it is painted: escapes have no width.
                let text = pair.map_or_else(|| "-".to_owned(), figures);
                let code = match pair {
                    None => "2",
                    Some(pair) if pair.reached() => "32",
                    Some(_) => "31",
                };
                print!(" {}", self.paint(code, format!("{text:>WIDTH$}")));
            }
            println!();
        }
        for pair in pairs {
            for error in [pair.tcp.as_ref().err(), pair.icmp.as_ref().err()].into_iter().flatten() {
                let (from, to) = (&containers[pair.from].handle, &containers[pair.to].handle);
                println!("  {} {from} to {to}: {error:#}", self.paint("31", "--"));
            }
        }
    }
}

fn figures(pair: &Pair) -> String {
    let tcp = pair.tcp.as_ref().map(|connection| connection.took);
    let figure = |result: Option<std::time::Duration>| {
        result.map_or_else(|| "FAIL".to_owned(), |took| format!("{:.2}", took.as_secs_f64() * 1000.0))
    };
    format!("{} / {}", figure(tcp.ok()), figure(pair.icmp.as_ref().ok().copied()))
}

fn plain(value: &Value) -> &str {
    value.as_str().unwrap_or("-")
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}
