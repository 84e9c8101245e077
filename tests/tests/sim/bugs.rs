//! Mistakes that can be planted, to see that they are found. All of them are in what the world does with the engines'
//! commands: nothing of them can be reached in the product.

/// A planted mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bug {
    /// None.
    None,
    /// The gate lets an epoch out when it is sealed, not when it is committed.
    ReleaseBeforeAck,
    /// A claimed guest is let run as soon as it is loaded.
    PromoteWithoutConfirm,
    /// A host that has lost its backup lets output out without asking the arbiter.
    SoloWithoutSwap,
    /// A keeper that starts anew and finds its host the owner opens the gate at once, without making void what its life
    /// before has asked.
    ReopenOnRestart,
    /// A backup takes a stream of any generation.
    NoGenerationCheck,
    /// A backup acknowledges an epoch when it begins to arrive.
    AckBeforeComplete,
    /// Pages of a delta go into the image as they arrive.
    PartialEpoch,
    /// While a guest that ran alone is copied its output goes out as it comes.
    SeedWithOpenGate,
    /// What the dirty log gave up for a checkpoint that failed is forgotten, and the next delta is sent as if it were
    /// whole.
    ForgottenPages,
    /// The guest runs before its new generation is on the disk, and the write may fail.
    RunBeforeRecord,
    /// An agent ends a protection whatever the term of the order.
    OrdersOfThePast,
    /// The record says Pair before the agent has promised that nothing ordered before opens its gate.
    PairWithoutPromise,
}

/// Those that are planted.
pub(crate) const PLANTED: [Bug; 12] = [
    Bug::ReleaseBeforeAck,
    Bug::PromoteWithoutConfirm,
    Bug::SoloWithoutSwap,
    Bug::ReopenOnRestart,
    Bug::NoGenerationCheck,
    Bug::AckBeforeComplete,
    Bug::PartialEpoch,
    Bug::SeedWithOpenGate,
    Bug::ForgottenPages,
    Bug::RunBeforeRecord,
    Bug::OrdersOfThePast,
    Bug::PairWithoutPromise,
];
