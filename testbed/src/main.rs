//! `lab`: cells, controllers and containers on one machine, to play with and to show.

mod demo;

use std::os::fd::AsFd;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use weft_testbed::external_networker::{ECHO_PORT, Request};
use weft_testbed::{Lab, Options, Store, interrupt, lab, prober};

/// A container network on one machine: cells as namespaces, with the real programs on them.
///
/// Nothing touches the machine's own network; everything is gone after `lab down`. Needs root.
#[derive(Debug, Parser)]
#[command(name = "lab", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a lab; prints one JSON document that says where everything is
    Up {
        /// How many cells
        #[arg(long, default_value_t = 2)]
        cells: u32,
        /// Where the controllers keep leases
        #[arg(long, value_enum, default_value = "sqlite")]
        store: Store,
        /// How many controllers; several need `--store postgres`
        #[arg(long, default_value_t = 1)]
        controllers: u32,
        #[command(flatten)]
        lab: Name,
    },
    /// End and remove a lab; and what crashes left of any
    Down {
        #[command(flatten)]
        lab: Name,
        /// Only what crashes left
        #[arg(long)]
        leftovers: bool,
    },
    /// Print the document of `up` again
    Show {
        #[command(flatten)]
        lab: Name,
    },
    /// Run a command on a cell (its network and its mounts)
    Exec {
        #[command(flatten)]
        lab: Name,
        /// A cell, a controller, `underlay`, or CELL/HANDLE for a container's network
        place: String,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Add a container to a cell, with an echo server on port 8080; prints the CNI result
    Add {
        #[command(flatten)]
        lab: Name,
        cell: String,
        handle: String,
    },
    /// Delete a container
    Del {
        #[command(flatten)]
        lab: Name,
        cell: String,
        handle: String,
    },
    /// List the labs of this machine
    List,
    /// Two cells, four containers, real packets between all of them; leaves nothing behind
    Demo,
    /// Answer TCP connections on the listening socket that is standard input
    #[command(hide = true)]
    Echo,
}

#[derive(Debug, clap::Args)]
struct Name {
    /// The lab's name, where there are several
    #[arg(long, default_value = "lab")]
    name: String,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        // A step that failed because the signal ended its program as well says nothing new.
        Err(_) if interrupt::check().is_err() => {
            eprintln!("lab: interrupted; what was made is removed");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Up { cells, store, controllers, lab } => {
            interrupt::watch()?;
            let mut options = Options::named(lab.name)?;
            (options.cells, options.controllers, options.store) = (cells, controllers, store);
            options.progress = true;
            let lab = Lab::up(&options)?;
            println!("{}", serde_json::to_string_pretty(&lab.document())?);
            lab.leave_standing()?;
        }
        Command::Down { lab: Name { name }, leftovers } => {
            if !leftovers {
                let was_there = Lab::remove(&name)?;
                eprintln!("lab: {name} {}", if was_there { "removed" } else { "is not there" });
            }
            Lab::sweep()?;
        }
        Command::Show { lab } => {
            println!("{}", serde_json::to_string_pretty(&Lab::open(&lab.name)?.document())?);
        }
        Command::Exec { lab, place, command } => {
            Lab::open(&lab.name)?.place(&place)?.exec(&command[0], &command[1..])?;
        }
        Command::Add { lab, cell, handle } => {
            let lab = Lab::open(&lab.name)?;
            let cell = lab.cell(&cell)?;
            let there = cell.namespace_file(&handle).exists();
            ensure!(!there, "{handle} is on {} already: `lab del` deletes it", cell.name);
            let container = cell.add(&Request::app(&handle)).inspect_err(|_| {
                // As Garden does after a failed `up`.
                drop(cell.del(&handle));
            })?;
            cell.serve(&container)?;
            println!("{:#}", container.result);
            eprintln!(
                "lab: {handle} on {} is {}, its echo server on port {ECHO_PORT}",
                cell.name, container.addr
            );
        }
        Command::Del { lab, cell, handle } => Lab::open(&lab.name)?.cell(&cell)?.del(&handle)?,
        Command::List => {
            for name in lab::names() {
                match Lab::open(&name) {
                    Ok(lab) => {
                        println!("{name}: cells {}, controllers {}", lab.cells.len(), lab.controllers.len())
                    }
                    Err(_) => println!("{name}: being made, or left by a crash"),
                }
            }
        }
        Command::Demo => return demo::run(),
        Command::Echo => {
            let input = std::io::stdin().as_fd().try_clone_to_owned().context("take the listening socket")?;
            prober::echo(&input.into())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
