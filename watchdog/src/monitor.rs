//! The way to a guest's QEMU.

use understudy_libvirt::{Connection, LibvirtError, Monitor};
use understudy_proto::ids::GuestId;

use crate::engine::Trouble;

/// Finds QEMUs.
pub trait Monitors: Send + Sync {
    /// The monitor of `guest`, by a connection of its own. It is kept until it fails. May block.
    ///
    /// # Errors
    /// [`Trouble::Off`] if there is no QEMU, [`Trouble::Unreachable`] if that cannot be found out.
    fn open(&self, guest: GuestId) -> Result<Box<dyn Monitor>, Trouble>;
}

/// By libvirt. Each guest has a connection of its own: libvirtd answers only so many questions of one client at a time,
/// and a QEMU that does not answer must not keep the others waiting.
#[derive(Debug, Clone)]
pub struct Libvirt {
    /// Where.
    pub uri: String,
}

impl Monitors for Libvirt {
    fn open(&self, guest: GuestId) -> Result<Box<dyn Monitor>, Trouble> {
        let unreachable = |error: LibvirtError| match error {
            LibvirtError::NoDomain { .. } => Trouble::Off,
            error => Trouble::Unreachable(error.to_string()),
        };
        let connection = Connection::open(&self.uri).map_err(unreachable)?;
        let domain = connection.find_domain(&guest.to_string()).map_err(unreachable)?;
        if !domain.is_active().map_err(unreachable)? {
            return Err(Trouble::Off);
        }
        Ok(Box::new(domain))
    }
}
