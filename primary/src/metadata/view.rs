//! What the engine is told, in its own words.

use understudy_hook::metadata::{Command, Epoch, Output, Policy, Protect, State};

/// What a look at a domain has found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Whether it runs.
    pub running: bool,
    /// It is the standby of a guest that runs elsewhere: its mark is none of this host's business.
    pub standby: bool,
    /// The user's element, or what is wrong with it.
    pub mark: Result<Option<Protect>, String>,
    /// The user's command, or what is wrong with it.
    pub command: Option<Result<Command, String>>,
    /// What an agent has reported there.
    pub reported: Option<State>,
    /// How its protection fares.
    pub protection: Protection,
}

impl Found {
    /// Whether nothing of it concerns us.
    pub fn absent(&self) -> bool {
        self.mark == Ok(None) && self.command.is_none() && self.reported.is_none()
    }
}

/// The protection of a domain by this agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Protection {
    /// None is known.
    None,
    /// There is one.
    Active {
        /// The backup.
        backup: String,
        /// Length of an epoch.
        epoch: Epoch,
        /// Replicated without TLS.
        insecure: bool,
        /// Its output is let through as it comes.
        output: Output,
        /// What was chosen for failures.
        policy: Policy,
        /// What is worth telling.
        report: Report,
    },
    /// There was one.
    Over(Ended),
}

impl Protection {
    /// Whether there is one.
    pub fn is_active(&self) -> bool {
        matches!(self, Self::Active { .. })
    }

    /// The mark that would have asked for it.
    pub fn as_protect(&self) -> Option<Protect> {
        let Self::Active { backup, epoch, insecure, output, policy, .. } = self else { return None };
        Some(Protect {
            enabled: true,
            backup: backup.clone(),
            epoch: Some(*epoch),
            required: false,
            insecure: *insecure,
            output: *output,
            policy: Some(policy.clone()),
            disks: Vec::new(),
            nics: Vec::new(),
        })
    }
}

/// What is worth telling of a protection: nothing that moves with every epoch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The state in one word.
    pub value: String,
    /// The backup.
    pub backup: String,
    /// The guest's owner.
    pub generation: Option<u64>,
    /// Why the state is what it is.
    pub detail: String,
    /// Whether it stands: attempts are counted anew after it.
    pub settled: bool,
}

/// Why a protection is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// An operator said so.
    ByOperator,
    /// The guest is gone.
    WithGuest,
    /// The agent ends.
    WithAgent,
    /// It could not go on.
    Failed(Failed),
}

/// Something that did not work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    /// Machine-readable.
    pub code: String,
    /// In words.
    pub reason: String,
    /// What to do; may be empty.
    pub remedy: String,
    /// Whether another attempt may succeed without anyone changing the mark.
    pub time_helps: bool,
}

impl Failed {
    /// Reason and remedy.
    pub fn in_one_line(&self) -> String {
        match self.remedy.as_str() {
            "" => self.reason.clone(),
            remedy => format!("{}; {remedy}", self.reason),
        }
    }
}
