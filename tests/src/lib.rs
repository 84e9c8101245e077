//! What the tests of this package and `cargo xtask` have in common. It depends on nothing of the workspace.

pub mod conformance;
