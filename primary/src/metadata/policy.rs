//! What a domain's XML says of failures, and what the agent keeps of it.

use understudy_hook::metadata::Policy;
use understudy_proto::policy::{GuestPolicy, LostBackup, QemuCrash};

fn value<T: Copy>(words: &[(T, &str)], word: Option<&String>) -> Option<T> {
    words.iter().find(|(_, one)| word.is_some_and(|word| word == one)).map(|(value, _)| *value)
}

fn word<T: PartialEq>(words: &[(T, &str)], value: Option<&T>) -> Option<String> {
    words.iter().find(|(one, _)| value == Some(one)).map(|(_, word)| (*word).to_owned())
}

/// As the agent keeps it. The parser of the element has seen to it that every word is known.
pub(super) fn of(said: &Policy) -> GuestPolicy {
    GuestPolicy {
        on_lost_backup: value(&LostBackup::WORDS, said.on_lost_backup.as_ref()),
        on_qemu_crash: value(&QemuCrash::WORDS, said.on_qemu_crash.as_ref()),
        spares: said.spares.clone(),
    }
}

/// As the element says it.
pub(super) fn in_words(kept: &GuestPolicy) -> Policy {
    Policy {
        on_lost_backup: word(&LostBackup::WORDS, kept.on_lost_backup.as_ref()),
        on_qemu_crash: word(&QemuCrash::WORDS, kept.on_qemu_crash.as_ref()),
        spares: kept.spares.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_of_the_element_is_one_of_the_agents() {
        for lost in ["hold", "solo"] {
            for crash in ["failover", "leave"] {
                let said = Policy {
                    on_lost_backup: Some(lost.to_owned()),
                    on_qemu_crash: Some(crash.to_owned()),
                    spares: vec!["c".to_owned()],
                };
                assert_eq!(in_words(&of(&said)), said);
            }
        }
        assert_eq!(in_words(&GuestPolicy::default()), Policy::default());
    }
}
