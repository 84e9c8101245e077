//! Test hook: writes the committed image of chosen epochs to files, to be compared with what QEMU itself dumps.
//! Without the feature `test-hooks` there is nothing to switch on.

use crate::image::Image;

/// Which epochs are dumped, and where.
#[derive(Debug, Clone, Default)]
pub struct Dump {
    #[cfg(feature = "test-hooks")]
    chosen: Option<(std::sync::Arc<std::collections::BTreeSet<u64>>, std::path::PathBuf)>,
}

#[cfg(not(feature = "test-hooks"))]
impl Dump {
    // `self` is used with the feature on.
    #[allow(clippy::unused_self)]
    pub(crate) fn committed(&self, _image: &Image) {}
}

/// Blocks are cut where the primary cuts its dumps, in bytes.
#[cfg(feature = "test-hooks")]
const CUT: usize = 1 << 20;

#[cfg(feature = "test-hooks")]
impl Dump {
    /// Dumps these epochs to `DIR/backup-EPOCH/BLOCK@OFFSET.bin`.
    pub fn new(epochs: impl IntoIterator<Item = u64>, dir: std::path::PathBuf) -> Self {
        Self { chosen: Some((std::sync::Arc::new(epochs.into_iter().collect()), dir)) }
    }

    pub(crate) fn committed(&self, image: &Image) {
        let (Some((epochs, dir)), Some(at)) = (&self.chosen, image.at()) else { return };
        if !epochs.contains(&at.epoch.0) {
            return;
        }
        let target = dir.join(format!("backup-{}", at.epoch));
        // A name of its own until it is complete: whoever compares waits for the final one.
        let partial = dir.join(format!("backup-{}.partial", at.epoch));
        let written = std::fs::create_dir_all(&partial)
            .and_then(|()| {
                image.blocks().try_for_each(|(_, block, memory)| {
                    let (low, high) = memory.split_at(memory.len().min(CUT));
                    let file = |offset: usize| {
                        partial.join(format!("{}@{offset:x}.bin", block.name.replace('/', "_")))
                    };
                    std::fs::write(file(0), low)?;
                    if high.is_empty() { Ok(()) } else { std::fs::write(file(CUT), high) }
                })
            })
            .and_then(|()| std::fs::rename(&partial, &target));
        match written {
            Ok(()) => tracing::info!(epoch = at.epoch.0, dir = %target.display(), "image dumped"),
            Err(e) => {
                tracing::error!(epoch = at.epoch.0, dir = %target.display(), error = %e, "image not dumped")
            }
        }
    }
}
