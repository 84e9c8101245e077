//! `understudy hook`: libvirt's hook, installed.
//!
//! libvirt runs every executable file in `hooks/qemu.d`. It looks only once, when its daemon starts or is told to reload,
//! **whether** there is any hook at all: the first one is not seen before that, further ones are.

use std::fs;
use std::io::{self, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use understudy_hook::call::{self, Answer, Call, HOOK_SOCKET};
use understudy_proto::rpc::{Failure, FailureKind};

use crate::args::{HookArgs, HookCommand};

const NAME: &str = "50-understudy";
const RELOAD: &str =
    "systemctl reload virtqemud, or libvirtd where that is the daemon (guests are not disturbed)";

/// How long the agent may take over its answer; libvirt's hook would wait no longer.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// Parts of a second in which the kernel counts the age of processes: USER_HZ, the same on every Linux.
const TICKS_PER_SECOND: i64 = 100;

/// `understudy hook`.
pub(crate) fn run(run_dir: &Path, command: &HookCommand) -> Result<(), Failure> {
    match command {
        HookCommand::Install(args) => {
            let first = install(&args.hooks_dir, &program(args)?)?;
            println!("installed {}", place(&args.hooks_dir).display());
            if first {
                println!("it is the first hook here, which libvirt does not see by itself: {RELOAD}");
            }
            Ok(())
        }
        HookCommand::Remove(args) => {
            match fs::remove_file(place(&args.hooks_dir)) {
                Ok(()) => println!("removed; libvirt does not run it any more"),
                Err(error) if error.kind() == io::ErrorKind::NotFound => println!("it was not installed"),
                Err(error) => return Err(failure(&place(&args.hooks_dir), &error)),
            }
            Ok(())
        }
        HookCommand::Status(args) => {
            let trouble = status(run_dir, &args.hooks_dir, program(args).ok().as_deref(), daemon_since());
            match trouble {
                None => println!("the hook is installed, and the agent answers it"),
                Some((reason, remedy)) => {
                    return Err(
                        Failure::new(FailureKind::FailedPrecondition, "hook", reason).with_remedy(remedy)
                    );
                }
            }
            Ok(())
        }
    }
}

fn place(hooks_dir: &Path) -> PathBuf {
    hooks_dir.join("qemu.d").join(NAME)
}

fn failure(path: &Path, error: &io::Error) -> Failure {
    let reason = format!("{}: {error}", path.display());
    Failure::new(FailureKind::FailedPrecondition, "hook", reason).with_remedy("use root")
}

fn program(args: &HookArgs) -> Result<PathBuf, Failure> {
    let found = match &args.program {
        Some(program) => program.clone(),
        None => std::env::current_exe().unwrap_or_default().with_file_name("understudy-hook"),
    };
    if found.is_file() {
        return Ok(found);
    }
    let reason = format!("{} is not there", found.display());
    Err(Failure::new(FailureKind::NotFound, "hook", reason)
        .with_remedy("install understudy-hook beside understudy, or name it with --program"))
}

/// Copies the hook, as a whole or not at all; says whether libvirt had no hook before. A copy, not a link: where libvirt
/// is confined it may run what is in its own folder.
fn install(hooks_dir: &Path, program: &Path) -> Result<bool, Failure> {
    let target = place(hooks_dir);
    let folder = hooks_dir.join("qemu.d");
    fs::create_dir_all(&folder).map_err(|error| failure(&folder, &error))?;
    let first = hooks(hooks_dir).is_empty();
    // Beside the folder: whatever is in it is run.
    let partial = hooks_dir.join(".understudy-hook.partial");
    let copied = fs::copy(program, &partial)
        .and_then(|_| fs::set_permissions(&partial, fs::Permissions::from_mode(0o755)))
        .and_then(|()| fs::rename(&partial, &target));
    copied.map_err(|error| failure(&target, &error))?;
    Ok(first)
}

/// Every hook that libvirt would run for a guest.
fn hooks(hooks_dir: &Path) -> Vec<PathBuf> {
    let more = fs::read_dir(hooks_dir.join("qemu.d")).into_iter().flatten().flatten();
    let all = std::iter::once(hooks_dir.join("qemu")).chain(more.map(|entry| entry.path()));
    let runs = |path: &PathBuf| {
        fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    all.filter(runs).collect()
}

/// What is wrong and what to do about it. `daemon_since` is when libvirt's daemon was started, in seconds since 1970.
fn status(
    run_dir: &Path,
    hooks_dir: &Path,
    program: Option<&Path>,
    daemon_since: Option<i64>,
) -> Option<(String, String)> {
    let again = "`understudy hook install`".to_owned();
    let target = place(hooks_dir);
    let Ok(installed) = fs::read(&target) else {
        return Some((format!("it is not installed: there is no {}", target.display()), again));
    };
    if program.is_some_and(|program| fs::read(program).is_ok_and(|wanted| wanted != installed)) {
        return Some((format!("{} is of another release", target.display()), again));
    }
    let all = hooks(hooks_dir);
    if !all.contains(&target) {
        return Some((format!("{} cannot be run", target.display()), again));
    }
    let oldest = all.iter().filter_map(|path| fs::metadata(path).ok()).map(|found| found.ctime()).min();
    if let (Some(daemon), Some(oldest)) = (daemon_since, oldest)
        && oldest > daemon
    {
        let reason = "every hook here is newer than libvirt's daemon, which has seen none unless it was told to \
                      reload since";
        return Some((reason.to_owned(), RELOAD.to_owned()));
    }
    let socket = run_dir.join(HOOK_SOCKET);
    match ask(&socket) {
        Ok(()) => None,
        Err(error) => Some((
            format!("the agent does not answer on {}: {error}", socket.display()),
            "start understudy-primary; until then only guests with required='yes' are refused".to_owned(),
        )),
    }
}

fn ask(socket: &Path) -> io::Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    stream.set_write_timeout(Some(ANSWER_LIMIT))?;
    let call = Call {
        guest: String::new(),
        operation: "status".to_owned(),
        phase: String::new(),
        extra: String::new(),
        may_refuse: false,
        backup: String::new(),
        insecure: false,
        mistake: String::new(),
    };
    stream.write_all(&call::line(&call)?)?;
    call::read_line::<Answer>(BufReader::new(stream)).map(drop)
}

/// When libvirt's daemon for QEMU was started, in seconds since 1970.
fn daemon_since() -> Option<i64> {
    let boot: i64 = fs::read_to_string("/proc/stat")
        .ok()?
        .lines()
        .find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok())?;
    let processes = fs::read_dir("/proc").ok()?.flatten().map(|entry| entry.path());
    let started = processes.filter_map(|process| {
        let name = fs::read_to_string(process.join("comm")).ok()?;
        if !["libvirtd", "virtqemud"].contains(&name.trim()) {
            return None;
        }
        let stat = fs::read_to_string(process.join("stat")).ok()?;
        // The name may contain anything; the 22nd field is the 20th behind it.
        let after = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?;
        Some(boot + after.parse::<i64>().ok()? / TICKS_PER_SECOND)
    });
    started.min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_hook_needs_a_reload_and_a_second_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let hooks_dir = folder.path().join("hooks");
        let program = folder.path().join("understudy-hook");
        fs::write(&program, "#!/bin/true\n").unwrap();
        assert!(install(&hooks_dir, &program).unwrap());
        // Again: an upgrade.
        assert!(!install(&hooks_dir, &program).unwrap());
        assert_eq!(hooks(&hooks_dir), [place(&hooks_dir)]);
        fs::remove_file(place(&hooks_dir)).unwrap();
        // What cannot be run is no hook.
        fs::write(hooks_dir.join("qemu.d/readme"), "x").unwrap();
        assert!(install(&hooks_dir, &program).unwrap());
        fs::remove_file(place(&hooks_dir)).unwrap();
        fs::write(hooks_dir.join("qemu"), "#!/bin/true\n").unwrap();
        fs::set_permissions(hooks_dir.join("qemu"), fs::Permissions::from_mode(0o700)).unwrap();
        assert!(!install(&hooks_dir, &program).unwrap());
    }

    #[test]
    fn status_says_what_is_missing_and_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let (hooks_dir, run_dir) = (folder.path().join("hooks"), folder.path());
        let program = folder.path().join("understudy-hook");
        fs::write(&program, "#!/bin/true\n").unwrap();
        let told = |since| status(run_dir, &hooks_dir, Some(&program), since).unwrap();
        assert!(told(None).0.contains("not installed"));
        install(&hooks_dir, &program).unwrap();
        assert!(told(Some(0)).1.contains("reload"));
        // A daemon of the far future has seen it; then it is the agent that is missing.
        assert!(told(Some(i64::MAX)).0.contains("does not answer"));
        fs::write(&program, "another release").unwrap();
        assert!(told(None).0.contains("another release"));
        fs::set_permissions(place(&hooks_dir), fs::Permissions::from_mode(0o644)).unwrap();
        fs::copy(place(&hooks_dir), &program).unwrap();
        assert!(told(None).0.contains("cannot be run"));
    }
}
