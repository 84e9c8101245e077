//! The versions of QEMU, by how their COLO has to be spoken to.

use std::fmt;

use understudy_libvirt::QemuVersion;

/// How a QEMU speaks COLO. The RAM records, the device buffer and the seven messages are the same in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// 7.2: capability `return-path` off; migration status goes from `active` to `colo`.
    V7_2,
    /// 8.0 to 10.0.x (x >= 7) and 10.2: as 7.2 by way of `device`, with command SWITCHOVER_START. Tested on 10.0.13.
    V10_0,
    /// 11: `return-path` on, and the status stays `device` until the peer has shut the return path.
    V11,
}

/// How the end of a full copy shows: the device sections behind the RAM have no length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EndOfPrecopy {
    /// Status `colo` is set after the last byte was flushed into the socket: what is there then is all.
    StatusColo,
    /// The socket is quiet and the bytes end in a complete description section; QEMU waits for SHUT.
    QuietAfterDescription,
}

/// A QEMU whose COLO cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("QEMU {version} cannot be captured: {reason}; {remedy}")]
pub struct Unsupported {
    /// The version.
    pub version: QemuVersion,
    /// What is wrong with it.
    pub reason: &'static str,
    /// What to do about it.
    pub remedy: &'static str,
}

impl Dialect {
    /// The dialect of a QEMU.
    ///
    /// # Errors
    /// [`Unsupported`] for versions before 7.2, 10.0.0 to 10.0.6, and 10.1.
    pub fn choose(version: &QemuVersion) -> Result<Self, Unsupported> {
        let refuse = |reason, remedy| Err(Unsupported { version: version.clone(), reason, remedy });
        match version.numbers() {
            (0..=6, ..) | (7, 0..=1, _) => refuse(
                "its checkpoint protocol is too old",
                "upgrade QEMU to 7.2 or newer and restart the guest",
            ),
            (7, ..) => Ok(Self::V7_2),
            (10, 0, 0..=6) => refuse(
                "its migration completes instead of entering COLO and leaves the guest stopped",
                "upgrade QEMU to 10.0.7 or newer and restart the guest",
            ),
            (10, 1, _) => refuse(
                "its migration does not enter COLO",
                "upgrade QEMU to 10.2 or newer, or use 10.0.7 or newer of 10.0, and restart the guest",
            ),
            (8..=10, ..) => Ok(Self::V10_0),
            (11.., ..) => Ok(Self::V11),
        }
    }

    /// The dialect of a QEMU of this one's version that does or does not want the return path on for COLO. Where the
    /// change came between 10.0 and 11.1 is not known by version, so QEMU's own word counts.
    pub(super) fn with_return_path(self, wanted: bool) -> Self {
        match (self, wanted) {
            (_, true) => Self::V11,
            (Self::V11, false) => Self::V10_0,
            (other, false) => other,
        }
    }

    /// Whether capability `return-path` must be on; where it must not be, it kills the channel.
    pub(super) fn return_path(self) -> bool {
        matches!(self, Self::V11)
    }

    pub(super) fn end_of_precopy(self) -> EndOfPrecopy {
        match self {
            Self::V7_2 | Self::V10_0 => EndOfPrecopy::StatusColo,
            Self::V11 => EndOfPrecopy::QuietAfterDescription,
        }
    }
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V7_2 => "7.2",
            Self::V10_0 => "10.0",
            Self::V11 => "11",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_their_dialects() {
        let choose = |major, minor, micro| {
            Dialect::choose(&QemuVersion { major, minor, micro, package: String::new() })
        };
        for (version, wanted) in [
            ((6, 2, 0), None),
            ((7, 1, 9), None),
            ((7, 2, 0), Some(Dialect::V7_2)),
            ((7, 2, 22), Some(Dialect::V7_2)),
            ((8, 0, 0), Some(Dialect::V10_0)),
            ((9, 2, 4), Some(Dialect::V10_0)),
            ((10, 0, 0), None),
            ((10, 0, 6), None),
            ((10, 0, 7), Some(Dialect::V10_0)),
            ((10, 0, 13), Some(Dialect::V10_0)),
            ((10, 1, 0), None),
            ((10, 1, 9), None),
            ((10, 2, 0), Some(Dialect::V10_0)),
            ((11, 1, 3), Some(Dialect::V11)),
            ((12, 0, 0), Some(Dialect::V11)),
        ] {
            assert_eq!(choose(version.0, version.1, version.2).ok(), wanted, "{version:?}");
        }
        assert_eq!(
            choose(10, 0, 2).unwrap_err().to_string(),
            "QEMU 10.0.2 cannot be captured: its migration completes instead of entering COLO and leaves the guest \
             stopped; upgrade QEMU to 10.0.7 or newer and restart the guest"
        );
    }

    #[test]
    fn what_qemu_says_of_the_return_path_counts_more_than_its_version() {
        assert_eq!(Dialect::V10_0.with_return_path(true), Dialect::V11);
        assert_eq!(Dialect::V11.with_return_path(false), Dialect::V10_0);
        assert_eq!(Dialect::V7_2.with_return_path(false), Dialect::V7_2);
        assert_eq!(Dialect::V11.with_return_path(true), Dialect::V11);
    }

    #[test]
    fn only_eleven_wants_the_return_path() {
        assert!(!Dialect::V7_2.return_path() && !Dialect::V10_0.return_path() && Dialect::V11.return_path());
    }
}
