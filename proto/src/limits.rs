//! Every maximum, with the reason for its value. Both ends use the same constant: an encoder refuses what a
//! decoder would refuse.

/// RAM blocks of one guest. QEMU guests have about ten; each DIMM, option ROM and flash adds one.
pub const MAX_RAM_BLOCKS: usize = 512;

/// Bytes of a RAM block's name; QEMU's own field is one byte long.
pub const MAX_BLOCK_NAME_BYTES: usize = 255;

/// Bytes of one RAM block: 16 TiB, more than any host QEMU runs on.
pub const MAX_BLOCK_BYTES: u64 = 16 << 40;

/// Bytes of all RAM blocks of a guest together.
pub const MAX_GUEST_RAM_BYTES: u64 = 16 << 40;

/// Bytes of an epoch's device buffer. A small guest has 126 KB, each virtio device adds 46 KB; the largest
/// seen with many queues stays below 10 MB.
pub const MAX_DEVICE_BYTES: u64 = 256 << 20;

/// Bytes at which a page frame is closed and sent. Larger messages gain nothing over gRPC, smaller ones cost.
pub const FRAME_TARGET_BYTES: usize = 256 << 10;

/// Bytes of the records of one batch, unpacked. LZ4 looks back over 64 KiB; so of four times as many, three quarters of the
/// records have all of that behind them.
pub const MAX_BATCH_BYTES: usize = 240 << 10;

/// The same towards a peer without the feature `codec/long-batches`.
pub const SHORT_BATCH_BYTES: usize = 60 << 10;

/// Bytes of the largest page frame a peer may send: the target plus one record, which may be a batch.
pub const MAX_FRAME_BYTES: usize = FRAME_TARGET_BYTES + (256 << 10);

/// Bytes of a message on the epoch stream, gRPC overhead included.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// Bytes of a piece of the device buffer in one message.
pub const DEVICE_CHUNK_BYTES: usize = 256 << 10;

/// Bytes of a domain's XML. libvirt's own limit for one is far higher, real ones are below 64 KiB.
pub const MAX_DOMAIN_XML_BYTES: usize = 2 << 20;

/// Bytes of a name or reason in a message: host names, domain names, error texts.
pub const MAX_TEXT_BYTES: usize = 16 << 10;

/// Bytes of the CONFIGURATION section of a QEMU stream (machine name and subsections).
pub const MAX_CONFIG_BYTES: usize = 64 << 10;

/// Bytes of a machine name in a QEMU stream; real ones are below 40.
pub const MAX_MACHINE_NAME_BYTES: usize = 1024;

/// Capabilities listed in a QEMU stream; versions up to 11 know two.
pub const MAX_STREAM_CAPABILITIES: usize = 16;

/// Bytes of the VMDESCRIPTION of a QEMU stream. A small guest has 40 KB, growing with its devices.
pub const MAX_DESCRIPTION_BYTES: usize = 64 << 20;

/// Bytes of the largest record of a QEMU stream that is not given out in pieces. A buffer must hold one: a
/// page with its header and block name, or the capabilities of a CONFIGURATION section.
pub const MAX_STREAM_RECORD_BYTES: usize = 8 << 10;

/// Initial HTTP/2 window of one stream: must hold the largest usual epoch burst.
pub const HTTP2_STREAM_WINDOW_BYTES: u32 = 16 << 20;

/// HTTP/2 window of a connection.
pub const HTTP2_CONNECTION_WINDOW_BYTES: u32 = 32 << 20;

/// HTTP/2 frame size. The default of 16 KiB halves the throughput.
pub const HTTP2_FRAME_BYTES: u32 = 256 << 10;

/// Lanes of a stream: connections beside its own.
pub const MAX_LANES: usize = 15;

/// Epochs that may be captured but not yet acknowledged. One, because the `plug` qdisc counts one sealed
/// epoch only.
pub const MAX_EPOCHS_IN_FLIGHT: usize = 1;

/// Versions, and likewise features, one side may offer: far more than two releases will ever have.
pub const MAX_OFFER_ENTRIES: usize = 64;

/// Bytes of the name of a feature.
pub const MAX_FEATURE_NAME_BYTES: usize = 64;

/// Guests in one status message: more than a host can run, and small enough for one message.
pub const MAX_STATUS_GUESTS: usize = 1024;
