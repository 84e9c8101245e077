//! How the command ends: 0 or 1, and one line that says why.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use std::process::{Command, Output};

fn understudy(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_understudy"));
    command.env_remove("UNDERSTUDY_RUN_DIR").env_remove("UNDERSTUDY_CONNECT");
    command.args(arguments).output().unwrap()
}

#[test]
fn it_ends_with_0_or_1() {
    for line in [&["--help"][..], &["--version"], &["protect", "--help"], &["completion", "bash"]] {
        assert_eq!(understudy(line).status.code(), Some(0), "{line:?}");
    }
    for line in [&[][..], &["nonsense"], &["protect", "web"], &["status", "--nonsense"]] {
        let output = understudy(line);
        assert_eq!(output.status.code(), Some(1), "{line:?}");
        assert!(!output.stderr.is_empty(), "{line:?}");
    }
}

#[test]
fn a_failure_is_one_line_and_its_remedy() {
    for (line, words) in [
        (&["--connect", "http://beta", "status"][..], "\"http://beta\""),
        (&["--connect", "/nonexistent/primary.sock", "unprotect", "web"], "/nonexistent/primary.sock"),
        (&["--run-dir", "/nonexistent", "failover", "web"], "/nonexistent/backup.sock"),
        (
            &["--connect", "https://127.0.0.1:1", "--pki-dir", "/nonexistent", "status"],
            "/nonexistent/CA/cacert.pem",
        ),
    ] {
        let output = understudy(line);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{line:?}");
        let mut lines = said.lines();
        assert!(lines.next().is_some_and(|l| l.starts_with("error: ") && l.contains(words)), "{said}");
        assert!(lines.next().is_some_and(|l| l.contains("what to do: ")), "{said}");
    }
}
