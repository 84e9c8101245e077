//! A libvirtd of a test's own, and a guest captured from it.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use super::at;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use understudy_backup::image::{AnonymousMemory, Image};
use understudy_libvirt::{Connection, Domain, qmp};
use understudy_proto::frame::{Codec, Record};
use understudy_proto::qemu::{EndSeen, PrecopyEvent, PrecopyReader};
use understudy_proto::rpc::epoch::Seed;

/// For an emulated guest that has a few percent of a CPU while something else is tested.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// A daemon of our own; it and everything it started end with this value.
pub struct Libvirtd {
    child: Child,
    input: Option<ChildStdin>,
    pub dir: tempfile::TempDir,
}

impl Libvirtd {
    pub fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap())
    }

    /// With the memory files of its guests under `dir`.
    pub fn start_in(dir: tempfile::TempDir) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../libvirt-hooks/tests/private-libvirtd.sh");
        let log = std::fs::File::create(dir.path().join("script.log")).unwrap();
        let mut child = Command::new(script)
            .arg(dir.path())
            .stdin(Stdio::piped())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let input = child.stdin.take();
        Self { child, input, dir }
    }

    pub fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}/libvirt-sock", self.dir.path().display())
    }

    pub fn connect(&mut self) -> Connection {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Connection::open(&self.uri()).and_then(|c| c.versions().map(|_| c)) {
                Ok(connection) => return connection,
                Err(e) if Instant::now() > deadline || self.child.try_wait().unwrap().is_some() => {
                    let log = std::fs::read_to_string(self.dir.path().join("script.log"));
                    panic!("{e}\n{}", log.unwrap_or_default());
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

/// What keeps this test from running here.
pub fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("it needs root".to_owned());
    }
    let there =
        |program: &&str| ["/usr/sbin", "/usr/bin"].iter().any(|dir| Path::new(dir).join(program).exists());
    if let Some(program) =
        ["unshare", "libvirtd", "virtlogd", "qemu-system-x86_64"].iter().find(|p| !there(p))
    {
        return Some(format!("{program} is not installed"));
    }
    let probe =
        Command::new("unshare").args(["--mount", "--net", "--pid", "--fork", "true"]).status().unwrap();
    (!probe.success()).then(|| "it may not make namespaces".to_owned())
}

/// Everything of a guest, by an ordinary migration to nobody.
pub fn capture(domain: &Domain) -> Image {
    let xml = domain.portable_xml().unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    qmp::getfd(domain, "out", theirs.as_fd()).unwrap();
    drop(theirs);
    qmp::migrate(domain, "fd:out").unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut stream = Vec::new();
    ours.read_to_end(&mut stream).unwrap();
    let (mut reader, mut input, mut image) = (PrecopyReader::new(), stream.as_slice(), None::<Image>);
    while let Some(event) = reader.read(&mut input).unwrap() {
        match event {
            PrecopyEvent::Layout(layout) => {
                let seed = Seed { layout: layout.as_ref().clone(), domain_xml: xml.clone() };
                image = Some(Image::new(Arc::new(seed), &AnonymousMemory).unwrap());
            }
            PrecopyEvent::Page(p) => {
                let (codec, payload) = match p.content {
                    Some(content) => (Codec::Raw, &content[..]),
                    None => (Codec::Zero, &[][..]),
                };
                let record = Record { block: p.block, page: p.page, codec, payload };
                image.as_mut().unwrap().apply(&record).unwrap();
            }
            _ => (),
        }
    }
    let precopy = reader.finish(EndSeen::ColoState).unwrap();
    let mut image = image.unwrap();
    image.set_epoch(at(1, 1), precopy.device.into());
    image
}
