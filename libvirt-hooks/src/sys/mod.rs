//! libvirt calls that the `virt` crate does not wrap: events, the close callback, descriptors for the monitor.
//!
//! Callbacks get a number, not a pointer: libvirt may call back once more while a subscription is being taken
//! back, and a number that is not in [`SINKS`] any more is simply ignored.
#![allow(unsafe_code)]

mod callback;
mod command;
mod event_loop;
mod link;

pub(crate) use callback::{
    CloseWatch, Sink, Subscription, subscribe_devices, subscribe_host, subscribe_lifecycle, subscribe_qmp,
};
pub(crate) use command::monitor_command_with_fd;
pub(crate) use event_loop::start_event_loop;
pub(crate) use link::Link;
