//! Generated messages of the epoch stream to and from domain types. Everything received is checked here.

use super::convert::{
    epoch, generation, guest, optional_text, required, shortened, sixteen, text, uuid_bytes,
};
use super::epoch as domain;
use super::generated::epoch as wire;
use super::lane::LaneKey;
use crate::control::Role;
use crate::digest::Digest;
use crate::epoch::{EpochKind, EpochManifest};
use crate::ids::Incarnation;
use crate::layout::{MemoryLayout, RamBlock};
use crate::negotiate::{Agreement, Offer};
use crate::{ProtocolError, limits};
use bytes::Bytes;

/// Gives the two `From`/`TryFrom` implementations between a generated enum, received as a number, and ours.
macro_rules! enum_conversion {
    ($field:literal, $wire:ident, $domain:path, $($variant:ident),+) => {
        impl TryFrom<wire::$wire> for $domain {
            type Error = ProtocolError;
            fn try_from(value: wire::$wire) -> Result<Self, ProtocolError> {
                match value {
                    wire::$wire::Unspecified => Err(ProtocolError::Missing { field: $field }),
                    $(wire::$wire::$variant => Ok(Self::$variant),)+
                }
            }
        }
        impl From<$domain> for wire::$wire {
            fn from(value: $domain) -> Self {
                match value { $(<$domain>::$variant => Self::$variant,)+ }
            }
        }
        impl $domain {
            fn from_wire(number: i32) -> Result<Self, ProtocolError> {
                wire::$wire::try_from(number)
                    .map_err(|_| ProtocolError::invalid($field, format!("{number}, which this build does not know")))?
                    .try_into()
            }
        }
    };
}
enum_conversion!("goodbye reason", GoodbyeReason, domain::GoodbyeReason, Ended, Unprotected);
enum_conversion!(
    "reject code",
    RejectCode,
    domain::RejectCode,
    Corrupt,
    NoBase,
    OutOfOrder,
    TooLarge,
    Internal
);
enum_conversion!(
    "refused code",
    RefusedCode,
    domain::RefusedCode,
    Superseded,
    Incompatible,
    Busy,
    Protocol,
    NoMemory,
    Conflict,
    Internal
);
enum_conversion!("standby state", StandbyState, domain::StandbyState, None, Preparing, Ready, Failed);
enum_conversion!("backup role", BackupRole, Role, Standby, Promoting, Promoted, Stale, Released);
enum_conversion!("epoch kind", EpochKind, EpochKind, Full, Delta);

fn offer(value: Option<wire::Offer>) -> Result<Offer, ProtocolError> {
    let value = required("offer", value)?;
    Offer::new(value.versions, value.features)
}

fn offer_to_wire(value: &Offer) -> wire::Offer {
    wire::Offer {
        versions: value.versions().collect(),
        features: value.features().map(str::to_owned).collect(),
    }
}

fn digest(field: &'static str, value: &[u8]) -> Result<Digest, ProtocolError> {
    sixteen(field, value).map(|b| Digest(u128::from_be_bytes(b)))
}

fn digest_to_wire(value: Digest) -> Bytes {
    Bytes::copy_from_slice(&value.0.to_be_bytes())
}

fn incarnation(value: &[u8]) -> Result<Incarnation, ProtocolError> {
    sixteen("incarnation", value).map(|b| Incarnation(uuid::Uuid::from_bytes(b)))
}

impl TryFrom<wire::PrimaryMessage> for domain::PrimaryMessage {
    type Error = ProtocolError;

    fn try_from(value: wire::PrimaryMessage) -> Result<Self, ProtocolError> {
        use wire::primary_message::Kind;
        Ok(match required("kind of primary message", value.kind)? {
            Kind::Hello(m) => Self::Hello(m.try_into()?),
            Kind::Seed(m) => Self::Seed(m.try_into()?),
            Kind::Begin(m) => Self::Begin(domain::Begin {
                generation: generation(m.generation)?,
                epoch: epoch(m.epoch)?,
                kind: EpochKind::from_wire(m.kind)?,
            }),
            Kind::Pages(m) => Self::Pages(m.try_into()?),
            Kind::Device(m) => Self::Device(m.try_into()?),
            Kind::Manifest(m) => Self::Manifest(m.try_into()?),
            Kind::Heartbeat(m) => Self::Heartbeat(m.counter),
            Kind::Goodbye(m) => Self::Goodbye(domain::GoodbyeReason::from_wire(m.reason)?),
            Kind::ByLane(_) => {
                return Err(ProtocolError::invalid(
                    "kind of primary message",
                    "a frame by a lane, which nothing here has",
                ));
            }
        })
    }
}

impl From<domain::PrimaryMessage> for wire::PrimaryMessage {
    fn from(value: domain::PrimaryMessage) -> Self {
        use domain::PrimaryMessage as D;
        use wire::primary_message::Kind;
        let kind = match value {
            D::Hello(m) => Kind::Hello(m.into()),
            D::Seed(m) => Kind::Seed(m.into()),
            D::Begin(m) => Kind::Begin(wire::Begin {
                generation: m.generation.0,
                epoch: m.epoch.0,
                kind: wire::EpochKind::from(m.kind).into(),
            }),
            D::Pages(m) => Kind::Pages(wire::Pages { epoch: m.epoch.0, data: m.frame }),
            D::Device(m) => {
                Kind::Device(wire::Device { epoch: m.epoch.0, offset_bytes: m.offset_bytes, data: m.data })
            }
            D::Manifest(m) => Kind::Manifest(m.into()),
            D::Heartbeat(counter) => Kind::Heartbeat(wire::Heartbeat { counter }),
            D::Goodbye(reason) => {
                Kind::Goodbye(wire::Goodbye { reason: wire::GoodbyeReason::from(reason).into() })
            }
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<wire::Hello> for domain::Hello {
    type Error = ProtocolError;

    fn try_from(m: wire::Hello) -> Result<Self, ProtocolError> {
        Ok(Self {
            offer: offer(m.offer)?,
            guest: guest(&m.guest_uuid)?,
            guest_name: text("guest name", m.guest_name)?,
            generation: generation(m.generation)?,
            session: m.session,
            primary_host: text("primary host", m.primary_host)?,
            qemu_version: text("QEMU version", m.qemu_version)?,
            machine: text("machine type", m.machine)?,
            persistent: m.persistent,
            lane_key: LaneKey::from_wire(&m.lane_key)?,
        })
    }
}

impl From<domain::Hello> for wire::Hello {
    fn from(m: domain::Hello) -> Self {
        Self {
            offer: Some(offer_to_wire(&m.offer)),
            guest_uuid: uuid_bytes(m.guest.0),
            guest_name: m.guest_name,
            generation: m.generation.0,
            session: m.session,
            primary_host: m.primary_host,
            qemu_version: m.qemu_version,
            machine: m.machine,
            persistent: m.persistent,
            lane_key: m.lane_key.map(LaneKey::to_wire).unwrap_or_default(),
        }
    }
}

impl TryFrom<wire::Seed> for domain::Seed {
    type Error = ProtocolError;

    fn try_from(m: wire::Seed) -> Result<Self, ProtocolError> {
        ProtocolError::check_len(
            "number of RAM blocks",
            m.blocks.len() as u64,
            limits::MAX_RAM_BLOCKS as u64,
        )?;
        ProtocolError::check_len(
            "domain XML bytes",
            m.domain_xml.len() as u64,
            limits::MAX_DOMAIN_XML_BYTES as u64,
        )?;
        if m.domain_xml.is_empty() {
            return Err(ProtocolError::Missing { field: "domain XML" });
        }
        let blocks =
            m.blocks.into_iter().map(|b| RamBlock { name: b.name, used_bytes: b.used_bytes }).collect();
        Ok(Self {
            layout: MemoryLayout::new(blocks, m.config.to_vec(), m.ram_section_id)?,
            domain_xml: m.domain_xml,
        })
    }
}

impl From<domain::Seed> for wire::Seed {
    fn from(m: domain::Seed) -> Self {
        let blocks = m.layout.blocks().iter();
        Self {
            blocks: blocks
                .map(|b| wire::RamBlock { name: b.name.clone(), used_bytes: b.used_bytes })
                .collect(),
            config: Bytes::copy_from_slice(m.layout.config()),
            ram_section_id: m.layout.ram_section_id(),
            domain_xml: m.domain_xml,
        }
    }
}

impl TryFrom<wire::Pages> for domain::Pages {
    type Error = ProtocolError;

    fn try_from(m: wire::Pages) -> Result<Self, ProtocolError> {
        ProtocolError::check_len("frame bytes", m.data.len() as u64, limits::MAX_FRAME_BYTES as u64)?;
        if m.data.is_empty() {
            return Err(ProtocolError::Missing { field: "page frame" });
        }
        Ok(Self { epoch: epoch(m.epoch)?, frame: m.data })
    }
}

impl TryFrom<wire::Device> for domain::DevicePiece {
    type Error = ProtocolError;

    fn try_from(m: wire::Device) -> Result<Self, ProtocolError> {
        let data_bytes = m.data.len() as u64;
        ProtocolError::check_len("device piece bytes", data_bytes, limits::DEVICE_CHUNK_BYTES as u64)?;
        if m.data.is_empty() {
            return Err(ProtocolError::Missing { field: "device piece" });
        }
        ProtocolError::check_len(
            "end of device piece",
            m.offset_bytes.saturating_add(data_bytes),
            limits::MAX_DEVICE_BYTES,
        )?;
        Ok(Self { epoch: epoch(m.epoch)?, offset_bytes: m.offset_bytes, data: m.data })
    }
}

impl TryFrom<wire::Manifest> for EpochManifest {
    type Error = ProtocolError;

    fn try_from(m: wire::Manifest) -> Result<Self, ProtocolError> {
        let manifest = Self {
            generation: generation(m.generation)?,
            epoch: epoch(m.epoch)?,
            kind: EpochKind::from_wire(m.kind)?,
            frames: m.frames,
            pages: m.pages,
            frame_bytes: m.frame_bytes,
            pages_digest: digest("pages digest", &m.pages_digest)?,
            device_bytes: m.device_bytes,
            device_digest: digest("device digest", &m.device_digest)?,
        };
        manifest.validate()?;
        Ok(manifest)
    }
}

impl From<EpochManifest> for wire::Manifest {
    fn from(m: EpochManifest) -> Self {
        Self {
            generation: m.generation.0,
            epoch: m.epoch.0,
            kind: wire::EpochKind::from(m.kind).into(),
            frames: m.frames,
            pages: m.pages,
            frame_bytes: m.frame_bytes,
            pages_digest: digest_to_wire(m.pages_digest),
            device_bytes: m.device_bytes,
            device_digest: digest_to_wire(m.device_digest),
        }
    }
}

impl TryFrom<wire::BackupMessage> for domain::BackupMessage {
    type Error = ProtocolError;

    fn try_from(value: wire::BackupMessage) -> Result<Self, ProtocolError> {
        use wire::backup_message::Kind;
        Ok(match required("kind of backup message", value.kind)? {
            Kind::HelloAck(m) => Self::HelloAck(m.try_into()?),
            Kind::Ack(m) => Self::Ack(epoch_ref(m.generation, m.epoch)?),
            Kind::Reject(m) => Self::Reject(domain::Reject {
                at: epoch_ref(m.generation, m.epoch)?,
                code: domain::RejectCode::from_wire(m.code)?,
                text: text("reject text", m.text)?,
            }),
            Kind::Refused(m) => Self::Refused(domain::Refused {
                code: domain::RefusedCode::from_wire(m.code)?,
                text: text("refused text", m.text)?,
                remedy: text("refused remedy", m.remedy)?,
                generation: m.generation.map(generation).transpose()?,
            }),
            Kind::Standby(m) => Self::Standby(domain::Standby {
                state: domain::StandbyState::from_wire(m.state)?,
                text: text("standby text", m.text)?,
            }),
            Kind::HeartbeatReply(m) => Self::HeartbeatReply(m.counter),
        })
    }
}

fn epoch_ref(generation_number: u64, epoch_number: u64) -> Result<domain::EpochRef, ProtocolError> {
    Ok(domain::EpochRef { generation: generation(generation_number)?, epoch: epoch(epoch_number)? })
}

impl From<domain::BackupMessage> for wire::BackupMessage {
    fn from(value: domain::BackupMessage) -> Self {
        use domain::BackupMessage as D;
        use wire::backup_message::Kind;
        let kind = match value {
            D::HelloAck(m) => Kind::HelloAck(m.into()),
            D::Ack(m) => Kind::Ack(wire::Ack { generation: m.generation.0, epoch: m.epoch.0 }),
            D::Reject(m) => Kind::Reject(wire::Reject {
                generation: m.at.generation.0,
                epoch: m.at.epoch.0,
                code: wire::RejectCode::from(m.code).into(),
                text: shortened(m.text),
            }),
            D::Refused(m) => Kind::Refused(wire::Refused {
                code: wire::RefusedCode::from(m.code).into(),
                text: shortened(m.text),
                remedy: shortened(m.remedy),
                generation: m.generation.map(|g| g.0),
            }),
            D::Standby(m) => Kind::Standby(wire::Standby {
                state: wire::StandbyState::from(m.state).into(),
                text: shortened(m.text),
            }),
            D::HeartbeatReply(counter) => Kind::HeartbeatReply(wire::HeartbeatReply { counter }),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<wire::HelloAck> for domain::HelloAck {
    type Error = ProtocolError;

    fn try_from(m: wire::HelloAck) -> Result<Self, ProtocolError> {
        // An agreement is an offer with one version; the same limits hold.
        let agreed = Offer::new([m.version], m.features)?;
        Ok(Self {
            agreement: Agreement {
                version: m.version,
                features: agreed.features().map(str::to_owned).collect(),
            },
            incarnation: incarnation(&m.incarnation)?,
            last_committed: m.last_committed.map(|r| epoch_ref(r.generation, r.epoch)).transpose()?,
            host: text("backup host", m.host)?,
            qemu_version: optional_text("QEMU version", m.qemu_version)?,
            libvirt_version: optional_text("libvirt version", m.libvirt_version)?,
        })
    }
}

impl From<domain::HelloAck> for wire::HelloAck {
    fn from(m: domain::HelloAck) -> Self {
        Self {
            version: m.agreement.version,
            features: m.agreement.features.into_iter().collect(),
            incarnation: uuid_bytes(m.incarnation.0),
            last_committed: m
                .last_committed
                .map(|r| wire::EpochRef { generation: r.generation.0, epoch: r.epoch.0 }),
            host: m.host,
            qemu_version: m.qemu_version,
            libvirt_version: m.libvirt_version,
        }
    }
}

impl TryFrom<wire::ProbeRequest> for domain::ProbeRequest {
    type Error = ProtocolError;

    fn try_from(m: wire::ProbeRequest) -> Result<Self, ProtocolError> {
        Ok(Self {
            offer: offer(m.offer)?,
            guest: m.guest_uuid.as_deref().map(guest).transpose()?,
            machine: optional_text("machine type", m.machine)?,
        })
    }
}

impl From<domain::ProbeRequest> for wire::ProbeRequest {
    fn from(m: domain::ProbeRequest) -> Self {
        Self {
            offer: Some(offer_to_wire(&m.offer)),
            guest_uuid: m.guest.map(|g| uuid_bytes(g.0)),
            machine: m.machine,
        }
    }
}

impl TryFrom<wire::ProbeReply> for domain::ProbeReply {
    type Error = ProtocolError;

    fn try_from(m: wire::ProbeReply) -> Result<Self, ProtocolError> {
        Ok(Self {
            offer: offer(m.offer)?,
            host: text("backup host", m.host)?,
            incarnation: incarnation(&m.incarnation)?,
            qemu_version: optional_text("QEMU version", m.qemu_version)?,
            libvirt_version: optional_text("libvirt version", m.libvirt_version)?,
            machine_supported: m.machine_supported,
            free_memory_bytes: m.free_memory_bytes,
            guest: m
                .guest
                .map(|g| {
                    Ok(domain::GuestRecord {
                        role: Role::from_wire(g.role)?,
                        generation: generation(g.generation)?,
                        last_committed: g.last_committed.map(epoch).transpose()?,
                        primary_host: text("primary host", g.primary_host)?,
                    })
                })
                .transpose()?,
            trouble: text("trouble", m.trouble)?,
        })
    }
}

impl From<domain::ProbeReply> for wire::ProbeReply {
    fn from(m: domain::ProbeReply) -> Self {
        Self {
            offer: Some(offer_to_wire(&m.offer)),
            host: m.host,
            incarnation: uuid_bytes(m.incarnation.0),
            qemu_version: m.qemu_version,
            libvirt_version: m.libvirt_version,
            machine_supported: m.machine_supported,
            free_memory_bytes: m.free_memory_bytes,
            guest: m.guest.map(|g| wire::GuestRecord {
                role: wire::BackupRole::from(g.role).into(),
                generation: g.generation.0,
                last_committed: g.last_committed.map(|e| e.0),
                primary_host: g.primary_host,
            }),
            trouble: shortened(m.trouble),
        }
    }
}
