//! What fails beside a promotion, or behind it.

use super::*;

#[test]
fn an_image_that_comes_when_its_promotion_has_failed_is_not_taken() {
    let mut bench = Bench::standby();
    assert!(bench.step(Event::Failover { i_have_fenced: false }).contains(&Command::TakeImage));
    assert!(bench.engine.wants_image());
    // A standby that was being made could not be.
    bench.step(Event::Prepared(Err(PromoteError::new("no such device"))));
    assert!(!bench.engine.wants_image());
    assert_eq!(bench.step(Event::ImageReady(Some(at(1, 5)))), []);
}

#[test]
fn a_control_file_that_was_not_written_is_written_later() {
    let (mut bench, _) = Bench::loaded();
    bench.step(Event::ControlWritten);
    bench.step(Event::Activated(Ok(Activation::default())));
    assert_eq!(bench.step(Event::ControlNotWritten), []);
    bench.now += CONTROL_INTERVAL / 2;
    assert_eq!(bench.step(Event::Tick), []);
    bench.now += CONTROL_INTERVAL;
    let out = bench.step(Event::Tick);
    assert!(
        matches!(out.as_slice(), [Command::WriteControl { file, .. }] if file.role == Role::Promoted),
        "{out:?}"
    );
    bench.now += CONTROL_INTERVAL;
    assert_eq!(bench.step(Event::Tick), []);
}
