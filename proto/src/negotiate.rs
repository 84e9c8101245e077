//! Which protocol two agents speak: decided once per connection, by a pure function of both offers.
//!
//! A build speaks the newest version it knows and the one before it (N and N-1), so hosts can be upgraded one
//! after the other. Smaller additions are features: used only if both sides name them.

use crate::{ProtocolError, limits};
use std::collections::BTreeSet;

/// A version of the epoch protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    /// Its number.
    pub number: u32,
    /// What changed against the version before.
    pub change: &'static str,
}

/// Every version there ever was, oldest first.
pub const VERSIONS: &[Version] =
    &[Version { number: 1, change: "first: full and delta epochs, zero and raw pages, one epoch in flight" }];

/// How many of the newest [`VERSIONS`] a build speaks.
pub const SPOKEN_VERSIONS: usize = 2;

/// Something a build can do beyond its protocol version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    /// Its name on the wire.
    pub name: &'static str,
    /// What both sides do differently when it is agreed.
    pub meaning: &'static str,
}

/// Every feature this build has. Codecs other than those of version 1 are features named `codec/NAME`.
pub const FEATURES: &[Feature] = &[
    Feature {
        name: FEATURE_XBZRLE,
        meaning: "records of deltas may refer to the epoch before: unchanged, XBZRLE",
    },
    Feature { name: FEATURE_LZ4, meaning: "pages and batches of records may be LZ4 blocks" },
    Feature { name: FEATURE_LONG_BATCHES, meaning: "batches may have 240 KiB of records, and not 60" },
    Feature { name: FEATURE_LANES, meaning: "page frames may come by further connections" },
];

/// Name of the feature of records by reference.
pub const FEATURE_XBZRLE: &str = "codec/xbzrle";

/// Name of the feature of LZ4 blocks.
pub const FEATURE_LZ4: &str = "codec/lz4";

/// Name of the feature of batches of up to [`limits::MAX_BATCH_BYTES`].
pub const FEATURE_LONG_BATCHES: &str = "codec/long-batches";

/// Name of the feature of frames by further connections.
pub const FEATURE_LANES: &str = "lanes";

/// What one side can speak.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    versions: BTreeSet<u32>,
    features: BTreeSet<String>,
}

impl Offer {
    /// What this build can speak.
    pub fn ours() -> Self {
        Self {
            versions: VERSIONS.iter().rev().take(SPOKEN_VERSIONS).map(|v| v.number).collect(),
            features: FEATURES.iter().map(|f| f.name.to_owned()).collect(),
        }
    }

    /// A checked offer of the other side.
    ///
    /// # Errors
    /// If it has no version, or more entries or longer names than [`limits`] allow.
    pub fn new(
        versions: impl IntoIterator<Item = u32, IntoIter: ExactSizeIterator>,
        features: impl IntoIterator<Item = String, IntoIter: ExactSizeIterator>,
    ) -> Result<Self, ProtocolError> {
        let (versions, features) = (versions.into_iter(), features.into_iter());
        let max = limits::MAX_OFFER_ENTRIES as u64;
        ProtocolError::check_len("number of offered versions", versions.len() as u64, max)?;
        ProtocolError::check_len("number of offered features", features.len() as u64, max)?;
        let offer = Self { versions: versions.collect(), features: features.collect() };
        if offer.versions.is_empty() {
            return Err(ProtocolError::Missing { field: "offered versions" });
        }
        for name in &offer.features {
            ProtocolError::check_len(
                "feature name bytes",
                name.len() as u64,
                limits::MAX_FEATURE_NAME_BYTES as u64,
            )?;
        }
        Ok(offer)
    }

    /// Versions, ascending.
    pub fn versions(&self) -> impl ExactSizeIterator<Item = u32> + '_ {
        self.versions.iter().copied()
    }

    /// Names of features, ascending.
    pub fn features(&self) -> impl ExactSizeIterator<Item = &str> + '_ {
        self.features.iter().map(String::as_str)
    }
}

/// What both sides speak from now on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreement {
    /// The protocol version.
    pub version: u32,
    /// The features in use.
    pub features: BTreeSet<String>,
}

/// Two sides without a common version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no common protocol version: this side speaks {ours:?}, the other {theirs:?}")]
pub struct NoCommonVersion {
    /// Versions of this side, ascending.
    pub ours: Vec<u32>,
    /// Versions of the other side, ascending.
    pub theirs: Vec<u32>,
}

impl NoCommonVersion {
    /// What a person can do about it.
    pub fn remedy(&self) -> &'static str {
        if self.ours.last() < self.theirs.last() {
            "upgrade Understudy on this host; versions may differ by one between two hosts"
        } else {
            "upgrade Understudy on the other host; versions may differ by one between two hosts"
        }
    }
}

/// The highest version and all features both sides have.
///
/// # Errors
/// [`NoCommonVersion`] if there is none.
pub fn select(ours: &Offer, theirs: &Offer) -> Result<Agreement, NoCommonVersion> {
    match ours.versions.intersection(&theirs.versions).max() {
        Some(&version) => Ok(Agreement {
            version,
            features: ours.features.intersection(&theirs.features).cloned().collect(),
        }),
        None => Err(NoCommonVersion {
            ours: ours.versions.iter().copied().collect(),
            theirs: theirs.versions.iter().copied().collect(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(versions: &[u32], features: &[&str]) -> Offer {
        let features: Vec<_> = features.iter().map(|f| (*f).to_owned()).collect();
        Offer::new(versions.to_vec(), features).unwrap()
    }

    #[test]
    fn selection_table() {
        // ours, theirs, version
        let table: &[(&[u32], &[u32], Option<u32>)] = &[
            (&[1], &[1], Some(1)),
            (&[1, 2], &[1], Some(1)),
            (&[1, 2], &[2, 3], Some(2)),
            (&[2, 3], &[3, 2], Some(3)),
            (&[1, 2], &[3, 4], None),
        ];
        for (ours, theirs, version) in table {
            let selected = select(&offer(ours, &[]), &offer(theirs, &[])).ok().map(|a| a.version);
            assert_eq!(selected, *version, "{ours:?} and {theirs:?}");
        }
    }

    #[test]
    fn only_features_of_both_are_used() {
        let agreed = select(&offer(&[1], &["codec/lz4", "x"]), &offer(&[1], &["codec/lz4", "y"])).unwrap();
        assert_eq!(agreed.features.into_iter().collect::<Vec<_>>(), ["codec/lz4"]);
    }

    #[test]
    fn the_remedy_names_the_host_that_is_behind() {
        let (old, new) = (offer(&[1, 2], &[]), offer(&[3, 4], &[]));
        let err = select(&old, &new).unwrap_err();
        assert_eq!(err.to_string(), "no common protocol version: this side speaks [1, 2], the other [3, 4]");
        assert!(err.remedy().contains("this host"));
        assert!(select(&new, &old).unwrap_err().remedy().contains("the other host"));
    }

    #[test]
    fn this_build_agrees_with_itself_on_its_newest_version() {
        assert!(VERSIONS.windows(2).all(|w| w[0].number + 1 == w[1].number));
        let agreed = select(&Offer::ours(), &Offer::ours()).unwrap();
        assert_eq!(Some(agreed.version), VERSIONS.last().map(|v| v.number));
    }

    #[test]
    fn offers_are_bounded() {
        let none = Vec::<String>::new();
        assert_eq!(Offer::new(vec![], none.clone()).unwrap_err().to_string(), "offered versions is missing");
        assert_eq!(
            Offer::new(vec![1; 65], none).unwrap_err().to_string(),
            "number of offered versions is 65, the limit is 64"
        );
        assert_eq!(
            Offer::new(vec![1], vec!["f".repeat(65)]).unwrap_err().to_string(),
            "feature name bytes is 65, the limit is 64"
        );
    }
}
