//! The deterministic simulator: two hosts, a witness, a network and a client in one thread, driven by one seed, around the
//! engines as they are shipped.
//!
//! First everything fails at random and nothing unsafe may happen ([`invariants`]); then nothing fails any more, and the
//! guest must be served by one host and protected again, unless no copy of it is left anywhere.
//!
//! `UNDERSTUDY_SIM_START` and `UNDERSTUDY_SIM_SEEDS` choose the seeds (`cargo xtask sim` sets them); a seed that fails is
//! told with its trace. Those that have failed once are in `seeds.txt`.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends by panicking")]

mod bugs;
mod invariants;
#[path = "../microvm/random.rs"]
mod random;
mod runs;
mod world;
