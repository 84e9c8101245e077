//! QEMU's migration stream and the COLO checkpoint protocol, as an external peer must speak them.
//!
//! Nothing here reads or writes a socket. The readers take what the caller has read, in slices that may be cut
//! anywhere, and give events that borrow from them: a page is never copied here. The caller keeps what a reader
//! leaves over and puts it in front of what it reads next, which [`StreamBuffer`] does:
//!
//! ```
//! use std::io::Read;
//! use understudy_proto::qemu::{PrecopyEvent, PrecopyReader, StreamBuffer};
//!
//! fn precopy(mut socket: impl Read) -> Result<u64, Box<dyn std::error::Error>> {
//!     let mut buffer = StreamBuffer::new(1 << 20);
//!     let mut reader = PrecopyReader::new();
//!     let mut pages = 0;
//!     loop {
//!         let count = socket.read(buffer.space())?;
//!         if count == 0 {
//!             return Err("QEMU has closed the connection".into());
//!         }
//!         buffer.filled(count);
//!         let mut input = buffer.unread();
//!         while let Some(event) = reader.read(&mut input)? {
//!             match event {
//!                 PrecopyEvent::Page(_) => pages += 1,
//!                 PrecopyEvent::RamSection { last: true, .. } => return Ok(pages),
//!                 _ => (),
//!             }
//!         }
//!         let left = input.len();
//!         buffer.keep(left);
//!     }
//! }
//! # assert!(precopy(&b"QEVM"[..]).unwrap_err().to_string().contains("closed"));
//! ```
//!
//! ```text
//!  QEMU                                                     peer
//!   | header, configuration, block table, pages ...          |  PrecopyReader
//!   | [guest stops] pages, device sections, description      |    .finish() -> epoch 0
//!   |                                   (SHUT on QEMU 11) <--|  RETURN_PATH_SHUT
//!   | [guest runs]                               READY <-----|  PeerMessage
//!   |--> REQUEST                                             |  CheckpointReader, for ever
//!   | [guest stops]                              REPLY <-----|
//!   |--> SEND, pages, SIZE, device buffer                    |
//!   | [guest runs]                    RECEIVED, LOADED <-----|
//! ```
//!
//! [`PrecopyReader::finish`] turns the first reader into the second, with all that has to be remembered between
//! them. [`IncomingWriter`] composes the stream for a fresh QEMU.

mod buffer;
mod checkpoint;
mod colo;
mod command;
mod config;
mod error;
mod precopy;
mod ram;
mod vmdesc;
mod wire;
mod writer;

pub use crate::frame::PageRecord;
pub use buffer::StreamBuffer;
pub use checkpoint::{CheckpointEvent, CheckpointReader};
pub use colo::{ColoMessage, Direction, PeerMessage, RETURN_PATH_SHUT};
pub use command::Command;
pub use config::Configuration;
pub use error::{Fault, Place, StreamError};
pub use precopy::{Precopy, PrecopyEvent, PrecopyReader};
pub use vmdesc::{DeviceSection, EndSeen};
pub use writer::{IGNORE_SHARED, IncomingWriter, SharedBlock, WriteError, Written};
