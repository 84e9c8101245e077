//! From which host's cable a guest's frames come out, as long as one looks: two at once would be two guests.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Lab;
use super::domain::guest_mac;
use super::plan::{HostName, Net};
use crate::process;

/// Listens on both cables; dropping it ends it.
#[derive(Debug)]
pub(crate) struct Sides {
    recorders: Vec<(HostName, Child, PathBuf)>,
}

impl Sides {
    pub(crate) fn start(lab: &Lab, guest: &str) -> Result<Self> {
        let mut this = Self { recorders: Vec::new() };
        for host in HostName::ALL {
            let frames = lab.dir().logs().join(format!("side-{host}"));
            let said = lab.dir().logs().join(format!("side-{host}.tcpdump"));
            let mut command = process::tied(&lab.dir().helper(), Some(&lab.dir().netns()), "tcpdump");
            command.args([
                "-i",
                &host.tap(Net::Lan),
                "-Q",
                "in",
                "--immediate-mode",
                "-l",
                "-n",
                "-q",
                "-tt",
            ]);
            command.args(["-Z", "root", "ether", "src", &guest_mac(guest)]);
            command.stdin(Stdio::null()).stdout(File::create(&frames)?).stderr(File::create(&said)?);
            this.recorders.push((host, command.spawn().context("cannot run tcpdump")?, frames));
            let listens = || fs::read_to_string(&said).is_ok_and(|text| text.contains("listening on"));
            if !(0..200).any(|_| {
                listens() || {
                    std::thread::sleep(Duration::from_millis(50));
                    false
                }
            }) {
                bail!("tcpdump does not listen: {}", fs::read_to_string(&said).unwrap_or_default().trim());
            }
        }
        Ok(this)
    }

    /// The hosts in the order in which they spoke for the guest, each with how many frames in a row came from it.
    pub(crate) fn turns(&self) -> Result<Vec<(HostName, usize)>> {
        let mut all = Vec::new();
        for (host, _, frames) in &self.recorders {
            let text = fs::read_to_string(frames).context("no recording")?;
            // The last line may be half written.
            let times = text.lines().filter_map(|line| line.split_once(' ')?.0.parse::<f64>().ok());
            all.extend(times.map(|time| (time, *host)));
        }
        all.sort_by(|one, other| one.0.total_cmp(&other.0));
        Ok(in_a_row(all.into_iter().map(|(_, host)| host)))
    }
}

fn in_a_row(hosts: impl Iterator<Item = HostName>) -> Vec<(HostName, usize)> {
    let mut turns: Vec<(HostName, usize)> = Vec::new();
    for host in hosts {
        match turns.last_mut() {
            Some((last, count)) if *last == host => *count += 1,
            _ => turns.push((host, 1)),
        }
    }
    turns
}

impl Drop for Sides {
    fn drop(&mut self) {
        for (_, recorder, _) in &mut self.recorders {
            // It may have ended by itself.
            let _ = recorder.kill();
            drop(process::wait(recorder, Duration::from_secs(5)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_counted() {
        use HostName::{Alpha, Beta};
        let turns = in_a_row([Alpha, Alpha, Beta, Beta, Beta, Alpha].into_iter());
        assert_eq!(turns, [(Alpha, 2), (Beta, 3), (Alpha, 1)]);
    }
}
