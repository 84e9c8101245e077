use super::*;
use understudy_hook::metadata::{Epoch, Output, Policy};

const GUEST: GuestId = GuestId(uuid::Uuid::from_u128(7));

fn marked(attributes: &str) -> Protect {
    Protect::parse(&format!("<protect {attributes}/>")).unwrap()
}

fn on() -> Protect {
    marked("enabled='yes' backup='beta' insecure='yes'")
}

fn found(mark: Option<Protect>) -> Found {
    Found {
        running: true,
        standby: false,
        mark: Ok(mark),
        command: None,
        reported: None,
        protection: Protection::None,
    }
}

fn active(backup: &str, value: &str) -> Protection {
    Protection::Active {
        backup: backup.into(),
        epoch: Epoch::Fixed(Duration::from_millis(100)),
        insecure: true,
        output: Output::Gated,
        policy: Policy::default(),
        report: Report {
            value: value.into(),
            backup: backup.into(),
            generation: Some(1),
            detail: String::new(),
            settled: value == "protected",
        },
    }
}

fn failure(reason: &str) -> Failed {
    Failed { code: "x".into(), reason: reason.into(), remedy: String::new(), time_helps: true }
}

/// An engine, its clock, and what it said last.
struct Bench {
    engine: Engine,
    now: Instant,
    published: Option<State>,
}

impl Bench {
    fn new() -> Self {
        Self { engine: Engine::default(), now: Instant::now(), published: None }
    }

    /// What is to be done beside looking and publishing.
    fn step(&mut self, event: Event) -> Vec<Command> {
        let mut commands = self.engine.step(event, self.now);
        for command in &commands {
            if let Command::Report(_, state) = command {
                self.published.clone_from(state);
            }
        }
        commands.retain(|command| !matches!(command, Command::Report(..)));
        commands
    }

    fn after(&mut self, wait: Duration) -> Vec<Command> {
        self.now += wait;
        self.step(Event::Tick)
    }

    /// A change that a look finds.
    fn changed(&mut self, found: Found) -> Vec<Command> {
        assert_eq!(
            self.step(Event::Changed { guest: GUEST, started: false }),
            [Command::Look { guest: GUEST, first: false }]
        );
        self.step(Event::Found { guest: GUEST, found, first: false })
    }

    fn fares(&mut self, protection: Protection) -> Vec<Command> {
        self.step(Event::Fares(GUEST, protection))
    }

    fn protected() -> Self {
        let mut bench = Self::new();
        assert_eq!(bench.changed(found(Some(on()))), [Command::Protect(GUEST, on())]);
        assert_eq!(bench.fares(active("beta", "protected")), []);
        bench.after(REPORT_INTERVAL);
        assert_eq!(bench.state().value, "protected");
        bench
    }

    fn state(&self) -> State {
        self.published.clone().unwrap()
    }
}

#[test]
fn a_mark_protects_changes_and_ends() {
    let mut bench = Bench::protected();
    assert!(bench.state().by_metadata && bench.state().generation == Some(1));
    // The same again, and what does not change the protection.
    assert_eq!(bench.changed(found(Some(on()))), []);
    assert_eq!(
        bench.changed(found(Some(marked("enabled='yes' backup='beta' insecure='yes' required='yes'")))),
        []
    );
    // Another backup.
    let other = marked("enabled='yes' backup='gamma' insecure='yes'");
    let with = |mark| Found { protection: active("beta", "protected"), ..found(Some(mark)) };
    assert_eq!(bench.changed(with(other.clone())), [Command::Unprotect(GUEST)]);
    assert_eq!(bench.fares(Protection::None), []);
    assert_eq!(bench.step(Event::Unprotected(GUEST, Ok(()))), [Command::Protect(GUEST, other.clone())]);
    bench.fares(active("gamma", "protected"));
    // Off, by 'no' and by taking it out.
    let off = Found { protection: active("gamma", "protected"), ..found(Some(marked("enabled='no'"))) };
    assert_eq!(bench.changed(off), [Command::Unprotect(GUEST)]);
    assert_eq!(bench.step(Event::Unprotected(GUEST, Ok(()))), []);
    bench.after(REPORT_INTERVAL);
    assert_eq!(bench.state().value, "off");
    assert_eq!(bench.changed(found(Some(other))).len(), 1);
    bench.fares(active("gamma", "protected"));
    let gone = Found { protection: active("gamma", "protected"), ..found(None) };
    assert_eq!(bench.changed(gone), [Command::Unprotect(GUEST)]);
    bench.step(Event::Unprotected(GUEST, Ok(())));
    bench.after(REPORT_INTERVAL);
    assert_eq!(bench.published, None);
    assert!(bench.engine.guests().is_empty(), "it is forgotten");
}

#[test]
fn unmarked_guests_are_none_of_its_business() {
    let mut bench = Bench::new();
    let by_hand = Found { protection: active("beta", "protected"), ..found(None) };
    assert_eq!(bench.changed(by_hand), []);
    assert_eq!(bench.published, None);
    assert!(bench.engine.guests().is_empty());
}

#[test]
fn a_start_protects_and_an_end_forgets() {
    let mut bench = Bench::new();
    let looked = [Command::Look { guest: GUEST, first: false }];
    assert_eq!(bench.step(Event::Changed { guest: GUEST, started: true }), looked);
    assert_eq!(
        bench.step(Event::Found { guest: GUEST, found: found(Some(on())), first: false }),
        [Command::Protect(GUEST, on())]
    );
    bench.fares(active("beta", "protected"));
    // The end of the guest is not the end of a wish: its protection ends by itself, with its own word to the backup.
    assert_eq!(bench.step(Event::Stopped(GUEST)), []);
    assert!(bench.engine.guests().is_empty());
    assert_eq!(bench.step(Event::Changed { guest: GUEST, started: true }), looked);
    let old = Protection::Over(Ended::WithGuest);
    let again = Found { protection: old.clone(), ..found(Some(on())) };
    assert_eq!(
        bench.step(Event::Found { guest: GUEST, found: again, first: false }),
        [Command::Protect(GUEST, on())]
    );
    assert_eq!(bench.fares(old), []);
}

#[test]
fn a_guest_that_was_started_anew_before_its_end_was_noticed_is_protected() {
    let mut bench = Bench::new();
    let early = Found { protection: active("beta", "protected"), ..found(Some(on())) };
    assert_eq!(bench.changed(early), []);
    let looks = bench.fares(Protection::Over(Ended::WithGuest));
    assert_eq!(looks, [Command::Look { guest: GUEST, first: false }]);
    let found = Found { protection: Protection::Over(Ended::WithGuest), ..found(Some(on())) };
    assert_eq!(
        bench.step(Event::Found { guest: GUEST, found, first: false }),
        [Command::Protect(GUEST, on())]
    );
}

#[test]
fn a_guest_that_ends_is_not_unprotected_as_well() {
    let mut bench = Bench::protected();
    let ended = Found { running: false, protection: active("beta", "protected"), ..found(None) };
    assert_eq!(bench.changed(ended), []);
}

#[test]
fn failures_are_tried_again_ever_more_slowly() {
    let mut bench = Bench::new();
    bench.changed(found(Some(on())));
    let mut waits = Vec::new();
    for _ in 0..8 {
        assert_eq!(bench.step(Event::Failed(GUEST, failure("no backup"))), []);
        let mut wait = Duration::ZERO;
        while bench.after(Duration::from_secs(1)).is_empty() {
            wait += Duration::from_secs(1);
            assert!(wait < RETRY_MAX, "it is not tried again");
        }
        waits.push(wait.as_secs() + 1);
    }
    assert_eq!(waits, [2, 4, 8, 16, 32, 60, 60, 60]);
    bench.step(Event::Failed(GUEST, failure("no backup")));
    bench.after(REPORT_INTERVAL);
    assert_eq!((bench.state().value.as_str(), bench.state().code.as_str()), ("failed", "x"));
    assert!(bench.state().detail.starts_with("no backup"), "{:?}", bench.state());
    // A change is tried at once.
    let other = marked("enabled='yes' backup='gamma' insecure='yes'");
    assert_eq!(bench.changed(found(Some(other.clone()))), [Command::Protect(GUEST, other)]);
}

#[test]
fn what_time_does_not_help_waits_for_a_change() {
    let mut bench = Bench::new();
    let disk =
        Protect::parse("<protect enabled='yes' backup='b'><disk target='vda' policy='buffer'/></protect>");
    assert_eq!(bench.changed(found(Some(disk.unwrap()))), []);
    assert_eq!(bench.after(RETRY_MAX * 3), []);
    assert_eq!(bench.state().code, "disk-policy");
    assert_eq!(bench.changed(found(Some(on()))), [Command::Protect(GUEST, on())]);
    bench.step(Event::Failed(GUEST, Failed { time_helps: false, ..failure("never") }));
    assert_eq!(bench.after(RETRY_MAX * 3), []);
}

#[test]
fn a_protection_that_breaks_is_begun_again() {
    let mut bench = Bench::protected();
    assert_eq!(bench.fares(Protection::Over(Ended::Failed(failure("virsh save")))), []);
    assert_eq!(bench.after(RETRY_FIRST), [Command::Protect(GUEST, on())]);
}

#[test]
fn an_operators_word_counts_until_the_mark_changes() {
    // Seen as it happens, or when it is over.
    for end in [Protection::Over(Ended::ByOperator), Protection::None] {
        an_operators_word_counts(end);
    }
}

fn an_operators_word_counts(end: Protection) {
    let mut bench = Bench::protected();
    assert_eq!(bench.fares(end), []);
    assert_eq!(bench.after(RETRY_MAX * 2), []);
    assert_eq!(bench.state().value, "off");
    assert_eq!(bench.changed(found(Some(on()))), []);
    assert_eq!(bench.after(RETRY_MAX), []);
    // Protected by hand, elsewhere: left so.
    assert_eq!(bench.fares(active("gamma", "protected")), []);
    let other = marked("enabled='yes' backup='delta' insecure='yes'");
    let changed = Found { protection: active("gamma", "protected"), ..found(Some(other)) };
    assert_eq!(bench.changed(changed), [Command::Unprotect(GUEST)]);
}

#[test]
fn a_mistake_keeps_what_there_is_and_is_told() {
    let mut bench = Bench::protected();
    let wrong = Found {
        mark: Err("<protect> has no attribute \"bckup\"".into()),
        protection: active("beta", "protected"),
        ..found(None)
    };
    assert_eq!(bench.changed(wrong.clone()), []);
    bench.after(REPORT_INTERVAL);
    assert_eq!(
        (bench.state().value.as_str(), bench.state().code.as_str()),
        ("protected", "invalid-metadata")
    );
    assert!(bench.state().detail.contains("bckup"));
    let mut bench = Bench::new();
    assert_eq!(bench.changed(Found { protection: Protection::None, ..wrong }), []);
    assert_eq!(bench.state().value, "invalid");
    assert_eq!(bench.changed(found(Some(on()))), [Command::Protect(GUEST, on())]);
}

#[test]
fn a_new_agent_takes_up_what_the_last_one_did() {
    let look = |bench: &mut Bench, found| {
        assert_eq!(bench.step(Event::Began), [Command::LookAtAll]);
        assert_eq!(bench.step(Event::Listed(vec![GUEST])), [Command::Look { guest: GUEST, first: true }]);
        bench.step(Event::Found { guest: GUEST, found, first: true })
    };
    let ours = Some(State { value: "protected".into(), by_metadata: true, ..State::default() });
    let restored = Found { reported: ours, protection: active("beta", "degraded"), ..found(Some(on())) };
    assert_eq!(look(&mut Bench::new(), restored.clone()), []);
    // The mark was taken out while no agent was there: what it began ends with it.
    assert_eq!(
        look(&mut Bench::new(), Found { mark: Ok(None), ..restored.clone() }),
        [Command::Unprotect(GUEST)]
    );
    // What an operator began does not.
    let by_hand = Found { reported: None, mark: Ok(None), ..restored.clone() };
    assert_eq!(look(&mut Bench::new(), by_hand), []);
    // Changed meanwhile.
    let other = marked("enabled='yes' backup='gamma' insecure='yes'");
    assert_eq!(
        look(&mut Bench::new(), Found { mark: Ok(Some(other)), ..restored }),
        [Command::Unprotect(GUEST)]
    );
    assert_eq!(look(&mut Bench::new(), found(Some(on()))), [Command::Protect(GUEST, on())]);
}

#[test]
fn a_command_is_done_once_and_only_after_it_is_out() {
    let mut bench = Bench::protected();
    let order = Found {
        command: Some(Ok(Order::Failover)),
        protection: active("beta", "protected"),
        ..found(Some(on()))
    };
    assert_eq!(bench.changed(order.clone()), [Command::TakeOut(GUEST)]);
    // Seen again before it is out.
    assert_eq!(bench.changed(order.clone()), []);
    assert_eq!(bench.step(Event::TakenOut(GUEST, Ok(()))), [Command::Failover(GUEST)]);
    assert_eq!(bench.step(Event::TakenOut(GUEST, Ok(()))), []);
    bench.step(Event::FailedOver(GUEST, Err(failure("it is protected from here"))));
    bench.after(REPORT_INTERVAL);
    assert_eq!(bench.state().command, "failover: refused: it is protected from here");
    assert_eq!(bench.changed(order.clone()), [Command::TakeOut(GUEST)]);
    assert_eq!(bench.step(Event::TakenOut(GUEST, Err("busy".into()))), []);
    // Of unknown age: it may have been done by an agent before this one.
    let mut bench = Bench::new();
    bench.step(Event::Listed(vec![GUEST]));
    assert_eq!(
        bench.step(Event::Found { guest: GUEST, found: order, first: true }),
        [Command::TakeOut(GUEST)]
    );
    assert_eq!(bench.step(Event::TakenOut(GUEST, Ok(()))), []);
    assert!(bench.state().command.contains("ask again"), "{:?}", bench.state());
}

#[test]
fn a_standby_is_failed_over_by_its_own_host_and_not_protected() {
    let mut bench = Bench::new();
    let standby = Found { standby: true, command: Some(Ok(Order::Failover)), ..found(None) };
    assert_eq!(bench.changed(standby), [Command::TakeOut(GUEST)]);
    assert_eq!(bench.state().value, "standby");
    assert_eq!(bench.step(Event::TakenOut(GUEST, Ok(()))), [Command::Failover(GUEST)]);
    let looks = bench.step(Event::FailedOver(GUEST, Ok("it runs here".into())));
    assert_eq!(looks, [Command::Look { guest: GUEST, first: false }]);
}

#[test]
fn a_promoted_standby_is_protected_as_its_element_says_whoever_promoted_it() {
    let look = [Command::Look { guest: GUEST, first: false }];
    let looked = |bench: &mut Bench, found| bench.step(Event::Found { guest: GUEST, found, first: false });
    let standby = || Found { standby: true, ..found(None) };
    let mut bench = Bench::new();
    // Its element counts for nothing while it is a standby.
    assert_eq!(bench.changed(standby()), []);
    assert_eq!(bench.after(Duration::from_secs(60)), []);
    assert_eq!(bench.engine.standbys(), [GUEST]);
    assert_eq!(bench.step(Event::Promoted(GUEST)), look);
    // A look from before it.
    assert_eq!(looked(&mut bench, standby()), []);
    assert_eq!(bench.step(Event::Promoted(GUEST)), look);
    assert_eq!(looked(&mut bench, found(Some(on()))), [Command::Protect(GUEST, on())]);
    assert_eq!(bench.engine.standbys(), []);
}

#[test]
fn a_standby_that_is_gone_is_not_asked_for_its_promotion() {
    for end in [Event::Gone(GUEST), Event::Stopped(GUEST)] {
        let mut bench = Bench::new();
        bench.changed(Found { standby: true, ..found(None) });
        bench.step(end);
        assert_eq!(bench.engine.standbys(), []);
        assert_eq!(bench.step(Event::Promoted(GUEST)), []);
    }
}

#[test]
fn a_promoted_standby_is_not_called_one_any_more() {
    let mut bench = Bench::new();
    let command = Some(Err("no such command".to_owned()));
    bench.changed(Found { standby: true, command, ..found(None) });
    assert_eq!(bench.state().value, "standby");
    bench.step(Event::Promoted(GUEST));
    bench.step(Event::Found { guest: GUEST, found: found(None), first: false });
    bench.after(REPORT_INTERVAL);
    assert_eq!(bench.state().value, "off");
}

#[test]
fn a_look_from_before_the_protection_does_not_end_it() {
    let mut bench = Bench::new();
    bench.changed(found(Some(on())));
    assert_eq!(bench.step(Event::Changed { guest: GUEST, started: false }).len(), 1);
    bench.fares(active("beta", "protected"));
    assert_eq!(bench.step(Event::Found { guest: GUEST, found: found(Some(on())), first: false }), []);
    bench.after(REPORT_INTERVAL);
    assert_eq!(bench.state().value, "protected");
}

#[test]
fn looks_do_not_overtake_each_other() {
    let mut bench = Bench::new();
    let change = || Event::Changed { guest: GUEST, started: false };
    assert_eq!(bench.step(change()).len(), 1);
    assert_eq!(bench.step(change()), []);
    assert_eq!(bench.step(change()), []);
    // What came between is looked at once more, after the first.
    let commands = bench.step(Event::Found { guest: GUEST, found: found(None), first: false });
    assert_eq!(commands, [Command::Look { guest: GUEST, first: false }]);
    assert_eq!(bench.step(Event::Gone(GUEST)), []);
    assert_eq!(bench.step(change()).len(), 1);
    // It ended while it was looked at: what is found may be older than its end.
    assert_eq!(bench.step(Event::Stopped(GUEST)), []);
    let late = bench.step(Event::Found { guest: GUEST, found: found(Some(on())), first: false });
    assert!(late.contains(&Command::Look { guest: GUEST, first: false }), "{late:?}");
}

#[test]
fn reports_are_few_and_the_last_one_counts() {
    let mut bench = Bench::protected();
    let reports = |bench: &mut Bench, event| {
        let commands = bench.engine.step(event, bench.now);
        commands.into_iter().filter(|command| matches!(command, Command::Report(..))).count()
    };
    bench.after(REPORT_INTERVAL);
    let mut count = 0;
    for n in 0..100 {
        let value = if n % 2 == 0 { "degraded" } else { "protected" };
        count += reports(&mut bench, Event::Fares(GUEST, active("beta", value)));
    }
    assert_eq!(count, 1, "the first at once");
    // Nothing has changed since the one before: epochs alone are no news.
    bench.now += REPORT_INTERVAL;
    count = (0..50).map(|_| reports(&mut bench, Event::Fares(GUEST, active("beta", "protected")))).sum();
    assert_eq!(count, 1);
    bench.now += REPORT_INTERVAL;
    assert_eq!(reports(&mut bench, Event::Tick), 0);
    assert_eq!(reports(&mut bench, Event::ReportLost(GUEST)), 1, "a lost one is said again");
}

#[test]
fn other_choices_for_failures_need_no_new_full_copy() {
    let mut bench = Bench::protected();
    let chosen = |more: &str| marked(&format!("enabled='yes' backup='beta' insecure='yes' {more}"));
    let solo = Policy { on_lost_backup: Some("solo".to_owned()), ..Policy::default() };
    assert_eq!(
        bench.changed(found(Some(chosen("on-lost-backup='solo'")))),
        [Command::Policy(GUEST, solo.clone())]
    );
    assert_eq!(bench.changed(found(Some(chosen("on-lost-backup='solo'")))), []);
    let spares = Policy { spares: vec!["gamma".to_owned()], ..solo };
    let both = [Command::Pace(GUEST, Epoch::Auto), Command::Policy(GUEST, spares)];
    assert_eq!(bench.changed(found(Some(chosen("on-lost-backup='solo' spares='gamma' epoch='auto'")))), both);
    // What is not said is left as it is.
    assert_eq!(bench.changed(found(Some(on()))), []);
}

#[test]
fn another_length_of_epochs_needs_no_new_full_copy() {
    let mut bench = Bench::protected();
    let paced = |ms: u64| marked(&format!("enabled='yes' backup='beta' insecure='yes' epoch='{ms}ms'"));
    let pace = |ms: u64| [Command::Pace(GUEST, Epoch::Fixed(Duration::from_millis(ms)))];
    assert_eq!(bench.changed(found(Some(paced(25)))), pace(25));
    assert_eq!(bench.changed(found(Some(paced(25)))), []);
    assert_eq!(bench.changed(found(Some(paced(50)))), pace(50));
    let auto = marked("enabled='yes' backup='beta' insecure='yes' epoch='auto'");
    assert_eq!(bench.changed(found(Some(auto))), [Command::Pace(GUEST, Epoch::Auto)]);
    // Left to the agent again: whatever it is is right.
    assert_eq!(bench.changed(found(Some(on()))), []);
    let elsewhere = marked("enabled='yes' backup='gamma' insecure='yes' epoch='50ms'");
    assert_eq!(bench.changed(found(Some(elsewhere))), [Command::Unprotect(GUEST)]);
}
