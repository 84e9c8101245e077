//! The real promoter against a real libvirtd with a real QEMU (emulated, so that it runs anywhere as root): a guest
//! is captured, its domain destroyed, and brought to life again from the image.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

mod support;

use std::sync::Arc;
use std::time::Instant;
use support::at;
use support::daemon::{Libvirtd, capture, missing};
use understudy_backup::image::{AnonymousMemory, Image};
use understudy_backup::libvirt::LibvirtPromoter;
use understudy_backup::promoter::{LocalDomain, Promoter, StandbySpec};
use understudy_libvirt::{RunState, XmlFlags, qmp};
use understudy_proto::ids::GuestId;

const GUEST_XML: &str = "<domain type='qemu'><name>web</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
    <os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features>
    <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
      <memballoon model='none'/></devices></domain>";

#[test]
fn a_real_guest_is_promoted() {
    if let Some(reason) = missing() {
        println!("skipped: {reason}");
        return;
    }
    let mut daemon = Libvirtd::start();
    let connection = daemon.connect();
    let promoter = LibvirtPromoter::new(daemon.uri(), daemon.dir.path(), false);
    let facts = promoter.host_facts();
    assert!(facts.qemu_version.is_some() && facts.trouble.is_empty(), "{facts:?}");
    assert_eq!(promoter.supports_machine("pc-i440fx-0.0"), Some(false));

    let domain = connection.create_paused(GUEST_XML).unwrap();
    let guest = GuestId(domain.uuid());
    domain.resume().unwrap();
    assert_eq!(promoter.local(guest).unwrap(), LocalDomain::Active);
    let image = Arc::new(capture(&domain));
    let spec = StandbySpec { guest, seed: Arc::clone(image.seed()), persistent: true };

    // Somebody's running guest is nobody's to touch.
    qmp::cont(&domain).unwrap();
    assert!(promoter.prepare(&spec).unwrap_err().reason.contains("not the standby"));
    promoter.discard(guest).unwrap();
    assert!(domain.is_active().unwrap());
    domain.destroy().unwrap();

    assert_eq!(promoter.local(guest).unwrap(), LocalDomain::Absent);
    promoter.prepare(&spec).unwrap();
    assert_eq!(promoter.local(guest).unwrap(), LocalDomain::Waiting);
    assert!(promoter.activate(guest, Some(&spec)).unwrap_err().reason.contains("expected it Loaded"));
    // Again, over the one that is there; and away.
    promoter.prepare(&spec).unwrap();
    assert_eq!(connection.domains().unwrap().len(), 1);
    promoter.discard(guest).unwrap();
    assert!(connection.domains().unwrap().is_empty());
    assert!(promoter.load(&spec, &image).unwrap_err().reason.contains("gone"));

    // A device buffer that QEMU does not take fails, and leaves nothing that could run.
    let mut broken = Image::new(Arc::clone(image.seed()), &AnonymousMemory).unwrap();
    let mut device = image.device().to_vec();
    device.splice(5..6, [0xff]);
    broken.set_epoch(at(1, 1), device.into());
    promoter.prepare(&spec).unwrap();
    let error = promoter.load(&spec, &Arc::new(broken)).unwrap_err();
    println!("a broken device buffer: {error}");
    promoter.discard(guest).unwrap();

    promoter.prepare(&spec).unwrap();
    let began = Instant::now();
    promoter.load(&spec, &image).unwrap();
    println!("loaded in {:?}", began.elapsed());
    assert_eq!(promoter.local(guest).unwrap(), LocalDomain::Loaded);
    let activation = promoter.activate(guest, Some(&spec)).unwrap();
    println!("{activation:?}");
    assert!(activation.warnings.is_empty());
    assert_eq!(promoter.local(guest).unwrap(), LocalDomain::Active);
    let promoted = connection.find_domain("web").unwrap();
    assert_eq!(qmp::query_status(&promoted), Ok(RunState::Running));
    assert!(promoted.is_persistent().unwrap());
    let definition = promoted.xml(XmlFlags { inactive: true, ..XmlFlags::default() }).unwrap();
    assert!(!definition.contains("incoming"), "{definition}");
    // What runs is no standby any more, whatever its command line says.
    promoter.discard(guest).unwrap();
    assert!(promoted.is_active().unwrap());
    promoted.destroy().unwrap();
}
