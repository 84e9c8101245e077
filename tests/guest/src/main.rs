//! The program a lab guest runs as PID 1.
//!
//! It counts in memory on every vCPU, rewrites a working set whose every page says which round it belongs
//! to, and answers one request per line over TCP. What it says lets a test tell a guest that went on from
//! one that was started again, and a memory image that is one moment from one that is a mixture.
//!
//! ```text
//! request            answer
//! count              ok count=N boot=ID ticks=A,B ms=UPTIME
//! id                 ok name=g1 boot=ID vcpus=2 kernel=6.1.0-...
//! dirty PAGES MS     ok            rewrite PAGES whole pages every MS milliseconds (0 pages: stop)
//! touch PAGES MS     ok            the same with one word a page
//! load               ok pages=N every_ms=N round=N round_us=N errors=N
//! check              ok round=N pages=N errors=0 | bad round=N pages=N errors=N first=...
//! bulk BLOCKS SEED   BLOCKS blocks of 4096 bytes (bulk.rs), then ok hash=N
//! flood ADDR COUNT   ok sent=N     N datagrams of 1400 bytes have been sent to ADDR, as fast as possible
//! reboot, poweroff   ok
//! ```

mod bulk;
mod counter;
mod load;
mod power;
mod serve;

use std::sync::Arc;
use std::time::Duration;

use crate::counter::Counter;
use crate::load::Load;

/// Where the requests are answered.
const PORT: u16 = 7000;

fn main() -> ! {
    let counter = Arc::new(Counter::start());
    let load = Load::start();
    power::watch_button();
    {
        let (counter, load) = (Arc::clone(&counter), Arc::clone(&load));
        std::thread::spawn(move || serve::listen(PORT, &counter, &load));
    }
    match understudy_responder::start(understudy_responder::PORT) {
        Ok(started) => {
            if let Some(error) = started.without_frames {
                println!("GUEST answers no frames: {error}");
            }
        }
        Err(error) => println!("GUEST cannot answer `understudy verify`: {error}"),
    }
    println!("GUEST UP name={} boot={} vcpus={}", serve::guest_name(), counter::boot_id(), counter.vcpus());
    for tick in 1_u64.. {
        std::thread::sleep(Duration::from_secs(1));
        println!("tick {tick} count={}", counter.total());
    }
    // PID 1 never returns: the kernel would panic.
    loop {
        std::thread::park();
    }
}
