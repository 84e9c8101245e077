//! Reports of takeovers, as files for people and for programs, and what else of a guest outlives the watchdog.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tracing::{error, info};
use understudy_proto::ids::{EpochId, GuestId};
use understudy_proto::ownership::Ownership;
use understudy_proto::policy::GuestSettings;
use understudy_proto::rpc::admin::FailoverReport;

use super::fencing::Fenced;
use crate::owner::Takeover;

/// Takeovers of a guest that are kept; older ones are removed.
const KEPT: usize = 50;

/// Name of the file that says how the guest is protected.
const SETTINGS: &str = "settings";

/// Where the files are: `GUEST/TERM.json` and `.txt`, terms with leading zeros; `GUEST/home`, `GUEST/settings`.
#[derive(Debug, Clone)]
pub struct Reports {
    folder: PathBuf,
}

/// A report that is complete.
#[derive(Debug, Clone)]
pub(super) struct Finished {
    guest: GuestId,
    term: u64,
    text: String,
    json: Value,
}

impl Finished {
    /// Of the host that has taken the guest over. Times are milliseconds.
    pub(super) fn takeover(
        guest: GuestId,
        name: &str,
        takeover: Takeover,
        fenced: &Fenced,
        promotion: Option<FailoverReport>,
    ) -> Self {
        let at = now_ms();
        let Takeover { suspicion, term, generation, detect_ms, claim_ms, load_ms, confirm_ms, .. } =
            &takeover;
        let ms = |part: std::time::Duration| u64::try_from(part.as_millis()).unwrap_or(u64::MAX);
        // The arbiter's confirmation is behind what the agent measures.
        let announce_ms = promotion.as_ref().map(|did| ms(did.record + did.resume + did.announce));
        let epoch = promotion.as_ref().map(|did| did.epoch).or(takeover.recorded_epoch);
        let total = detect_ms + claim_ms + load_ms + confirm_ms + announce_ms.unwrap_or_default();
        let warnings = promotion.as_ref().map(|did| did.warnings.clone()).unwrap_or_default();
        let json = json!({
            "kind": "takeover", "domain": name, "uuid": guest, "unix_ms": at,
            "suspected": suspicion, "term": term, "generation": generation, "epoch": epoch,
            "detect_ms": detect_ms, "claim_ms": claim_ms, "load_ms": load_ms, "confirm_ms": confirm_ms,
            "announce_ms": announce_ms, "total_ms": total,
            "output_let_out_to_epoch": epoch, "output_discarded_bytes": null,
            "fencing": fenced, "promotion": promotion, "warnings": warnings,
        });
        let shown =
            |value: Option<u64>| value.map_or_else(|| "not known".to_owned(), |ms| format!("{ms} ms"));
        let epoch = epoch.map_or_else(|| "not known".to_owned(), |epoch| epoch.to_string());
        let reason =
            if suspicion.is_empty() { "claimed by an earlier life of the watchdog" } else { suspicion };
        let mut text = format!(
            "{name} ({guest}) was taken over by this host, term {term}, generation {generation}\n\
             why        {reason}\n\
             epoch      {epoch}: what the guest had sent up to it was let out; what it sent afterwards never left the old \
             host, whose report says how much that was\n\
             detect     {detect_ms} ms, from the last sign of life to the suspicion\n\
             claim      {claim_ms} ms, until the arbiter's record was read\n\
             load       {load_ms} ms, until the standby was ready to run\n\
             confirm    {confirm_ms} ms, until the arbiter's record was read again\n\
             announce   {}, until the guest ran and its network cards were announced\n\
             total      {total} ms\n\
             fencing    {}, {}\n",
            shown(announce_ms),
            if fenced.success { "success" } else { "no success" },
            fenced.outcome
        );
        warnings.iter().for_each(|warning| text.push_str(&format!("warning    {warning}\n")));
        Self { guest, term: term.0, text, json }
    }

    /// Of the host that has lost it.
    pub(super) fn lost(
        guest: GuestId,
        name: &str,
        record: &Ownership,
        epoch: Option<EpochId>,
        held_bytes: Option<u64>,
    ) -> Self {
        let (term, generation) = (record.term, record.generation);
        let json = json!({
            "kind": "lost", "domain": name, "uuid": guest, "unix_ms": now_ms(), "term": term,
            "generation": generation, "owner": record.owner, "epoch": epoch, "output_discarded_bytes": held_bytes,
        });
        let held = held_bytes.map_or_else(|| "not known".to_owned(), |bytes| format!("{bytes} bytes"));
        let epoch = epoch.map_or_else(|| "not known".to_owned(), |epoch| epoch.to_string());
        let text = format!(
            "{name} ({guest}) was taken from this host, term {term}, generation {generation}: its instance here is ended\n\
             epoch      {epoch}, the last one known here to be committed\n\
             discarded  {held} of output that waited for a commit\n"
        );
        Self { guest, term: term.0, text, json }
    }
}

impl Reports {
    /// In this folder, which need not be there.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    fn of(&self, guest: GuestId) -> PathBuf {
        self.folder.join(guest.to_string())
    }

    /// Writes it behind the caller's back: a slow disk must not keep heartbeats waiting.
    pub(super) fn write(&self, report: Finished) {
        let folder = self.of(report.guest);
        tokio::task::spawn_blocking(move || {
            let file = folder.join(format!("{:020}.json", report.term));
            match write(&folder, &report) {
                Ok(()) => info!(guest = %report.guest, file = %file.display(), "reported"),
                Err(error) => error!(guest = %report.guest, file = %file.display(), %error, "cannot report"),
            }
        });
    }

    /// The newest report of a guest, as text and JSON. Blocks.
    ///
    /// # Errors
    /// Of the file system.
    pub fn newest(&self, guest: GuestId) -> io::Result<Option<(String, String)>> {
        let folder = self.of(guest);
        let Some(stem) = stems(&folder)?.pop() else { return Ok(None) };
        let read = |kind| fs::read_to_string(folder.join(&stem).with_extension(kind));
        Ok(Some((read("txt")?, read("json")?)))
    }

    /// The host on which the guest's protection began, if that is known. Blocks for a moment.
    pub(super) fn home(&self, guest: GuestId) -> Option<String> {
        fs::read_to_string(self.of(guest).join("home")).ok().filter(|name| !name.is_empty())
    }

    pub(super) fn remember_home(&self, guest: GuestId, home: Option<&str>) {
        let (folder, home) = (self.of(guest), home.map(str::to_owned));
        tokio::task::spawn_blocking(move || {
            let done = match home {
                Some(home) => {
                    fs::create_dir_all(&folder).and_then(|()| replace(&folder.join("home"), home.as_bytes()))
                }
                None => fs::remove_file(folder.join("home")),
            };
            if let Err(error) = done {
                error!(%guest, %error, "cannot remember the guest's home");
            }
        });
    }
}

impl Reports {
    /// How the guest was protected last, as far as that is known here. Blocks for a moment.
    pub(super) fn settings(&self, guest: GuestId) -> Option<GuestSettings> {
        GuestSettings::decode(&fs::read(self.of(guest).join(SETTINGS)).ok()?).ok()
    }

    /// Whoever runs the guest after this process is to know it.
    pub(super) fn remember_settings(&self, guest: GuestId, settings: &GuestSettings) {
        let (folder, encoded) = (self.of(guest), settings.encode());
        tokio::task::spawn_blocking(move || {
            let done = encoded.map_err(io::Error::other).and_then(|bytes| {
                fs::create_dir_all(&folder)?;
                replace(&folder.join(SETTINGS), &bytes)
            });
            if let Err(error) = done {
                error!(%guest, %error, "cannot remember how the guest is protected");
            }
        });
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Names of reports without their endings, oldest first.
fn stems(folder: &Path) -> io::Result<Vec<String>> {
    let listed = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed?,
    };
    let mut stems = Vec::new();
    for entry in listed {
        let name = entry?.file_name();
        stems.extend(name.to_str().and_then(|name| name.strip_suffix(".json")).map(str::to_owned));
    }
    stems.sort();
    Ok(stems)
}

fn write(folder: &Path, report: &Finished) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let file = folder.join(format!("{:020}", report.term));
    // The JSON is looked for, so it comes last.
    replace(&file.with_extension("txt"), report.text.as_bytes())?;
    replace(&file.with_extension("json"), format!("{}\n", report.json).as_bytes())?;
    let stems = stems(folder)?;
    for stem in stems.iter().take(stems.len().saturating_sub(KEPT)) {
        for kind in ["json", "txt"] {
            fs::remove_file(folder.join(stem).with_extension(kind))?;
        }
    }
    Ok(())
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let fresh = path.with_extension("new");
    fs::write(&fresh, bytes)?;
    fs::File::open(&fresh)?.sync_all()?;
    fs::rename(&fresh, path)
}

#[cfg(test)]
mod tests {
    use understudy_proto::ids::Generation;
    use understudy_proto::ownership::{Owner, Term};

    use super::*;

    const GUEST: GuestId = GuestId(uuid::Uuid::from_u128(1));

    fn takeover(term: u64) -> Takeover {
        Takeover {
            suspicion: "silent on all paths for 1500 ms".into(),
            term: Term(term),
            generation: Generation(2),
            recorded_epoch: Some(EpochId(7)),
            detect_ms: 1500,
            claim_ms: 12,
            load_ms: 40,
            confirm_ms: 9,
        }
    }

    #[test]
    fn the_newest_report_is_found_and_old_ones_go() {
        let folder = tempfile::tempdir().unwrap();
        let reports = Reports::new(folder.path().join("reports"));
        assert_eq!(reports.newest(GUEST).unwrap(), None);
        let fenced = Fenced { success: false, outcome: "failed: exit status: 1".into() };
        for term in 1..=60 {
            let report = Finished::takeover(GUEST, "g1", takeover(term), &fenced, None);
            write(&reports.of(GUEST), &report).unwrap();
        }
        let (text, json) = reports.newest(GUEST).unwrap().unwrap();
        let json: Value = serde_json::from_str(&json).unwrap();
        assert_eq!((json["term"].as_u64(), json["total_ms"].as_u64()), (Some(60), Some(1561)));
        assert!(text.contains("term 60") && text.contains("detect     1500 ms"), "{text}");
        assert!(text.contains("fencing    no success, failed: exit status: 1\n"), "{text}");
        assert_eq!(json["fencing"]["success"], false);
        assert_eq!(stems(&reports.of(GUEST)).unwrap().len(), KEPT);
    }

    #[test]
    fn the_loser_says_what_it_has_discarded() {
        let record = Ownership {
            term: Term(3),
            generation: Generation(2),
            epoch: None,
            owner: Owner::Solo { owner: "beta".into() },
        };
        let report = Finished::lost(GUEST, "g1", &record, Some(EpochId(5)), Some(1234));
        assert_eq!(report.json["output_discarded_bytes"], 1234);
        assert!(report.text.contains("discarded  1234 bytes"), "{}", report.text);
    }
}
