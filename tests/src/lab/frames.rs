//! Every frame that a guest's network card sends from one host into the LAN, of whatever protocol.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::Lab;
use super::domain::guest_mac;
use super::plan::{HostName, Net};
use crate::process;

/// A recording; dropping it ends it.
#[derive(Debug)]
pub(crate) struct FramesFrom {
    recorder: Child,
    frames: PathBuf,
}

impl FramesFrom {
    /// Listens to what comes out of `host`, and not to what goes into it: the guest may run elsewhere as well.
    pub(crate) fn start(lab: &Lab, host: HostName, guest: &str) -> Result<Self> {
        let frames = lab.dir().logs().join(format!("frames-{host}-{guest}"));
        let said = lab.dir().logs().join(format!("frames-{host}-{guest}.tcpdump"));
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &lab.dir().netns(), "tcpdump", "-i", &host.tap(Net::Lan), "-Q", "in"]);
        command.args(["--immediate-mode", "-l", "-n", "-e", "-Z", "root", "ether", "src", &guest_mac(guest)]);
        let recorder =
            command.stdin(Stdio::null()).stdout(File::create(&frames)?).stderr(File::create(&said)?).spawn();
        let this = Self { recorder: recorder.context("cannot run tcpdump")?, frames };
        for _ in 0..100 {
            if fs::read_to_string(&said).is_ok_and(|text| text.contains("listening on")) {
                return Ok(this);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("tcpdump does not listen: {}", fs::read_to_string(&said).unwrap_or_default().trim())
    }

    /// How many there are up to now.
    pub(crate) fn count(&self) -> Result<usize> {
        Ok(fs::read_to_string(&self.frames).context("no recording")?.lines().count())
    }

    /// Waits until there are so many.
    pub(crate) fn wait(&self, count: usize, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        while self.count()? < count {
            ensure!(Instant::now() < end, "only {} of {count} frames came", self.count()?);
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Waits for one that carries something of a TCP connection, over each version of IP: after an interruption a
    /// connection takes longer than everything else to go on.
    pub(crate) fn wait_tcp(&self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        for version in ["IPv4", "IPv6"] {
            let carries = |line: &str| line.contains(version) && line.contains("Flags [P");
            while !fs::read_to_string(&self.frames)?.lines().any(carries) {
                ensure!(Instant::now() < end, "nothing came by TCP over {version}");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        Ok(())
    }

    /// What was sent, a line each.
    pub(crate) fn end(self) -> Result<String> {
        fs::read_to_string(&self.frames).context("no recording")
    }
}

impl Drop for FramesFrom {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.recorder.kill();
        drop(process::wait(&mut self.recorder, Duration::from_secs(5)));
    }
}
