//! Ctrl-C and SIGTERM: the first asks a run to stop after its step and checkpoint, the second ends at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};

/// Ends the process, as the shell expects, when what reads its output is gone; printing would panic instead.
pub(crate) fn end_on_closed_pipe() {
    #[cfg(unix)]
    {
        use signal_hook::consts::SIGPIPE;
        let always = Arc::new(AtomicBool::new(true));
        let _ = signal_hook::flag::register_conditional_shutdown(SIGPIPE, 128 + SIGPIPE, always);
    }
}

/// Signals that have arrived.
pub(crate) struct Interrupts {
    flag: Arc<AtomicBool>,
    signal: Arc<AtomicUsize>,
}

impl Interrupts {
    /// Starts to listen. Where the system refuses, signals keep their usual effect.
    pub(crate) fn install() -> Self {
        let (flag, signal) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        for number in [SIGINT, SIGTERM] {
            // In this order the second signal finds the flag set and ends the process.
            let _ = signal_hook::flag::register_conditional_shutdown(number, 128 + number, Arc::clone(&flag));
            let _ = signal_hook::flag::register_usize(number, Arc::clone(&signal), number as usize);
            let _ = signal_hook::flag::register(number, Arc::clone(&flag));
        }
        Self { flag, signal }
    }

    /// Set once a signal has arrived.
    pub(crate) fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.flag)
    }

    /// 130 after Ctrl-C, 143 after SIGTERM.
    pub(crate) fn exit_code(&self) -> u8 {
        match self.signal.load(Ordering::Relaxed) {
            number if number == SIGTERM as usize => 143,
            _ => 130,
        }
    }
}
