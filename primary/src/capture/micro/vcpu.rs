//! The thread the vCPU runs on. It does one order at a time; a signal brings it out of the guest.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, kvm_regs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::error::MicroError;
use super::state::VcpuState;
use crate::sys::Slots;

/// The first signal may come a moment before KVM_RUN and be lost; then another one is sent.
const KICK_AGAIN: Duration = Duration::from_micros(200);

/// Signals without an effect before it is given up.
const KICKS: u32 = 50_000;

/// Why the guest is not running any more.
#[derive(Debug)]
enum Stopped {
    Kicked,
    Reported(u32),
    Failed(MicroError),
}

enum Order {
    /// Runs until kicked; or until the first report, if wished.
    Run {
        until_report: bool,
    },
    Save(SyncSender<Result<Box<VcpuState>, MicroError>>),
    Load(Box<VcpuState>, SyncSender<Result<(), MicroError>>),
    Registers(SyncSender<Result<kvm_regs, MicroError>>),
}

/// The thread's handle.
#[derive(Debug)]
pub(super) struct Vcpu {
    orders: Option<SyncSender<Order>>,
    stopped: Receiver<Stopped>,
    kick: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    running: bool,
}

impl std::fmt::Debug for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Run { .. } => "Run",
            Self::Save(_) => "Save",
            Self::Load(..) => "Load",
            Self::Registers(_) => "Registers",
        })
    }
}

extern "C" fn ignore(_: std::os::raw::c_int, _: *mut libc::siginfo_t, _: *mut std::os::raw::c_void) {}

impl Vcpu {
    /// Starts the thread; the guest does not run yet. The thread holds the memory for as long as it may run.
    pub(super) fn start(slots: Arc<Slots>, vcpu: VcpuFd, msrs: Vec<u32>) -> Result<Self, MicroError> {
        register_signal_handler(SIGRTMIN(), ignore)
            .map_err(|error| MicroError::system("handle a signal")(std::io::Error::from(error)))?;
        let (orders, inbox) = sync_channel(1);
        let (reports, stopped) = sync_channel(1);
        let kick = Arc::new(AtomicBool::new(false));
        let mut worker = Worker { slots, vcpu, msrs, kick: Arc::clone(&kick), reports };
        let thread = std::thread::Builder::new()
            .name("micro-vcpu".to_owned())
            .spawn(move || worker.work(&inbox))
            .map_err(MicroError::system("start a thread"))?;
        Ok(Self { orders: Some(orders), stopped, kick, thread: Some(thread), running: false })
    }

    /// Whether the guest runs.
    pub(super) fn is_running(&self) -> bool {
        self.running
    }

    pub(super) fn run(&mut self) -> Result<(), MicroError> {
        self.must_be_stopped()?;
        self.order(Order::Run { until_report: false })?;
        self.running = true;
        Ok(())
    }

    /// Runs to the next report of the program; gives the steps it tells (the lower half of them).
    pub(super) fn run_until_report(&mut self) -> Result<u32, MicroError> {
        self.must_be_stopped()?;
        self.order(Order::Run { until_report: true })?;
        match self.stopped.recv() {
            Ok(Stopped::Reported(steps)) => Ok(steps),
            Ok(Stopped::Failed(error)) => Err(error),
            Ok(Stopped::Kicked) => Err(MicroError::WrongState { is: "stopped before it reported" }),
            Err(_) => Err(MicroError::Off),
        }
    }

    /// Stops the guest wherever it is.
    pub(super) fn pause(&mut self) -> Result<(), MicroError> {
        if !self.running {
            return Err(MicroError::WrongState { is: "stopped" });
        }
        self.kick.store(true, Ordering::SeqCst);
        let thread = self.thread.as_ref().ok_or(MicroError::Off)?;
        for _ in 0..KICKS {
            // A thread that has ended says so through the channel.
            let _ = thread.kill(SIGRTMIN());
            match self.stopped.recv_timeout(KICK_AGAIN) {
                Ok(stopped) => {
                    self.running = false;
                    self.kick.store(false, Ordering::SeqCst);
                    return match stopped {
                        Stopped::Kicked => Ok(()),
                        Stopped::Failed(error) => Err(error),
                        Stopped::Reported(_) => Err(MicroError::WrongState { is: "stopped at a report" }),
                    };
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(MicroError::Off),
            }
        }
        Err(MicroError::WrongState { is: "not to be stopped by signals" })
    }

    pub(super) fn save(&self) -> Result<Box<VcpuState>, MicroError> {
        self.ask(Order::Save)
    }

    pub(super) fn load(&self, state: Box<VcpuState>) -> Result<(), MicroError> {
        self.ask(|answer| Order::Load(state, answer))
    }

    pub(super) fn registers(&self) -> Result<kvm_regs, MicroError> {
        self.ask(Order::Registers)
    }

    fn ask<T>(
        &self,
        order: impl FnOnce(SyncSender<Result<T, MicroError>>) -> Order,
    ) -> Result<T, MicroError> {
        self.must_be_stopped()?;
        let (answer, wait) = sync_channel(1);
        self.order(order(answer))?;
        wait.recv().unwrap_or(Err(MicroError::Off))
    }

    fn must_be_stopped(&self) -> Result<(), MicroError> {
        if self.running { Err(MicroError::WrongState { is: "running" }) } else { Ok(()) }
    }

    fn order(&self, order: Order) -> Result<(), MicroError> {
        let orders = self.orders.as_ref().ok_or(MicroError::Off)?;
        orders.send(order).map_err(|_| MicroError::Off)
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        if self.running {
            // Whatever it says, it is over.
            let _ = self.pause();
        }
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Worker {
    slots: Arc<Slots>,
    vcpu: VcpuFd,
    msrs: Vec<u32>,
    kick: Arc<AtomicBool>,
    reports: SyncSender<Stopped>,
}

impl Worker {
    fn work(&mut self, orders: &Receiver<Order>) {
        // Nobody waits for an answer only when the handle is gone, and then the loop ends.
        while let Ok(order) = orders.recv() {
            match order {
                Order::Run { until_report } => {
                    let stopped = self.run(until_report);
                    if self.reports.send(stopped).is_err() {
                        return;
                    }
                }
                Order::Save(answer) => {
                    let state = VcpuState::save(self.slots.vm(), &self.vcpu, &self.msrs);
                    let _ = answer.send(state.map(Box::new));
                }
                Order::Load(state, answer) => {
                    let _ = answer.send(state.load(self.slots.vm(), &self.vcpu));
                }
                Order::Registers(answer) => {
                    let _ = answer.send(self.vcpu.get_regs().map_err(MicroError::kvm("give the registers")));
                }
            }
        }
    }

    fn run(&mut self, until_report: bool) -> Stopped {
        let failed = |exit: String| Stopped::Failed(MicroError::Exit { exit });
        loop {
            if self.kick.load(Ordering::SeqCst) {
                return Stopped::Kicked;
            }
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(_, data)) => {
                    if !until_report {
                        continue;
                    }
                    let mut steps = [0; 4];
                    for (to, from) in steps.iter_mut().zip(data) {
                        *to = *from;
                    }
                    // KVM completes the `out` at the next entry only: without it the state would hold it half done.
                    if let Err(error) = self.complete() {
                        return Stopped::Failed(error);
                    }
                    return Stopped::Reported(u32::from_le_bytes(steps));
                }
                Ok(VcpuExit::Intr) => {}
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                    return failed("its dirty ring is full".to_owned());
                }
                Ok(exit) => return failed(format!("{exit:?}")),
                Err(error) if matches!(error.errno(), EINTR | EAGAIN) => {}
                Err(error) => return Stopped::Failed(MicroError::kvm("run the guest")(error)),
            }
        }
    }

    /// Ends what the last exit has begun, without running the guest.
    fn complete(&mut self) -> Result<(), MicroError> {
        self.vcpu.set_kvm_immediate_exit(1);
        let result = self.vcpu.run().map(drop);
        self.vcpu.set_kvm_immediate_exit(0);
        match result {
            Err(error) if error.errno() != EINTR => Err(MicroError::kvm("complete an output")(error)),
            _ => Ok(()),
        }
    }
}

const EINTR: i32 = rustix::io::Errno::INTR.raw_os_error();
const EAGAIN: i32 = rustix::io::Errno::AGAIN.raw_os_error();
