//! What a monitor command costs: `monitor_cost URI DOMAIN [COUNT]` through libvirt, `monitor_cost SOCKET [COUNT]` straight.
#![allow(clippy::print_stdout, reason = "it is what it is for")]

use std::time::{Duration, Instant};

use understudy_libvirt::{Connection, Monitor, SocketMonitor, qmp};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (monitor, count): (Box<dyn Monitor>, _) = match arguments.as_slice() {
        [path, rest @ ..] if path.starts_with('/') => {
            (Box::new(SocketMonitor::connect(path)?.0), rest.first())
        }
        [uri, domain, rest @ ..] => (Box::new(Connection::open(uri)?.find_domain(domain)?), rest.first()),
        _ => return Err("usage: monitor_cost URI DOMAIN [COUNT] | monitor_cost SOCKET [COUNT]".into()),
    };
    let count: usize = count.map_or(Ok(2000), |count| count.parse())?;
    let mut times = Vec::with_capacity(count);
    for _ in 0..count.max(1) {
        let start = Instant::now();
        qmp::query_status(monitor.as_ref())?;
        times.push(start.elapsed());
    }
    times.sort_unstable();
    let at = |percent: usize| times.get(times.len() * percent / 100).copied().unwrap_or(Duration::ZERO);
    println!("query-status: n {} median {:?} p90 {:?} p99 {:?}", times.len(), at(50), at(90), at(99));
    Ok(())
}
