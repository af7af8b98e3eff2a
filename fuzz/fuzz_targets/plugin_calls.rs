//! What a CNI runtime gives the plugin: the command, the variables and standard input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_cni::{Command, Version, parse};

fuzz_target!(|input: (u8, &str, &[u8])| {
    let (command, value, stdin) = input;
    let commands =
        [Command::Add, Command::Del, Command::Check, Command::Gc, Command::Status, Command::Version];
    let command = commands[usize::from(command) % commands.len()];
    let var = |name: &str| {
        Some(match name {
            "CNI_CONTAINERID" => "handle".to_owned(),
            "CNI_IFNAME" => "eth0".to_owned(),
            _ => value.to_owned(),
        })
    };
    let _ = parse(command, var, stdin, &mut { Version::LATEST });
});
