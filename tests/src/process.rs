//! Child processes: every one has a time limit, and none outlives its parent unnoticed.

use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal};

/// How often a child is asked whether it has ended.
const POLL: Duration = Duration::from_millis(10);

/// What sudo is to leave in the environment.
pub(crate) const PRESERVED: &str = "--preserve-env=PATH,CI,CARGO,CARGO_HOME,RUSTUP_HOME,CARGO_TARGET_DIR,\
    UNDERSTUDY_LAB_CACHE,UNDERSTUDY_LAB_ACCEL,LAB_NAME";

/// A command line as a person would type it.
pub(crate) fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Waits until `child` ends, or kills it when `limit` is over.
pub(crate) fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let end = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for a child")? {
            return Ok(Some(status));
        }
        if Instant::now() >= end {
            child.kill().context("cannot kill a child")?;
            child.wait().context("cannot wait for a child")?;
            return Ok(None);
        }
        std::thread::sleep(POLL);
    }
}

/// Runs a command with its output going where ours goes.
pub(crate) fn status(command: &mut Command, limit: Duration) -> Result<ExitStatus> {
    let text = describe(command);
    let mut child = command.stdin(Stdio::null()).spawn().with_context(|| format!("cannot run `{text}`"))?;
    wait(&mut child, limit)?.with_context(|| format!("`{text}` took longer than {limit:?} and was killed"))
}

/// Runs a command and keeps what it wrote.
pub(crate) fn output(command: &mut Command, limit: Duration) -> Result<Output> {
    let text = describe(command);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run `{text}`"))?;
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    let status = wait(&mut child, limit)?;
    let collected = (stdout.join().unwrap_or_default(), stderr.join().unwrap_or_default());
    let Some(status) = status else { bail!("`{text}` took longer than {limit:?} and was killed") };
    Ok(Output { status, stdout: collected.0, stderr: collected.1 })
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        if let Some(mut pipe) = pipe {
            // What could be read is what there is to show.
            drop(pipe.read_to_end(&mut all));
        }
        all
    })
}

/// Runs a command that must succeed; gives its standard output.
pub(crate) fn checked(command: &mut Command, limit: Duration) -> Result<String> {
    let text = describe(command);
    let output = output(command, limit)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = if said.trim().is_empty() { String::from_utf8_lossy(&output.stdout) } else { said };
        bail!("`{text}` failed ({}): {}", output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The exit status a shell would report.
pub(crate) fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Whether a program can be found on PATH or in the administrator's folders.
pub(crate) fn find_program(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders.map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// Becomes root through sudo when we are not root yet; returns only if we are.
pub(crate) fn ensure_root() -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let us = std::env::current_exe().context("cannot find this program")?;
    eprintln!("The lab needs network namespaces and taps: going on as root through sudo.");
    let error = Command::new("sudo").arg(PRESERVED).arg(us).args(std::env::args_os().skip(1)).exec();
    Err(error).context("cannot become root: run this as root, or install sudo")
}

/// What `__spawn` does between fork and exec: it dies with `parent`, and it is in the namespace.
pub(crate) fn become_child(parent: u32, netns: Option<&str>, command: &[String]) -> Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .context("cannot tie us to our parent")?;
    let ours = rustix::process::getppid().map(Pid::as_raw_nonzero);
    if ours.is_none_or(|pid| u32::try_from(pid.get()) != Ok(parent)) {
        bail!("process {parent}, which wanted this child, is gone");
    }
    if let Some(name) = netns {
        crate::lab::network::enter(name)?;
    }
    let [program, arguments @ ..] = command else { bail!("no command given") };
    let error = Command::new(program).args(arguments).exec();
    Err(error).with_context(|| format!("cannot run {program}"))
}

/// A command that dies with the calling **thread** and runs in a network namespace.
///
/// # Errors
/// When this program's own file cannot be found.
pub(crate) fn tied(
    helper: &std::path::Path,
    netns: Option<&str>,
    program: impl AsRef<std::ffi::OsStr>,
) -> Command {
    let mut command = Command::new(helper);
    command.arg("__spawn").arg("--parent").arg(std::process::id().to_string());
    if let Some(name) = netns {
        command.arg("--netns").arg(name);
    }
    command.arg("--").arg(program);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_past_its_limit_is_killed() {
        let error = output(Command::new("sleep").arg("60"), Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("took longer"), "{error}");
    }

    #[test]
    fn a_failing_command_says_what_it_said() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo broken >&2; exit 3"]);
        let error = checked(&mut command, Duration::from_secs(10)).unwrap_err().to_string();
        assert!(error.contains("broken") && error.contains('3'), "{error}");
    }

    #[test]
    fn a_signal_counts_as_a_shell_counts_it() {
        let status = Command::new("sh").args(["-c", "kill -9 $$"]).status().unwrap();
        assert_eq!(exit_code(status), 137);
    }
}
