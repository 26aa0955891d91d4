//! How many files and connections this process may have open.
//!
//! Many systems start a service with a limit of about a thousand, although it may ask for more. Each lease can hold a
//! connection to a plane that hangs. It can hold more while its data moves. A node with many slots and no free
//! descriptors can neither keep its leases nor answer on its pages.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::{debug, warn};

/// Most descriptors of one slot: a call of the plane, transfers, and the files that they read and write.
const PER_SLOT: u64 = 8;
/// Most descriptors of the rest of the node: plugins, pages, the outbox, logs.
const BESIDES: u64 = 256;

/// What a node without plugins, with a few connections and a few files, has open. It cannot work with less.
const NEED: u64 = 24;
/// Descriptors of one small plugin.
const PER_PLUGIN: u64 = 8;

/// The limit on open files is too low for the node to work.
#[derive(Debug, thiserror::Error)]
#[error(
    "only {limit} files may be open, the node needs at least {need}; raise the limit (ulimit -n, LimitNOFILE= of a service)"
)]
pub(crate) struct TooFewFiles {
    limit: u64,
    need: u64,
}

/// Raises the limit as [`allow`] does.
///
/// # Errors
/// When the limit stays too low for a node with so many plugins.
pub(crate) fn check(slots: usize, plugins: usize) -> Result<(), TooFewFiles> {
    let (limit, _) = raise(slots);
    let need = u64::try_from(plugins).unwrap_or(u64::MAX).saturating_mul(PER_PLUGIN).saturating_add(NEED);
    if limit < need { Err(TooFewFiles { limit, need }) } else { Ok(()) }
}

/// Raises the limit to what `slots` may need, as far as the system permits.
pub(crate) fn allow(slots: usize) {
    let (limit, wanted) = raise(slots);
    if limit < wanted {
        warn!(event = "descriptors.low", limit, wanted, slots, "RLIMIT_NOFILE is too low for MAX_CONCURRENCY");
    }
}

/// How many files may be open now.
pub(crate) fn limit() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Raises the limit. Returns how many files may be open now, and how many `slots` may need.
fn raise(slots: usize) -> (u64, u64) {
    let wanted = u64::try_from(slots).unwrap_or(u64::MAX).saturating_mul(PER_SLOT).saturating_add(BESIDES);
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // `None` means no limit.
    let (now, most) = (current.unwrap_or(u64::MAX), maximum.unwrap_or(u64::MAX));
    if now >= wanted {
        return (now, wanted);
    }
    let next = wanted.min(most);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: Some(next), maximum });
    let limit = if raised.is_ok() { next } else { now };
    debug!(limit, before = now, "limit of open files changed");
    (limit, wanted)
}
