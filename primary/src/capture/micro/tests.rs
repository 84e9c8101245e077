//! Against the KVM of the machine; says so where there is none.

use understudy_proto::units::PAGE_BYTES;

use super::*;

const ALL: [DirtyTracking; 3] = [DirtyTracking::Log, DirtyTracking::ManualProtect, DirtyTracking::Ring];

fn usable() -> bool {
    match unusable() {
        None => true,
        Some(reason) => {
            println!("skipped: {reason}");
            false
        }
    }
}

fn shape(tracking: DirtyTracking) -> Shape {
    Shape { pages: 40, written_pages: 17, rounds_per_report: 3, tracking }
}

fn memory(vm: &MicroVm) -> Vec<Vec<u8>> {
    let mut page = [0; PAGE_BYTES];
    let mut block = |(slot, block): (u16, &understudy_proto::layout::RamBlock)| {
        let mut bytes = Vec::new();
        for index in 0..block.pages() {
            assert!(vm.read_page((slot, index), &mut page));
            bytes.extend_from_slice(&page);
        }
        bytes
    };
    (0u16..).zip(vm.layout().blocks()).map(&mut block).collect()
}

/// Memory is exactly what the steps taken make it. At the end of a round only.
fn check(vm: &MicroVm, shape: &Shape) -> u64 {
    let steps = vm.steps().unwrap();
    assert_eq!(steps % shape.written_pages, 0, "not at the end of a round");
    let mut page = [0; PAGE_BYTES];
    for index in 0..shape.pages {
        assert!(vm.read_page((1, index), &mut page));
        let expected = program::expected_page(index, shape.written_pages, steps / shape.written_pages);
        let wrong = page.chunks(8).zip(expected.chunks(8)).position(|(is, should)| is != should);
        assert_eq!(wrong, None, "page {index} after {steps} steps, word {wrong:?}");
    }
    steps
}

#[test]
fn the_program_does_what_is_expected_of_it() {
    if !usable() {
        return;
    }
    let shape = shape(DirtyTracking::Log);
    let vm = MicroVm::create(&shape).unwrap();
    for report in 1..400 {
        assert_eq!(u64::from(vm.run_until_report().unwrap()), report * 51);
        assert_eq!(check(&vm, &shape), report * 51);
    }
}

#[test]
fn every_tracking_reports_the_same_pages() {
    if !usable() {
        return;
    }
    let mut reported = Vec::new();
    for tracking in ALL {
        let shape = shape(tracking);
        let vm = MicroVm::create(&shape).unwrap();
        if vm.tracking() != tracking {
            println!("this KVM has no {tracking}, it uses the {}", vm.tracking());
            continue;
        }
        vm.track(true).unwrap();
        let mut rounds = Vec::new();
        for _ in 0..3 {
            vm.run_until_report().unwrap();
            let mut pages = Vec::new();
            vm.take_dirty(&mut pages).unwrap();
            // Nothing ran since.
            let mut again = Vec::new();
            vm.take_dirty(&mut again).unwrap();
            assert_eq!(again, [], "{tracking}");
            // KVM itself writes to page tables now and then.
            let (data, tables): (Vec<_>, Vec<_>) = pages.into_iter().partition(|(slot, _)| *slot == 1);
            assert!(tables.iter().all(|(_, page)| (1..4).contains(page)), "{tracking}: {tables:?}");
            rounds.push(data);
        }
        let written: Vec<_> = (0..shape.written_pages).map(|page| (1, page)).collect();
        assert_eq!(rounds, [written.clone(), written.clone(), written], "{tracking}");
        reported.push((tracking, rounds));
    }
    for pair in reported.windows(2) {
        assert_eq!(pair[0].1, pair[1].1, "{} against {}", pair[0].0, pair[1].0);
    }
}

#[test]
fn a_restored_guest_is_the_same_and_goes_on() {
    if !usable() {
        return;
    }
    let shape = shape(DirtyTracking::Log);
    let mut vm = MicroVm::create(&shape).unwrap();
    let mut last = 0;
    for _ in 0..20 {
        vm.run().unwrap();
        std::thread::sleep(std::time::Duration::from_micros(300));
        vm.pause().unwrap();
        let (steps, before, state) = (vm.steps().unwrap(), memory(&vm), vm.save().unwrap());
        assert!(steps >= last, "{steps} steps after {last}");
        let device = state.encode();
        vm.power_off();
        let blocks = before.iter().map(Vec::as_slice);
        vm = MicroVm::restore(&vm.layout().clone(), blocks, &device, shape.tracking).unwrap();
        assert_eq!((vm.steps().unwrap(), memory(&vm) == before), (steps, true));
        same(&state, &vm.save().unwrap());
        vm.run_until_report().unwrap();
        last = check(&vm, &shape);
        assert!(last >= steps);
    }
}

/// All but the clock, which runs on.
fn same(one: &VcpuState, other: &VcpuState) {
    use zerocopy::IntoBytes;
    const TIME_STAMP_COUNTER: u32 = 0x10;
    let msrs = |state: &VcpuState| -> Vec<_> {
        let timeless = state.msrs.iter().filter(|msr| msr.index != TIME_STAMP_COUNTER);
        timeless.map(|msr| (msr.index, msr.data)).collect()
    };
    assert_eq!(msrs(one), msrs(other));
    assert_eq!(one.regs, other.regs);
    assert_eq!(one.sregs.as_bytes(), other.sregs.as_bytes());
    assert_eq!(one.xcrs.as_bytes(), other.xcrs.as_bytes());
    assert_eq!(one.xsave.as_bytes(), other.xsave.as_bytes());
    assert_eq!(one.events, other.events);
    assert_eq!(one.debug, other.debug);
    assert_eq!(one.lapic.as_bytes(), other.lapic.as_bytes());
    assert_eq!(one.mp, other.mp);
    assert_eq!(one.irqchips.as_bytes(), other.irqchips.as_bytes());
}

#[test]
fn what_is_set_in_the_system_registers_survives() {
    if !usable() {
        return;
    }
    let vm = MicroVm::create(&shape(DirtyTracking::Log)).unwrap();
    let mut state = vm.save().unwrap();
    state.debug.db = [0x1000, 0x2000, 0x3000, 0x4000];
    let mut changed = 0;
    // STAR, LSTAR, KERNEL_GS_BASE, SYSENTER_ESP, TSC_AUX
    for (index, value) in [
        (0xc000_0081, 0x0013_0008_0000_0000),
        (0xc000_0082, 0xffff_8000_0000_1000),
        (0xc000_0102, 0x0000_1234_0000_0000),
        (0x175, 0x1234_5000),
        (0xc000_0103, 77),
    ] {
        if let Some(msr) = state.msrs.iter_mut().find(|msr| msr.index == index) {
            msr.data = value;
            changed += 1;
        }
    }
    assert!(changed > 0, "none of these MSRs is in {:x?}", state.msrs);
    let device = state.encode();
    let bytes = memory(&vm);
    let blocks = bytes.iter().map(Vec::as_slice);
    let other = MicroVm::restore(vm.layout(), blocks, &device, DirtyTracking::Log).unwrap();
    same(&state, &other.save().unwrap());
}

#[test]
fn a_device_buffer_is_taken_whole_or_not_at_all() {
    if !usable() {
        return;
    }
    let vm = MicroVm::create(&shape(DirtyTracking::Log)).unwrap();
    let device = vm.save().unwrap().encode();
    assert_eq!(VcpuState::decode(&device).unwrap().encode(), device);
    for len in 0..device.len() {
        assert!(VcpuState::decode(&device[..len]).is_err(), "{len} bytes");
    }
    let mut changed = device.clone();
    changed.push(0);
    assert!(VcpuState::decode(&changed).unwrap_err().to_string().contains("1 bytes longer"));
    for (at, says) in [(0, "not that of a micro-VM"), (8, "known is 1"), (14, "the limit is")] {
        let mut changed = device.clone();
        changed[at] ^= 0x40;
        let error = VcpuState::decode(&changed).unwrap_err().to_string();
        assert!(error.contains(says), "byte {at}: {error}");
    }
}

#[test]
fn calls_out_of_turn_are_errors() {
    if !usable() {
        return;
    }
    let vm = MicroVm::create(&shape(DirtyTracking::Log)).unwrap();
    assert!(vm.pause().is_err());
    vm.run().unwrap();
    assert!(vm.run().is_err() && vm.save().is_err() && vm.take_dirty(&mut Vec::new()).is_err());
    vm.power_off();
    assert!(matches!(vm.run(), Err(MicroError::Off)));
}
