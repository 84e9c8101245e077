//! libvirt's hook: `/etc/libvirt/hooks/qemu.d/50-understudy GUEST OPERATION PHASE EXTRA`, the domain's XML on standard
//! input. It tells the agent of this host and is gone. It prints nothing on standard output, where libvirt would take
//! it for an edited XML.

use std::path::PathBuf;
use std::process::ExitCode;

use understudy_hook::call::HOOK_SOCKET;
use understudy_hook::client::{self, Verdict};

/// libvirt gives a hook no environment of ours; this is for tests.
const RUN_DIR: &str = "UNDERSTUDY_RUN_DIR";

fn main() -> ExitCode {
    let arguments: Vec<String> =
        std::env::args_os().skip(1).take(8).map(|text| text.to_string_lossy().into_owned()).collect();
    let folder = std::env::var_os(RUN_DIR).map_or_else(|| PathBuf::from("/run/understudy"), PathBuf::from);
    match client::run(&arguments, std::io::stdin(), folder.join(HOOK_SOCKET), client::DEADLINE) {
        Verdict::GoOn(None) => ExitCode::SUCCESS,
        Verdict::GoOn(Some(note)) => {
            eprintln!("understudy-hook: {note}");
            ExitCode::SUCCESS
        }
        Verdict::Refuse(reason) => {
            eprintln!("understudy: {reason}");
            ExitCode::FAILURE
        }
    }
}
