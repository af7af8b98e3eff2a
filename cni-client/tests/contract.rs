//! docs/cni.md names a test for each line of the specification: each of them is there.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::fs;
use std::path::Path;

/// Where the tests are that are named by a file's short name.
const FILES: [(&str, &str); 12] = [
    ("plugin", "cni-client/tests/plugin.rs"),
    ("spec", "cni-client/tests/plugin/spec.rs"),
    ("netconf", "cni-client/src/netconf/tests.rs"),
    ("previous", "cni-client/src/previous.rs"),
    ("reasons", "model/tests/reasons.rs"),
    ("cell", "node-daemon/tests/cell.rs"),
    ("calls", "node-daemon/tests/cell/calls.rs"),
    ("links", "node-daemon/tests/kernel/links.rs"),
    ("cni", "testbed/tests/cni.rs"),
    ("containerd", "testbed/tests/containerd.rs"),
    ("failures", "testbed/tests/failures.rs"),
    ("pairs", "testbed/tests/pairs.rs"),
];

fn read(file: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    fs::read_to_string(root.join(file)).unwrap()
}

/// Whether a file has a test of this name: an attribute that says so stands right above it.
fn has_test(text: &str, name: &str) -> bool {
    let mut before = "";
    text.lines().map(str::trim).any(|line| {
        let found = line.contains(&format!("fn {name}(")) && matches!(before, "#[test]" | "#[tokio::test]");
        before = line;
        found
    })
}

#[test]
fn every_line_of_the_specification_names_tests_that_exist() {
    let page = read("docs/cni.md");
    let (_, tables) = page.split_once("## The specification, line by line").unwrap();
    let rows = tables.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| section"));
    let mut named = 0;
    for row in rows.filter(|row| !row.starts_with("| what |")) {
        let cell = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        // A row about what does not apply says so.
        assert!(cell.contains("::") || row.contains("Nothing is delegated"), "no test is named: {row}");
        for test in cell.split('`').filter(|word| word.contains("::")) {
            let (short, name) = test.split_once("::").unwrap();
            let file = FILES.iter().find(|(known, _)| *known == short);
            let (_, file) = file.unwrap_or_else(|| panic!("{short} is no file of tests: {row}"));
            assert!(has_test(&read(file), name), "{file} has no test {name}");
            named += 1;
        }
    }
    assert!(named > 50, "{named} tests are named: is the table where it was?");
}
