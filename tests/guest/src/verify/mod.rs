//! The responder of `understudy verify`, the same as in any guest.
#![allow(dead_code, reason = "the client's half of the lines is in it as well")]

#[path = "../../../../cli/src/verify/responder.rs"]
pub(crate) mod responder;
#[path = "../../../../cli/src/verify/wire.rs"]
mod wire;
