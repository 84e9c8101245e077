//! A reference to a connection that is given back.

use std::ops::Deref;

use virt::connect::Connect;

/// A [`Connect`] that closes when dropped: `virt`'s own does not, it would leave the socket open. A clone is one more
/// reference; the connection ends with the last one.
#[derive(Debug, Clone)]
pub(crate) struct Link(Connect);

impl Link {
    pub(crate) fn new(connect: Connect) -> Self {
        Self(connect)
    }
}

impl Deref for Link {
    type Target = Connect;

    fn deref(&self) -> &Connect {
        &self.0
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Err(error) = self.0.close() {
            tracing::debug!(error = error.message(), "closing a libvirt connection");
        }
    }
}
