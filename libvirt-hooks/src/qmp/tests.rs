use std::sync::Mutex;

use super::*;

/// Answers every command with one value and keeps what it was asked.
struct Canned {
    reply: Value,
    asked: Mutex<Vec<(String, Value)>>,
}

impl Canned {
    fn new(reply: Value) -> Self {
        Self { reply, asked: Mutex::new(Vec::new()) }
    }

    fn asked(self) -> (String, Value) {
        self.asked.into_inner().unwrap().remove(0)
    }
}

impl Monitor for Canned {
    fn execute(&self, command: &str, arguments: Value) -> Result<Value, MonitorError> {
        self.asked.lock().unwrap().push((command.to_owned(), arguments));
        Ok(self.reply.clone())
    }

    fn execute_with_fd(
        &self,
        command: &str,
        arguments: Value,
        _: BorrowedFd<'_>,
    ) -> Result<Value, MonitorError> {
        self.execute(command, arguments)
    }
}

#[test]
fn run_states_are_an_open_world() {
    let status = |name: &str| {
        query_status(&Canned::new(json!({"status": name, "running": true, "singlestep": false, "new": {}})))
    };
    assert_eq!(status("running"), Ok(RunState::Running));
    assert_eq!(status("finish-migrate"), Ok(RunState::FinishMigrate));
    assert_eq!(status("hibernating"), Ok(RunState::Other("hibernating".into())));
    for name in
        ["colo", "inmigrate", "postmigrate", "io-error", "guest-panicked", "internal-error", "watchdog"]
    {
        assert_eq!(RunState::from_name(name).name(), name);
    }
}

#[test]
fn version_is_read_with_and_without_package() {
    let numbers = json!({"major": 7, "minor": 2, "micro": 22});
    let version =
        query_version(&Canned::new(json!({"qemu": numbers, "package": "Debian 1:7.2+dfsg-7"}))).unwrap();
    assert_eq!((version.to_string().as_str(), version.package.as_str()), ("7.2.22", "Debian 1:7.2+dfsg-7"));
    assert_eq!(query_version(&Canned::new(json!({ "qemu": numbers }))).unwrap().numbers(), (7, 2, 22));
}

#[test]
fn migrate_info_of_an_idle_a_blocked_and_a_failed_guest() {
    assert_eq!(query_migrate(&Canned::new(json!({}))), Ok(MigrateInfo::default()));
    let blocked =
        query_migrate(&Canned::new(json!({"blocked": true, "blocked-reasons": ["ivshmem"]}))).unwrap();
    assert_eq!(blocked.blocked_reasons, ["ivshmem"]);
    let failed = json!({"status": "failed", "error-desc": "Broken pipe", "total-time": 3, "ram": {}});
    let failed = query_migrate(&Canned::new(failed)).unwrap();
    assert_eq!(
        (failed.status.as_deref(), failed.error_desc.as_deref()),
        (Some("failed"), Some("Broken pipe"))
    );
}

#[test]
fn yank_instances_and_capabilities() {
    let yank = |list: Value| query_yank_has_migration(&Canned::new(list));
    assert_eq!(yank(json!([])), Ok(false));
    assert_eq!(yank(json!([{"type": "chardev", "id": "m"}, {"type": "future"}])), Ok(false));
    assert_eq!(yank(json!([{"type": "chardev", "id": "m"}, {"type": "migration"}])), Ok(true));
    let list = json!([{"capability": "x-colo", "state": true}, {"capability": "events", "state": false}]);
    let capabilities = query_capabilities(&Canned::new(list)).unwrap();
    assert_eq!((capabilities.get("x-colo"), capabilities.get("events")), (Some(&true), Some(&false)));
}

#[test]
fn commands_are_spelled_as_qemu_wants_them() {
    let canned = Canned::new(json!({}));
    set_capabilities(&canned, &[("x-colo", true), ("return-path", false)]).unwrap();
    let wanted = json!({"capabilities": [{"capability": "x-colo", "state": true},
                                         {"capability": "return-path", "state": false}]});
    assert_eq!(canned.asked(), ("migrate-set-capabilities".to_owned(), wanted));

    let canned = Canned::new(json!({}));
    migrate(&canned, "fd:understudy").unwrap();
    assert_eq!(canned.asked(), ("migrate".to_owned(), json!({"uri": "fd:understudy"})));

    let canned = Canned::new(json!({}));
    getfd(&canned, "understudy", std::os::fd::AsFd::as_fd(&std::io::stdin())).unwrap();
    assert_eq!(canned.asked(), ("getfd".to_owned(), json!({"fdname": "understudy"})));
}

#[test]
fn a_reply_of_another_shape_is_an_error_that_names_the_command() {
    let error = query_status(&Canned::new(json!([]))).unwrap_err();
    assert!(matches!(&error, MonitorError::Failed { command, .. } if command == "query-status"), "{error}");
}
