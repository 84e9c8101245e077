//! What is made from the definition of the command line: completion and manual pages.

use std::io::Write;
use std::path::Path;

use clap::CommandFactory;
use understudy_proto::rpc::{Failure, FailureKind};

use crate::args::Args;

fn failure(what: impl std::fmt::Display, error: &std::io::Error) -> Failure {
    Failure::new(FailureKind::Internal, "write", format!("cannot write {what}: {error}"))
}

/// `understudy completion`.
pub(crate) fn completion(shell: clap_complete::Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "understudy", &mut script);
    std::io::stdout().write_all(&script).map_err(|error| failure("to standard output", &error))
}

/// `understudy man`: one page for the command and one for each of its verbs.
pub(crate) fn manual(folder: &Path) -> Result<(), Failure> {
    clap_mangen::generate_to(Args::command(), folder).map_err(|error| {
        failure(folder.display(), &error).with_remedy("give a folder that exists and that you may write to")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_has_a_manual_page_and_is_completed() {
        let folder = tempfile::tempdir().unwrap();
        manual(folder.path()).unwrap();
        let mut script = Vec::new();
        clap_complete::generate(clap_complete::Shell::Bash, &mut Args::command(), "understudy", &mut script);
        let script = String::from_utf8(script).unwrap();
        for verb in Args::command().get_subcommands() {
            let page = folder.path().join(format!("understudy-{}.1", verb.get_name()));
            assert!(std::fs::metadata(&page).unwrap().len() > 100, "{}", page.display());
            assert!(script.contains(verb.get_name()), "{}", verb.get_name());
        }
        assert!(manual(Path::new("/nonexistent")).is_err());
    }
}
