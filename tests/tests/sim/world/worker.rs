//! The thread that holds the image, around the shipped assembly of epochs.

use std::sync::Arc;

use bytes::Bytes;
use understudy_backup::assembly::{Assembly, Attempt, Fault, Proof, Verified};
use understudy_backup::image::{AnonymousMemory, BlockMemory, Image, MemoryProvider};
use understudy_proto::ProtocolError;
use understudy_proto::epoch::{EpochKind, EpochManifest};
use understudy_proto::frame::FrameReader;
use understudy_proto::layout::RamBlock;
use understudy_proto::rpc::epoch::{Begin, EpochRef, RejectCode, Seed};

/// As much as anybody needs.
struct Plenty;

impl MemoryProvider for Plenty {
    fn allocate(&self, block: &RamBlock) -> std::io::Result<Box<dyn BlockMemory>> {
        AnonymousMemory.allocate(block)
    }

    fn available_bytes(&self) -> std::io::Result<u64> {
        Ok(u64::MAX)
    }
}

/// What came of a job.
#[derive(Debug)]
pub(crate) enum Report {
    Verified(Proof),
    Rejected(Attempt, EpochRef, Fault),
    ApplyFailed(String),
}

/// See the module's description.
#[derive(Default)]
pub(super) struct Worker {
    open: Option<Assembly>,
    verified: Option<(Verified, Attempt)>,
    image: Option<Arc<Image>>,
}

impl Worker {
    pub(super) fn open(&mut self, attempt: Attempt, begin: Begin, seed: Option<Arc<Seed>>) -> Option<Report> {
        (self.open, self.verified) = (None, None);
        let at = EpochRef { generation: begin.generation, epoch: begin.epoch };
        let opened = match (begin.kind, seed, &self.image) {
            (EpochKind::Full, Some(seed), _) => Assembly::full(attempt, begin, seed, &Plenty),
            (EpochKind::Delta, _, Some(image)) => {
                Ok(Assembly::delta(attempt, begin, Arc::clone(image.seed())))
            }
            _ => Err(Fault { code: RejectCode::NoBase, text: "there is no image".to_owned() }),
        };
        match opened {
            Ok(assembly) => {
                self.open = Some(assembly);
                None
            }
            Err(fault) => Some(Report::Rejected(attempt, at, fault)),
        }
    }

    /// `at_once`: a planted mistake.
    pub(super) fn frame(&mut self, frame: Bytes, at_once: bool) -> Option<Report> {
        let assembly = self.open.as_mut()?;
        let (attempt, at) = (assembly.attempt(), assembly.at());
        if let Some(image) = self.image.as_mut().filter(|_| at_once).and_then(Arc::get_mut) {
            let seed = Arc::clone(image.seed());
            let write = FrameReader::new().read::<ProtocolError>(&frame, &seed.layout, |r| image.apply(&r));
            assert!(write.is_ok(), "a frame of ours");
        }
        let fault = assembly.frame(frame, self.image.as_deref()).err()?;
        self.open = None;
        Some(Report::Rejected(attempt, at, fault))
    }

    pub(super) fn device(&mut self, piece: &[u8]) {
        if let Some(assembly) = &mut self.open {
            assembly.device(piece);
        }
    }

    pub(super) fn verify(&mut self, manifest: &EpochManifest) -> Option<Report> {
        let assembly = self.open.take()?;
        let (attempt, at) = (assembly.attempt(), assembly.at());
        Some(match assembly.verify(manifest) {
            Ok((verified, proof)) => {
                self.verified = Some((verified, attempt));
                Report::Verified(proof)
            }
            Err(fault) => Report::Rejected(attempt, at, fault),
        })
    }

    pub(super) fn apply(&mut self, attempt: Attempt) -> Option<Report> {
        let applied = match self.verified.take() {
            Some((verified, held)) if held == attempt => verified.apply(&mut self.image),
            _ => Err("the verified epoch is gone".to_owned()),
        };
        let reason = applied.err()?;
        self.image = None;
        Some(Report::ApplyFailed(reason))
    }

    pub(super) fn discard(&mut self) {
        (self.open, self.verified) = (None, None);
    }

    pub(super) fn image(&self) -> Option<&Arc<Image>> {
        self.image.as_ref()
    }

    /// Whether the epoch is verified and not applied.
    pub(super) fn holds_verified(&self) -> bool {
        self.verified.is_some()
    }
}
