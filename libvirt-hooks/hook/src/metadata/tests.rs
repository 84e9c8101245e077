use std::time::Duration;

use proptest::prelude::*;

use super::*;

fn domain(inside: &str) -> String {
    format!(
        "<domain type='kvm' id='3'><name>web</name><metadata><o:x xmlns:o='urn:o'/>{inside}</metadata></domain>"
    )
}

fn mistake(xml: &str) -> String {
    Protect::parse(xml).unwrap_err().to_string()
}

#[test]
fn one_line_is_enough() {
    let one = "<u:protect xmlns:u='urn:understudy:domain:1' enabled='yes' backup='hostb'/>";
    let wanted = Protect::in_domain(&domain(one)).unwrap().unwrap();
    assert!(wanted.enabled && !wanted.required && !wanted.insecure);
    assert_eq!((wanted.backup.as_str(), wanted.epoch, wanted.output), ("hostb", None, Output::Gated));
    assert_eq!(Protect::in_domain(&domain("")).unwrap(), None);
    // libvirt gives it without its namespace to whoever asks by URI.
    assert_eq!(Protect::parse("<protect enabled='yes' backup='hostb'/>").unwrap(), wanted);
    // Another prefix, or none.
    let plain = "<protect xmlns='urn:understudy:domain:1' enabled='yes' backup='hostb'/>";
    assert_eq!(Protect::in_domain(&domain(plain)).unwrap().unwrap(), wanted);
}

#[test]
fn everything_can_be_said() {
    let xml =
        "<p:protect xmlns:p='urn:understudy:domain:1' enabled='yes' backup='[fe80::1]:7421' epoch='25ms'
        required='yes' insecure='yes' output='ungated' on-lost-backup='solo' on-qemu-crash='leave'
        spares='c d:7421'><!-- why --><p:disk target='vda' policy='buffer'/>
        <p:disk target='sdb' policy='ignore'/><p:nic mac='52:54:00:AB:cd:ef' policy='gate'/></p:protect>";
    let wanted = Protect::in_domain(&domain(xml)).unwrap().unwrap();
    assert_eq!(wanted.epoch, Some(Epoch::Fixed(Duration::from_millis(25))));
    let auto = Protect::in_domain(&domain(&xml.replace("25ms", "auto"))).unwrap().unwrap();
    assert_eq!(auto.epoch, Some(Epoch::Auto));
    assert!(wanted.required && wanted.insecure && wanted.output == Output::Ungated);
    let policy = wanted.policy.unwrap();
    assert_eq!(
        (policy.on_lost_backup.as_deref(), policy.on_qemu_crash.as_deref()),
        (Some("solo"), Some("leave"))
    );
    assert_eq!(policy.spares, ["c", "d:7421"]);
    assert_eq!(wanted.disks.len(), 2);
    assert!(wanted.disks[0].replicated && !wanted.disks[1].replicated);
    assert_eq!(wanted.nics, [NicPolicy { mac: "52:54:00:ab:cd:ef".into(), output: Output::Gated }]);
    assert_eq!(Protect::parse("<protect enabled='no'/>").unwrap().backup, "");
}

#[test]
fn mistakes_name_the_nearest_valid_word() {
    for (xml, words) in [
        ("<protect enable='yes'/>", "no attribute \"enable\"; did you mean \"enabled\"?"),
        ("<protect enabled='yes' backp='b'/>", "\"backup\"?"),
        ("<protect enabled='yes' backup='b' Epoch='9ms'/>", "did you mean \"epoch\"?"),
        (
            "<protect enabled='yes' backup='b' u:required='yes' xmlns:u='urn:u'/>",
            "did you mean \"required\"?",
        ),
        (
            "<protect enabled='yes' backup='b'><dsk/></protect>",
            "<dsk> is not known in <protect>; did you mean <disk>?",
        ),
        ("<protect enabled='yes' backup='b'><o:disk xmlns:o='urn:o'/></protect>", "<disk> is not known"),
        ("<protct enabled='yes'/>", "did you mean <protect>?"),
        ("<protect enabled='ja' backup='b'/>", "enabled of <protect> is \"ja\"; did you mean"),
        ("<protect enabled='true' backup='b'/>", "one of \"yes\", \"no\""),
        ("<protect backup='b'/>", "lacks the attribute \"enabled\""),
        ("<protect enabled='yes'/>", "lacks the attribute \"backup\""),
        ("<protect enabled='yes' backup='a b'/>", "give HOST"),
        ("<protect enabled='yes' backup='b' output='gate'/>", "did you mean \"gated\"?"),
        ("<protect enabled='yes' backup='b' on-lost-backup='sole'/>", "did you mean \"solo\"?"),
        ("<protect enabled='yes' backup='b' on-qemu-crash='fail-over'/>", "did you mean \"failover\"?"),
        ("<protect enabled='yes' backup='b' on-lost-bakup='solo'/>", "on-lost-backup"),
        ("<protect enabled='yes' backup='b' spares=' '/>", "1 to 8 hosts"),
        ("<protect enabled='yes' backup='b' spares='a b/c'/>", "b/c"),
        ("<protect enabled='yes' backup='b' epoch='25'/>", "did you mean \"25ms\"?"),
        ("<protect enabled='yes' backup='b' epoch='4ms'/>", "\"5ms\" to \"60s\""),
        ("<protect enabled='yes' backup='b' epoch='61s'/>", "\"5ms\" to \"60s\""),
        ("<protect enabled='yes' backup='b' epoch='99999999999999999999s'/>", "\"auto\""),
        ("<protect enabled='yes' backup='b' epoch='-5ms'/>", "\"auto\""),
        ("<protect enabled='yes' backup='b'>on</protect>", "contains text"),
        ("<protect enabled='yes' backup='b'>&amp;</protect>", "contains text"),
        (
            "<protect enabled='yes' backup='b'><disk target='vda'/></protect>",
            "lacks the attribute \"policy\"",
        ),
        (
            "<protect enabled='yes' backup='b'><disk target='v/a' policy='buffer'/></protect>",
            "for example 'vda'",
        ),
        (
            "<protect enabled='yes' backup='b'><disk target='a' policy='bufer'/></protect>",
            "did you mean \"buffer\"?",
        ),
        ("<protect enabled='yes' backup='b'><nic mac='52:54' policy='gate'/></protect>", "six bytes"),
        (
            "<protect enabled='yes' backup='b'><nic mac='52:54:00:00:00:01' policy='opn'/></protect>",
            "did you mean \"open\"?",
        ),
        (
            "<protect enabled='yes' backup='b'><nic mac='52:54:00:00:00:01' policy='gate'/><nic mac='52:54:00:00:00:01' policy='open'/></protect>",
            "twice",
        ),
        ("<protect enabled='yes' enabled='no'/>", "malformed"),
        ("<protect enabled='yes'", "malformed"),
        ("<a:protect enabled='yes'/>", "\"a\" is not declared"),
        ("", "malformed"),
        ("<!DOCTYPE a []><protect enabled='no'/>", "document type"),
    ] {
        let text = mistake(xml);
        assert!(text.contains(words), "{xml}: {text}");
    }
}

#[test]
fn size_and_depth_are_bounded() {
    let long = format!("<protect enabled='no'>{}</protect>", " ".repeat(MAX_XML_BYTES));
    assert!(matches!(Protect::parse(&long), Err(MetadataError::TooLarge { .. })));
    assert!(mistake(&"<protect>".repeat(65)).contains("deeper"));
}

#[test]
fn only_elements_directly_in_the_metadata_count() {
    let ours = "<u:protect xmlns:u='urn:understudy:domain:1' enabled='yes' backup='b' required='yes'/>";
    let elsewhere =
        format!("<domain><devices>{ours}</devices><metadata><x xmlns='urn:x'>{ours}</x></metadata></domain>");
    assert_eq!(Protect::in_domain(&elsewhere).unwrap(), None);
    assert!(!asks_to_be_required(&elsewhere));
    assert!(Protect::in_domain(&domain(&format!("{ours}{ours}"))).unwrap_err().to_string().contains("twice"));
    assert!(Protect::in_domain("<network/>").is_err());
}

#[test]
fn a_mistake_elsewhere_does_not_make_a_required_guest_optional() {
    let required = |attributes: &str| {
        asks_to_be_required(&domain(&format!("<u:protect xmlns:u='urn:understudy:domain:1' {attributes}/>")))
    };
    assert!(required("enabled='yes' required='yes' backup='b'"));
    assert!(required("enabld='yes' required='yes'"));
    assert!(!required("enabled='no' required='yes'"));
    assert!(!required("enabled='yes' required='no'"));
    assert!(!required("enabled='yes'"));
    assert!(!asks_to_be_required("<domain"));
}

#[test]
fn commands_are_read() {
    assert_eq!(Command::parse("<failover/>").unwrap(), Command::Failover);
    assert_eq!(
        Command::parse("<c:failover xmlns:c='urn:understudy:command:1'/>").unwrap(),
        Command::Failover
    );
    assert!(Command::parse("<failovr/>").unwrap_err().to_string().contains("<failover>"));
    assert!(Command::parse("<failover force='yes'/>").is_err());
    assert!(Command::parse("<failover>now</failover>").is_err());
}

#[test]
fn a_state_is_short_and_well_formed() {
    let state =
        State { value: "protected".into(), backup: "b".into(), by_metadata: true, ..State::default() };
    assert_eq!(state.to_xml(), "<state value='protected' backup='b' by='metadata'/>");
    let long = State { detail: "\u{e9}".repeat(5000), ..state };
    assert!(long.to_xml().len() < 1200);
}

#[test]
fn the_schema_knows_the_same_words() {
    let schema = include_str!("../../schema/understudy-domain.rng");
    Node::parse(schema).unwrap();
    for name in protect::words() {
        assert!(
            schema.contains(&format!("name=\"{name}\""))
                || schema.contains(&format!("<value>{name}</value>")),
            "{name}"
        );
    }
}

use super::tree::Node;

proptest! {
    #[test]
    fn a_state_survives_being_written(
        value in "[a-z]{1,9}", detail in "[ -~é€<>&'\"]{0,60}", generation in prop::option::of(any::<u64>())
    ) {
        let state = State { value, detail, generation, ..State::default() };
        prop_assert_eq!(State::parse(&state.to_xml()).unwrap(), state);
    }

    #[test]
    fn any_text_is_read_or_refused(text in "(<protect )?[<>/a-z='\"&;#x!\\[\\]\\- ]{0,60}") {
        let _ = (Protect::parse(&text), Command::parse(&text), State::parse(&text));
        let _ = (Protect::in_domain(&domain(&text)), asks_to_be_required(&domain(&text)));
    }
}
