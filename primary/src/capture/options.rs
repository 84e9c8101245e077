//! What can be set about capture, and the bounds of its waits.

use std::path::PathBuf;
use std::time::Duration;

/// When QEMU is told that it may let the guest run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acknowledge {
    /// As soon as the guest is stopped and the barrier is in place. QEMU looks for it only when it has written the whole
    /// epoch into the socket, so the stop ends with QEMU's own work, however long reading takes.
    Early,
    /// When the whole epoch has been read; for comparison.
    Late,
}

/// Options of a [`super::ColoSource`].
#[derive(Debug, Clone)]
pub struct ColoOptions {
    /// When QEMU is told that it may let the guest run.
    pub acknowledge: Acknowledge,
    /// Bytes QEMU may write ahead of our reading (send buffer of its end of the socket); `None` leaves the kernel's
    /// default. An epoch that fits does not wait for the reader. Above `net.core.wmem_max` this needs CAP_NET_ADMIN;
    /// without it the kernel's maximum is taken.
    pub socket_buffer_bytes: Option<usize>,
    /// QEMU's `x-checkpoint-delay`: how soon after a checkpoint the next one can begin: between 0 and this, as QEMU's
    /// timer runs on. It wakes QEMU's main loop that often; 0 starves it.
    pub checkpoint_delay: Duration,
    /// QEMU's `max-bandwidth` during the full copy, in bytes per second. The sink sets the real pace.
    pub max_bandwidth_bytes: u64,
    /// How long the guest may be stopped for the last part of the full copy (QEMU's `downtime-limit`)...
    pub downtime_limit: Duration,
    /// ...doubled whenever the full copy has gone on for this long without coming to an end...
    pub convergence_patience: Duration,
    /// ...up to this.
    pub max_downtime_limit: Duration,
    /// A full copy that takes longer than this in all is given up.
    pub arm_limit: Duration,
    /// QEMU silent for this long while the guest runs (full copy, waiting for a REQUEST): given up.
    pub silence_running: Duration,
    /// QEMU silent for this long while the guest is stopped: given up. A disk that takes longer to flush needs more.
    pub silence_stopped: Duration,
    /// A checkpoint that keeps the guest stopped longer than this in all is given up.
    pub checkpoint_limit: Duration,
    /// How long QEMU may take to leave COLO.
    pub exit_limit: Duration,
    /// Where to put a socket if the monitor cannot carry a descriptor: a directory that QEMU's user may search.
    /// `None`: do without.
    pub socket_dir: Option<PathBuf>,
}

impl Default for ColoOptions {
    fn default() -> Self {
        Self {
            acknowledge: Acknowledge::Early,
            socket_buffer_bytes: Some(32 << 20),
            checkpoint_delay: Duration::from_millis(2),
            max_bandwidth_bytes: 1 << 40,
            downtime_limit: Duration::from_millis(300),
            convergence_patience: Duration::from_secs(10),
            max_downtime_limit: Duration::from_secs(10),
            arm_limit: Duration::from_secs(4 * 3600),
            silence_running: Duration::from_secs(30),
            silence_stopped: Duration::from_secs(5),
            checkpoint_limit: Duration::from_secs(20),
            exit_limit: Duration::from_secs(10),
            socket_dir: None,
        }
    }
}
