//! The program as people and their scripts call it.

use std::process::{Command, Output};

fn weft_node(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_weft-node")).args(arguments).output().expect("executed")
}

#[test]
fn a_question_that_cannot_be_understood_or_answered_is_no_verdict() {
    let wrong = ["explain", "--from", "app", "--to", "1.1.1.1:70000/tcp"];
    let unanswered = ["explain", "--from", "app", "--to", "1.1.1.1:80/tcp", "--socket", "/nonexistent"];
    for (arguments, says) in
        [(&wrong[..], "70000"), (&unanswered[..], "/nonexistent"), (&["explain"][..], "--from")]
    {
        let output = weft_node(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{arguments:?}: {said}");
        assert!(said.contains(says), "{arguments:?}: {said}");
    }
}

#[test]
fn it_introduces_itself() {
    for flag in ["--help", "--version"] {
        let output = weft_node(&[flag]);
        assert!(output.status.success() && !output.stdout.is_empty(), "{flag}: {output:?}");
    }
}
