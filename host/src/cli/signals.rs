//! Signals: the first drains, the second cancels, the third ends the process at once.

use tracing::{info, warn};

use super::Exit;
use crate::engine::StopSignals;

/// Handles signals until the process ends.
///
/// # Errors
/// When the handlers cannot be installed.
pub(super) fn listen(stops: StopSignals) -> std::io::Result<()> {
    let mut signals = Signals::install()?;
    // Runs until the process ends: signals are handled until then.
    tokio::spawn(async move {
        let first = signals.next().await;
        info!(event = "signal.drain", signal = first, "draining; repeat the signal to cancel running tasks");
        stops.drain.cancel();
        let second = signals.next().await;
        warn!(event = "signal.cancel", signal = second, "cancelling running tasks; repeat the signal to exit at once");
        stops.drain.cancel();
        stops.cancel.cancel();
        let third = signals.next().await;
        warn!(event = "signal.exit", signal = third, "exiting at once");
        crate::plugins::exit_process(Exit::Temporary as u8);
        std::process::exit(Exit::Temporary as i32);
    });
    Ok(())
}

/// Waits for TERM or INT. HUP keeps its usual effect.
pub(super) async fn interrupted() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut term) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = term.recv() => return,
                Ok(()) = tokio::signal::ctrl_c() => return,
            }
        }
    }
    // Where a handler cannot be installed, the signal ends the process as usual.
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// For a command with one task: the first signal cancels it, the second ends the process.
///
/// # Errors
/// When the handlers cannot be installed.
pub(super) fn cancel(stops: StopSignals) -> std::io::Result<()> {
    let mut signals = Signals::install()?;
    // Ends with the process.
    tokio::spawn(async move {
        signals.next().await;
        stops.drain.cancel();
        stops.cancel.cancel();
        signals.next().await;
        crate::plugins::exit_process(Exit::Cancelled as u8);
        std::process::exit(Exit::Cancelled as i32);
    });
    Ok(())
}

#[cfg(unix)]
pub(super) struct Signals {
    term: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
    hup: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    pub(super) fn install() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
            hup: signal(SignalKind::hangup())?,
        })
    }

    pub(super) async fn next(&mut self) -> &'static str {
        loop {
            tokio::select! {
                _ = self.term.recv() => return "TERM",
                _ = self.int.recv() => return "INT",
                // The node must continue when its terminal closes.
                _ = self.hup.recv() => warn!(event = "signal.hup", "HUP has no effect in this version; restart the node to reload"),
            }
        }
    }
}

#[cfg(not(unix))]
pub(super) struct Signals;

#[cfg(not(unix))]
impl Signals {
    pub(super) fn install() -> std::io::Result<Self> {
        Ok(Self)
    }

    pub(super) async fn next(&mut self) -> &'static str {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
        "INT"
    }
}
