//! The program that does nothing: what every exec costs at least. Built by scripts/bench, static.

fn main() {}
