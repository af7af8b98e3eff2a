//! The table of reasons in docs/operating.md is the one in the code.
//!
//! `WEFT_REGENERATE=1 cargo test -p weft-model --test reasons` writes it.
#![expect(clippy::unwrap_used, reason = "a failed step of a test is its failure")]

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use weft_model::reason::{Class, Level, Reason};

const BEGIN: &str = "<!-- reasons: written by model/tests/reasons.rs -->\n";
const END: &str = "<!-- end of reasons -->\n";

/// One of each, with the names of its fields for values.
fn samples() -> Vec<Reason> {
    let s = |name: &str| format!("<{name}>");
    vec![
        Reason::InvalidEnvironment { name: s("name"), why: s("why") },
        Reason::UnreadableInput { why: s("why") },
        Reason::InvalidJson { why: s("why") },
        Reason::InvalidField { field: s("field"), why: s("why") },
        Reason::CniVersionUnsupported { given: s("given"), supported: s("supported") },
        Reason::FieldUnsupported { field: s("field"), value: s("value") },
        Reason::NamespaceGone { path: s("path"), why: s("why") },
        Reason::NamespaceWrongKind { path: s("path") },
        Reason::NamespaceIsCells { path: s("path") },
        Reason::UnknownContainer { handle: s("handle") },
        Reason::Damaged { handle: s("handle"), what: s("what") },
        Reason::AlreadyAdded { handle: s("handle") },
        Reason::HostPortTaken { port: 61_000, holder: s("holder") },
        Reason::InterfaceTaken { interface: s("interface") },
        Reason::SubnetFull { subnet: s("subnet") },
        Reason::PoolExhausted { network: s("network") },
        Reason::LeaseConflict { holder: s("holder") },
        Reason::NotYours { claimed: s("claimed"), seen: s("seen") },
        Reason::WrongRole { wanted: s("wanted") },
        Reason::StoreUnavailable,
        Reason::CommitUnknown,
        Reason::Reconciling,
        Reason::ControllerAway { why: s("why") },
        Reason::NoLeaseYet { why: s("why") },
        Reason::Starting,
        Reason::Busy,
        Reason::Deadline { operation: s("operation") },
        Reason::DaemonAway { socket: s("socket"), why: s("why") },
        Reason::Kernel { operation: s("operation"), subject: s("subject"), why: s("why") },
        Reason::File { operation: s("operation"), path: s("path"), why: s("why") },
        Reason::Bug { invariant: s("invariant") },
    ]
}

fn name(reason: &Reason) -> String {
    serde_json::to_value(reason).unwrap()["reason"].as_str().unwrap().to_owned()
}

fn table() -> String {
    let mut text =
        "| reason | message | CNI code | gRPC status | then | logged as |\n|---|---|---|---|---|---|\n"
            .to_owned();
    for reason in samples() {
        let meaning = reason.meaning();
        let then = match meaning.class {
            Class::Retry => "ask again later",
            Class::Refused => "mend the cause first",
            Class::Fenced => "the cell adds nothing until a person has acted",
        };
        let level = match meaning.level {
            Level::Info => "INFO",
            Level::Warn => "WARN",
            Level::Error => "ERROR",
        };
        let message = reason.to_string().replace(['<', '>'], "*");
        writeln!(
            text,
            "| `{}` | {message} | {} | {:?} | {then} | {level} |",
            name(&reason),
            meaning.cni,
            meaning.rpc
        )
        .unwrap();
    }
    text
}

#[test]
fn there_is_a_sample_of_each_reason() {
    let names: BTreeSet<String> = samples().iter().map(name).collect();
    assert_eq!(names.len(), samples().len(), "no reason twice");
    let variants = include_str!("../src/reason.rs").matches("#[error(").count();
    assert_eq!(names.len(), variants, "every variant of Reason is in samples()");
}

#[test]
fn the_page_for_operators_has_the_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operating.md");
    let page = fs::read_to_string(&path).unwrap();
    let (before, rest) = page.split_once(BEGIN).expect("docs/operating.md has the opening marker");
    let (_, after) = rest.split_once(END).expect("docs/operating.md has the closing marker");
    let wanted = format!("{before}{BEGIN}{}{END}{after}", table());
    if std::env::var_os("WEFT_REGENERATE").is_some() {
        fs::write(&path, wanted).unwrap();
    } else {
        assert_eq!(page, wanted, "run with WEFT_REGENERATE=1 to write the table anew");
    }
}
