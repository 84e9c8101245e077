//! What a link takes for bytes.

use super::{DRIFT, average};

/// By what factor an epoch must be off to be unusual.
const MAX_CHANGE: f64 = 2.0;

/// The link: a straight line through what was seen, of epochs of different sizes. Where all are of one size, the delay
/// stays as it was known.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Link {
    /// 0 until measured: then nothing speaks for any work.
    pub(super) seconds_per_byte: f64,
    /// From the last byte to the answer of an empty epoch.
    pub(super) delay_seconds: f64,
    // Sums of newer values with more weight: of 1, bytes, seconds, bytes squared, bytes times seconds.
    weight: f64,
    bytes: f64,
    seconds: f64,
    bytes_squared: f64,
    product: f64,
    /// The last epoch took another time than the line says.
    was_unusual: bool,
}

impl Link {
    /// One that is known.
    #[cfg(test)]
    pub(super) fn new(seconds_per_byte: f64, delay_seconds: f64) -> Self {
        Self { seconds_per_byte, delay_seconds, ..Self::default() }
    }

    /// Part of the mean by which sizes must vary to tell delay from speed.
    const MIN_VARIATION: f64 = 0.1;

    pub(super) fn bytes_per_second(&self) -> Option<f64> {
        (self.seconds_per_byte > 0.0).then(|| 1.0 / self.seconds_per_byte)
    }

    /// What so many bytes take.
    pub(super) fn seconds(&self, bytes: f64) -> f64 {
        self.delay_seconds + self.seconds_per_byte * bytes
    }

    /// Takes in an epoch that was sent as it is. Only if one is `asked` for is it believed at once that the link is another.
    pub(super) fn learn(&mut self, bytes: f64, seconds: f64, asked: bool) {
        if bytes <= 0.0 {
            return;
        }
        if self.weight > 0.0 && is_unusual(seconds, self.seconds(bytes)) {
            if !std::mem::replace(&mut self.was_unusual, true) && !asked {
                // One is a hiccup; with the next it is another link.
                return;
            }
            *self = Self { delay_seconds: self.delay_seconds, ..Self::default() };
        }
        self.was_unusual = false;
        for (sum, new) in [
            (&mut self.weight, 1.0),
            (&mut self.bytes, bytes),
            (&mut self.seconds, seconds),
            (&mut self.bytes_squared, bytes * bytes),
            (&mut self.product, bytes * seconds),
        ] {
            average(sum, new);
        }
        let (mean_bytes, mean_seconds) = (self.bytes / self.weight, self.seconds / self.weight);
        let variance = self.bytes_squared / self.weight - mean_bytes * mean_bytes;
        if variance > (mean_bytes * Self::MIN_VARIATION).powi(2) {
            let slope = (self.product / self.weight - mean_bytes * mean_seconds) / variance;
            let delay = mean_seconds - slope * mean_bytes;
            average(&mut self.delay_seconds, delay.clamp(0.0, mean_seconds));
        } else {
            self.delay_seconds -= self.delay_seconds * DRIFT;
        }
        let delay = self.delay_seconds.min(mean_seconds);
        // Never nothing: a link that was measured is known.
        self.seconds_per_byte = ((mean_seconds - delay) / mean_bytes).max(1e-15);
    }

    /// So many bytes took no longer, whatever was done with them: the line is not above that.
    pub(super) fn at_most(&mut self, bytes: f64, seconds: f64) {
        if self.delay_seconds > seconds {
            average(&mut self.delay_seconds, seconds);
        }
        if bytes > 0.0 && self.seconds(bytes) > seconds {
            average(&mut self.seconds_per_byte, ((seconds - self.delay_seconds).max(0.0) / bytes).max(1e-15));
        }
    }
}

/// Whether a time is so far from what was expected that it is a hiccup, or of another link.
pub(super) fn is_unusual(seconds: f64, expected: f64) -> bool {
    seconds > expected * MAX_CHANGE || seconds * MAX_CHANGE < expected
}
