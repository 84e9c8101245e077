//! Control files are written by a task of its own, in order: a slow disk keeps no epoch waiting.

use super::Owner;
use crate::control_store::ControlStore;
use crate::engine::Event;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::{mpsc, oneshot};
use understudy_proto::control::ControlFile;

/// A control file to be written, and who waits for it.
pub(super) type ControlWrite = (ControlFile, Option<oneshot::Sender<Result<(), String>>>);

/// A file that nobody waits for and that is not written leaves `unwritten` set.
pub(super) async fn write_controls(
    store: Arc<dyn ControlStore>,
    mut files: mpsc::Receiver<ControlWrite>,
    unwritten: Arc<AtomicBool>,
) {
    while let Some((file, reply)) = files.recv().await {
        let (guest, store) = (file.guest, Arc::clone(&store));
        let written = match tokio::task::spawn_blocking(move || store.save(&file)).await {
            Ok(saved) => saved.map_err(|e| e.to_string()),
            Err(e) => Err(e.to_string()),
        };
        match (reply, written) {
            (Some(reply), written) => drop(reply.send(written)),
            (None, Err(error)) => {
                tracing::error!(%guest, %error, "control file not written; it is tried again");
                unwritten.store(true, Ordering::Relaxed);
            }
            (None, Ok(())) => (),
        }
    }
}

impl Owner {
    pub(super) async fn write_control(&mut self, file: ControlFile, required: bool) -> Option<Event> {
        let (reply, wait) = if required {
            let (reply, wait) = oneshot::channel();
            (Some(reply), Some(wait))
        } else {
            (None, None)
        };
        // A writer that has ended shows at the first required write.
        let _ = self.control.send((file, reply)).await;
        Some(match wait?.await {
            Ok(Ok(())) => Event::ControlWritten,
            Ok(Err(reason)) => Event::ControlFailed(reason),
            Err(_) => Event::ControlFailed("the writer has ended".into()),
        })
    }
}
