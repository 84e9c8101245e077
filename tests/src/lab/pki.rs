//! Certificates of the lab: each host's own, an operator's, and some that nobody must accept. Made once for each lab.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};

use super::plan::{HostName, Net};

/// Whose certificate may command the agents over TCP.
pub(crate) const OPERATOR: &str = "operator";

/// Who decides which host runs a guest, on the client's addresses.
pub(crate) const WITNESS: &str = "witness";

/// The secret of the heartbeats, beside the certificates.
const HEARTBEAT_KEY: &str = "heartbeat.key";

/// In the shared folder.
const FOLDER: &str = "pki";

/// The files of a folder, in libvirt's layout.
pub(crate) const FILES: [&str; 5] = [
    "CA/cacert.pem",
    "libvirt/servercert.pem",
    "libvirt/private/serverkey.pem",
    "libvirt/clientcert.pem",
    "libvirt/private/clientkey.pem",
];

const GOOD_UNTIL: i32 = 2400;

/// The folder of a host's certificates, or of the operator's.
pub(crate) fn folder(shared: &Path, name: &str) -> PathBuf {
    shared.join(FOLDER).join(name)
}

/// The secret of the heartbeats, as a file of the shared folder.
pub(crate) fn heartbeat_key(shared: &Path) -> PathBuf {
    shared.join(FOLDER).join(HEARTBEAT_KEY)
}

/// Certificates of a host that must be refused.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wrong {
    /// Alpha's name, by another CA.
    Stranger,
    /// Alpha's own, out of date.
    Expired,
    /// By the right CA, for a host that is not allowed.
    Gamma,
}

impl Wrong {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stranger => "stranger",
            Self::Expired => "expired",
            Self::Gamma => "gamma",
        }
    }
}

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new(name: &str) -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), pem })
    }

    fn issue(&self, folder: &Path, names: &[String], addresses: &[IpAddr], until: i32) -> Result<()> {
        let write = |file: &str, text: &str| -> Result<()> {
            let path = folder.join(file);
            fs::create_dir_all(path.parent().unwrap_or(folder))?;
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        write(FILES[0], &self.pem)?;
        let sides = [
            (FILES[1], FILES[2], ExtendedKeyUsagePurpose::ServerAuth),
            (FILES[3], FILES[4], ExtendedKeyUsagePurpose::ClientAuth),
        ];
        for (certificate, private, usage) in sides {
            let mut params = CertificateParams::new(names.to_vec())?;
            params.subject_alt_names.extend(addresses.iter().map(|address| SanType::IpAddress(*address)));
            params.extended_key_usages = vec![usage];
            params.not_before = rcgen::date_time_ymd(2000, 1, 1);
            params.not_after = rcgen::date_time_ymd(until, 1, 1);
            let key = KeyPair::generate()?;
            write(certificate, &params.signed_by(&key, &self.issuer)?.pem())?;
            write(private, &key.serialize_pem())?;
        }
        Ok(())
    }
}

/// Makes them unless they are there.
pub(crate) fn ensure(shared: &Path) -> Result<()> {
    if shared.join(FOLDER).exists() {
        return Ok(());
    }
    let (ours, theirs) = (Authority::new("lab")?, Authority::new("stranger")?);
    let fresh = shared.join(format!(".{FOLDER}"));
    for host in HostName::ALL {
        let names = [host.name().to_owned(), format!("{host}-lan"), "localhost".to_owned()];
        let addresses = [Net::Lan, Net::Repl].map(|net| host.address(net).into());
        let addresses = [&addresses[..], &[IpAddr::from([127, 0, 0, 1])]].concat();
        ours.issue(&fresh.join(host.name()), &names, &addresses, GOOD_UNTIL)?;
    }
    let alpha = [HostName::Alpha.name().to_owned()];
    theirs.issue(&fresh.join(Wrong::Stranger.name()), &alpha, &[], GOOD_UNTIL)?;
    ours.issue(&fresh.join(Wrong::Expired.name()), &alpha, &[], 2001)?;
    for name in [Wrong::Gamma.name(), OPERATOR] {
        ours.issue(&fresh.join(name), &[name.to_owned()], &[], GOOD_UNTIL)?;
    }
    let addresses = [Net::Lan, Net::Repl, Net::Mgmt].map(|net| net.client().into());
    ours.issue(&fresh.join(WITNESS), &[WITNESS.to_owned()], &addresses, GOOD_UNTIL)?;
    let key = fresh.join(HEARTBEAT_KEY);
    fs::write(&key, KeyPair::generate()?.serialize_pem())?;
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
    // Nobody sees half of it.
    fs::rename(&fresh, shared.join(FOLDER)).context("cannot put the certificates into place")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_folder_is_whole_and_made_once() {
        let shared = tempfile::tempdir().unwrap();
        ensure(shared.path()).unwrap();
        for name in ["alpha", "beta", "stranger", "expired", "gamma", OPERATOR, WITNESS] {
            for file in FILES {
                let text = fs::read_to_string(folder(shared.path(), name).join(file)).unwrap();
                assert!(text.starts_with("-----BEGIN "), "{name} {file}");
            }
        }
        let before = fs::read(folder(shared.path(), "alpha").join(FILES[1])).unwrap();
        ensure(shared.path()).unwrap();
        assert_eq!(fs::read(folder(shared.path(), "alpha").join(FILES[1])).unwrap(), before);
    }
}
