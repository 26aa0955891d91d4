//! How many files and connections this process may have open.
//!
//! Many systems start a service with room for about a thousand, though it may ask for more. Each lease can
//! hold a connection to a plane that hangs, and more while its data moves: a node of many slots that is out
//! of them can neither keep its leases nor answer on its pages.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::{debug, warn};

/// What one slot may hold at once: a call of the plane, transfers, the files they come from and go to.
const PER_SLOT: u64 = 8;
/// What the rest of the node may: plugins, pages, the outbox, logs.
const BESIDES: u64 = 256;

/// Allows as many as `slots` may need, as far as the system lets; with how many it lets.
pub(crate) fn allow(slots: usize) -> u64 {
    let wanted = u64::try_from(slots).unwrap_or(u64::MAX).saturating_mul(PER_SLOT).saturating_add(BESIDES);
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // No number is no limit.
    let (now, most) = (current.unwrap_or(u64::MAX), maximum.unwrap_or(u64::MAX));
    if now >= wanted {
        return now;
    }
    let next = wanted.min(most);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: Some(next), maximum });
    let limit = if raised.is_ok() { next } else { now };
    if limit < wanted {
        warn!(limit, wanted, slots, "fewer files may be open than so many slots may need");
    } else {
        debug!(limit, before = now, "more files may be open now");
    }
    limit
}
