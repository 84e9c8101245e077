//! TLS between agents, with libvirt's own files: both sides show a certificate of the same CA.
//!
//! The files are read anew for every connection, so renewed ones count without a restart. rustls and ring: no C library.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, InvalidMessage,
    RootCertStore, ServerConfig, SignatureScheme,
};

/// Where libvirt keeps its files.
pub const PKI_DIR: &str = "/etc/pki";

const ALPN: &[u8] = b"h2";

/// How the stream of epochs is protected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Security {
    /// Not at all.
    Plain,
    /// By mutual TLS.
    Tls(TlsFiles),
    /// A server that takes both.
    #[cfg(feature = "test-hooks")]
    Either(TlsFiles),
}

/// The files of one side, and whom it talks to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificates of the CA.
    pub ca: PathBuf,
    /// The certificate of this host.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Names of which a client's certificate must have one as a subject alternative name; empty: any of the CA's.
    pub allowed: Vec<String>,
}

impl TlsFiles {
    /// Those that a server uses in libvirt's layout.
    pub fn server(pki: &Path, allowed: Vec<String>) -> Self {
        Self::named(pki, "server", allowed)
    }

    /// Those that a client uses in libvirt's layout.
    pub fn client(pki: &Path) -> Self {
        Self::named(pki, "client", Vec::new())
    }

    fn named(pki: &Path, side: &str, allowed: Vec<String>) -> Self {
        Self {
            ca: pki.join("CA/cacert.pem"),
            certificate: pki.join(format!("libvirt/{side}cert.pem")),
            key: pki.join(format!("libvirt/private/{side}key.pem")),
            allowed,
        }
    }

    fn read(&self) -> Result<Loaded, String> {
        let named = |path: &Path, error: &dyn std::fmt::Display| {
            format!("cannot use {} for TLS: {error}", path.display())
        };
        let certificates = |path: &Path| {
            let all = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
            match all {
                Ok(all) if all.is_empty() => Err(named(path, &"there is no certificate in it")),
                Ok(all) => Ok(all),
                Err(error) => Err(named(path, &error)),
            }
        };
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&self.ca)? {
            roots.add(certificate).map_err(|error| named(&self.ca, &error))?;
        }
        let chain = certificates(&self.certificate)?;
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|error| named(&self.key, &error))?;
        Ok(Loaded { roots: Arc::new(roots), chain, key })
    }

    /// What a client begins with.
    ///
    /// # Errors
    /// Which file cannot be used, and why.
    pub fn client_config(&self) -> Result<ClientConfig, String> {
        let Loaded { roots, chain, key } = self.read()?;
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(|error| self.unusable(&error))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(config)
    }

    /// What a server begins with.
    ///
    /// # Errors
    /// Which file cannot be used, and why.
    pub fn server_config(&self) -> Result<ServerConfig, String> {
        let Loaded { roots, chain, key } = self.read()?;
        let names = self.allowed.iter().map(|name| {
            ServerName::try_from(name.clone()).map_err(|_| format!("{name:?} is no name of a host"))
        });
        let allowed = names.collect::<Result<Vec<_>, _>>()?;
        let inner = WebPkiClientVerifier::builder_with_provider(roots, provider())
            .build()
            .map_err(|error| error.to_string())?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_client_cert_verifier(Arc::new(Listed { inner, allowed }))
            .with_single_cert(chain, key)
            .map_err(|error| self.unusable(&error))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(config)
    }

    fn unusable(&self, error: &Error) -> String {
        format!("{} and {} do not go together: {error}", self.certificate.display(), self.key.display())
    }
}

struct Loaded {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Clients of the CA, and of those only the ones with a name that is allowed.
#[derive(Debug)]
struct Listed {
    inner: Arc<dyn ClientCertVerifier>,
    allowed: Vec<ServerName<'static>>,
}

impl ClientCertVerifier for Listed {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.inner.verify_client_cert(certificate, others, now)?;
        let refused = || Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure);
        let certificate = webpki::EndEntityCert::try_from(certificate).map_err(|_| refused())?;
        let listed = |name| certificate.verify_is_valid_for_subject_name(name).is_ok();
        if self.allowed.is_empty() || self.allowed.iter().any(listed) { Ok(verified) } else { Err(refused()) }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// A failed handshake in the words of whoever has to do something about it.
pub(super) fn explained(error: &io::Error) -> String {
    use CertificateError as C;
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    let Some(inner) = inner else { return error.to_string() };
    let meaning = match inner {
        // A bad signature: of another CA that has the same name as ours.
        Error::InvalidCertificate(C::UnknownIssuer | C::BadSignature) => "its certificate is not of our CA",
        Error::InvalidCertificate(C::Expired | C::ExpiredContext { .. }) => "its certificate has expired",
        Error::InvalidCertificate(C::NotValidYet | C::NotValidYetContext { .. }) => {
            "its certificate is not valid yet; compare the clocks"
        }
        Error::InvalidCertificate(C::NotValidForName | C::NotValidForNameContext { .. }) => {
            "its certificate does not have the name it was called by"
        }
        Error::InvalidCertificate(C::ApplicationVerificationFailure) => {
            "its certificate has none of the names that are allowed here (--allow)"
        }
        Error::NoCertificatesPresented => "it has shown no certificate",
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "it does not speak TLS; was one of the two started with --insecure, and the other without?"
        }
        Error::AlertReceived(_) => "it refuses us, the alert says why",
        _ => return inner.to_string(),
    };
    format!("{meaning} ({inner})")
}
