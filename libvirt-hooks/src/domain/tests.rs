use super::*;

#[test]
fn replies_of_the_passthrough_are_parsed() {
    let reply = r#"{"return":{"status":"running"},"id":"libvirt-12"}"#;
    assert_eq!(parse_reply("query-status", reply), Ok(serde_json::json!({"status": "running"})));
    let refused =
        r#"{"id":"libvirt-13","error":{"class":"GenericError","desc":"The feature 'colo' is not enabled"}}"#;
    assert!(
        matches!(parse_reply("x", refused), Err(MonitorError::Qmp { desc, .. }) if desc.contains("colo"))
    );
    assert!(matches!(parse_reply("x", "OK"), Err(MonitorError::Failed { .. })));
}

#[test]
fn xml_flags_are_libvirts() {
    assert_eq!(XmlFlags::default().bits(), 0);
    let flags = XmlFlags { migratable: true, secure: true, inactive: false };
    assert_eq!(flags.bits(), virt_sys::VIR_DOMAIN_XML_SECURE | virt_sys::VIR_DOMAIN_XML_MIGRATABLE);
}
