//! Of the allocator.

/// Has the allocator keep what is freed up to [`KEPT_BYTES`]: frames come and go by the hundreds, and memory that goes back to the
/// kernel in between is cleared and mapped anew for the next epoch.
pub(crate) fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    for (what, value) in [
        (libc::M_ARENA_MAX, ARENAS),
        (libc::M_MMAP_THRESHOLD, LARGE_BYTES),
        (libc::M_TRIM_THRESHOLD, KEPT_BYTES),
    ] {
        // SAFETY: settings of glibc's allocator that say when it gives memory back; nothing else depends on them.
        if unsafe { libc::mallopt(what, value) } == 0 {
            tracing::debug!(what, value, "not taken by the allocator");
        }
    }
}

/// Parts of the heap that threads share; each keeps as much.
#[cfg(target_env = "gnu")]
const ARENAS: std::ffi::c_int = 2;

/// What an allocation must have to be mapped by itself: more than any frame or message.
#[cfg(target_env = "gnu")]
const LARGE_BYTES: std::ffi::c_int = 4 << 20;

/// What is kept of an arena's free end; the agent's memory is bounded.
#[cfg(target_env = "gnu")]
const KEPT_BYTES: std::ffi::c_int = 8 << 20;
