//! etcd as arbiter: a key for each guest, replaced by a transaction that compares the revision it was read at.
//!
//! The value is a line with the version of the format and the term, and the record as JSON behind it. Reads are
//! linearizable. A swap whose answer does not come may still take effect, or not; the revision it compares makes sure
//! that it cannot once another has (invariant 13).

use std::time::Duration;

use etcd_client::{Channel, Client, Compare, CompareOp, ConnectOptions, Txn, TxnOp};
use tokio::sync::Mutex;
use understudy_proto::ids::GuestId;
use understudy_proto::ownership::{Ownership, Term};
use understudy_proto::rpc::transport::{self, Security, TlsFiles};
use understudy_proto::rpc::{Failure, FailureKind, async_trait};

use super::Arbiter;

/// Port of an etcd server for its clients.
const ETCD_PORT: u16 = 2379;

/// What is before a guest's UUID in its key.
const PREFIX: &str = "understudy/guests/";

/// Of the value's format.
const VERSION: u32 = 1;

/// An etcd cluster.
pub struct EtcdArbiter {
    members: Vec<Member>,
    timeout: Duration,
    kept: Mutex<Kept>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Member {
    authority: String,
    security: Security,
}

/// The connection that answered last.
#[derive(Default)]
struct Kept {
    /// Which of the members it leads to.
    at: usize,
    client: Option<Client>,
}

/// A record and the revision it was written at; revision 0: there is none.
type Found = (i64, Option<Ownership>);

impl std::fmt::Debug for EtcdArbiter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdArbiter").field("members", &self.members).finish_non_exhaustive()
    }
}

impl EtcdArbiter {
    /// The cluster whose members are at `endpoints`: `HOST`, `HOST:PORT` or `https://HOST:PORT` by TLS with these files,
    /// `http://HOST:PORT` without, only on this machine. No question takes longer than `timeout`, whoever has to be asked.
    ///
    /// # Errors
    /// If an endpoint cannot be used, naming it.
    pub fn new(endpoints: &[String], files: &TlsFiles, timeout: Duration) -> Result<Self, Failure> {
        let members = endpoints.iter().map(|endpoint| Member::parse(endpoint, files));
        let members = members.collect::<Result<Vec<_>, _>>()?;
        if members.is_empty() {
            return Err(Failure::new(FailureKind::InvalidArgument, "etcd", "no endpoint is given"));
        }
        Ok(Self { members, timeout, kept: Mutex::default() })
    }

    /// Asks the member that answered last, then the others, each for its share of the time.
    async fn ask<T, F: Future<Output = Result<T, Failure>>>(
        &self,
        question: impl Fn(Client) -> F,
    ) -> Result<T, Failure> {
        let share = self.timeout / u32::try_from(self.members.len()).unwrap_or(u32::MAX);
        let mut last = None;
        for _ in &self.members {
            let (at, client) = {
                let kept = self.kept.lock().await;
                (kept.at, kept.client.clone())
            };
            let Some(member) = self.members.get(at) else { break };
            let asked = async {
                let client = match client {
                    Some(client) => client,
                    None => member.connect().await?,
                };
                question(client.clone()).await.map(|answer| (client, answer))
            };
            let failure = match tokio::time::timeout(share, asked).await {
                Ok(Ok((client, answer))) => {
                    *self.kept.lock().await = Kept { at, client: Some(client) };
                    return Ok(answer);
                }
                Ok(Err(failure)) => failure,
                Err(_) => {
                    let text = format!("etcd at {} does not answer within {share:?}", member.authority);
                    Failure::new(FailureKind::Unavailable, "etcd-silent", text).retryable()
                }
            };
            let mut kept = self.kept.lock().await;
            if kept.at == at {
                *kept = Kept { at: (at + 1) % self.members.len(), client: None };
            }
            last = Some(failure);
        }
        Err(last.unwrap_or_else(|| Failure::new(FailureKind::Internal, "etcd", "there is no member")))
    }
}

impl Member {
    fn parse(endpoint: &str, files: &TlsFiles) -> Result<Self, Failure> {
        let (security, host) = match endpoint.split_once("://") {
            None => (Security::Tls(files.clone()), endpoint),
            Some(("https", host)) => (Security::Tls(files.clone()), host),
            Some(("http", host)) if transport::is_loopback(host) => (Security::Plain, host),
            Some(("http", host)) => return Err(transport::insecure_refused(host)),
            Some((scheme, _)) => {
                let text = format!("{endpoint:?} begins with {scheme}://");
                return Err(Failure::new(FailureKind::InvalidArgument, "etcd", text)
                    .with_remedy("give https://HOST:PORT, HOST:PORT or HOST"));
            }
        };
        let host = host.trim_end_matches('/');
        if host.is_empty() {
            let text = format!("{endpoint:?} names no host");
            return Err(Failure::new(FailureKind::InvalidArgument, "etcd", text));
        }
        Ok(Self { authority: transport::authority_with(host, ETCD_PORT), security })
    }

    async fn connect(&self) -> Result<Client, Failure> {
        let remedy = "check that etcd runs there and no firewall is in between";
        let channel = transport::connect_foreign(self.authority.clone(), &self.security, remedy).await?;
        // A member that is cut off from the others says so instead of waiting for them.
        let options = ConnectOptions::new().with_require_leader(true);
        Client::from_channel(Channel::Tonic(channel), Some(options)).await.map_err(failed)
    }
}

#[async_trait]
impl Arbiter for EtcdArbiter {
    async fn read(&self, guest: GuestId) -> Result<Option<Ownership>, Failure> {
        self.ask(|client| found(client, guest)).await.map(|(_, record)| record)
    }

    async fn swap(&self, guest: GuestId, new: &Ownership) -> Result<(), Failure> {
        let value = encode(new)?;
        self.ask(|client| replace(client, guest, new.term, value.clone())).await
    }

    fn name(&self) -> String {
        let all: Vec<&str> = self.members.iter().map(|member| member.authority.as_str()).collect();
        format!("etcd at {}", all.join(", "))
    }
}

fn key(guest: GuestId) -> String {
    format!("{PREFIX}{guest}")
}

async fn found(mut client: Client, guest: GuestId) -> Result<Found, Failure> {
    // Linearizable: that is etcd's way unless it is told otherwise.
    let reply = client.get(key(guest), None).await.map_err(failed)?;
    let Some(pair) = reply.kvs().first() else { return Ok((0, None)) };
    Ok((pair.mod_revision(), Some(decode(pair.value())?)))
}

async fn replace(mut client: Client, guest: GuestId, term: Term, value: Vec<u8>) -> Result<(), Failure> {
    let (revision, old) = found(client.clone(), guest).await?;
    if old.map_or(Term::NONE, |old| old.term).next() != term {
        return Ok(());
    }
    let same = Compare::mod_revision(key(guest), CompareOp::Equal, revision);
    let put = TxnOp::put(key(guest), value, None);
    client.txn(Txn::new().when([same]).and_then([put])).await.map(drop).map_err(failed)
}

fn encode(record: &Ownership) -> Result<Vec<u8>, Failure> {
    let mut value = format!("understudy-ownership {VERSION} term {}\n", record.term).into_bytes();
    value.extend(record.encode()?);
    Ok(value)
}

fn decode(value: &[u8]) -> Result<Ownership, Failure> {
    let wrong = |text: String| {
        Failure::new(FailureKind::Internal, "etcd-record", text).with_remedy(
            "see who else writes to etcd's keys of understudy; nothing changes hands until this is mended",
        )
    };
    let at = value.iter().position(|byte| *byte == b'\n');
    let (head, record) = value.split_at(at.ok_or_else(|| wrong("the record is none of ours".to_owned()))?);
    let head = String::from_utf8_lossy(head);
    let mut words = head.split(' ');
    let (name, version) = (words.next(), words.next().and_then(|word| word.parse::<u32>().ok()));
    let (word, term) = (words.next(), words.next().and_then(|word| word.parse().ok()));
    match (name, version, word, term) {
        (Some("understudy-ownership"), Some(VERSION), Some("term"), Some(term)) => {
            Ownership::decode(Term(term), &record[1..]).map_err(|error| wrong(error.to_string()))
        }
        (Some("understudy-ownership"), Some(version), ..) if version != VERSION => {
            Err(wrong(format!("the record has version {version}, this build knows {VERSION}")))
        }
        _ => Err(wrong(format!("the record begins with {head:?}"))),
    }
}

fn failed(error: etcd_client::Error) -> Failure {
    Failure::new(FailureKind::Unavailable, "etcd", format!("etcd: {error}")).retryable()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use understudy_proto::ids::Generation;
    use understudy_proto::ownership::Owner;

    use super::*;

    #[test]
    fn a_record_is_read_back_and_another_version_is_not_guessed() {
        let owner = Owner::Solo { owner: "alpha".into() };
        let record = Ownership { term: Term(7), generation: Generation(2), epoch: None, owner };
        let value = encode(&record).unwrap();
        assert!(value.starts_with(b"understudy-ownership 1 term 7\n{"));
        assert_eq!(decode(&value).unwrap(), record);
        let text = String::from_utf8(value).unwrap();
        let newer = decode(text.replace("ownership 1", "ownership 2").as_bytes()).unwrap_err();
        assert!(newer.reason.contains("version 2"), "{newer}");
        for bad in
            ["", "\n", "x", "understudy-ownership 1\n{}", &text.replace("term 7", "term 8"), &text[..40]]
        {
            assert!(decode(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn only_this_machine_is_asked_without_tls() {
        let files = TlsFiles::client(Path::new("/etc/pki"));
        let at = |endpoint: &str| Member::parse(endpoint, &files);
        for (endpoint, authority) in [
            ("w", "w:2379"),
            ("https://w:9/", "w:9"),
            ("[fe80::1]", "[fe80::1]:2379"),
            ("https://[fe80::1]:7", "[fe80::1]:7"),
        ] {
            let member = at(endpoint).unwrap();
            assert_eq!(
                (member.authority.as_str(), member.security),
                (authority, Security::Tls(files.clone()))
            );
        }
        assert_eq!(at("http://127.0.0.1:9").unwrap().security, Security::Plain);
        assert_eq!(at("http://w:2379").unwrap_err().code, "insecure-not-loopback");
        assert!(at("unix:///x").is_err() && at("https://").is_err());
        assert!(EtcdArbiter::new(&[], &files, Duration::ZERO).is_err());
    }
}
