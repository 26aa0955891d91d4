//! A clock that nobody can set and that never stops.
//!
//! It continues while the process is stopped and while the machine sleeps. A reader then sees how much time has really
//! passed. Run work that has a deadline with [`BootInstant::before`], which reads the clock again each time it is
//! woken.

use std::{
    future::poll_fn,
    ops::{Add, Sub},
    pin::pin,
    task::Poll,
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};

/// A point in time of that clock. It is valid only until the machine restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BootInstant(u64);

impl BootInstant {
    /// Later than every other instant.
    pub const NEVER: Self = Self(u64::MAX);

    /// The current instant.
    #[must_use]
    pub fn now() -> Self {
        Self(nanoseconds())
    }

    /// The time left until `self`. Zero if `self` has passed.
    #[must_use]
    pub fn left(self) -> Duration {
        self - Self::now()
    }

    /// Whether `self` has passed.
    #[must_use]
    pub fn has_passed(self) -> bool {
        Self::now() >= self
    }

    /// This instant on the node's calendar clock as it is now, in whole milliseconds. `None` for [`Self::NEVER`].
    #[must_use]
    pub fn on_calendar(self) -> Option<Timestamp> {
        if self == Self::NEVER {
            return None;
        }
        let (now, today) = (Self::now(), Timestamp::now());
        let ahead = SignedDuration::try_from(self - now).ok()?;
        let behind = SignedDuration::try_from(now - self).ok()?;
        let at = today.checked_add(ahead).ok()?.checked_sub(behind).ok()?;
        Timestamp::from_millisecond(at.as_millisecond()).ok()
    }

    /// The instant this long before `self`.
    #[must_use]
    pub fn back(self, by: Duration) -> Self {
        Self(self.0.saturating_sub(whole(by)))
    }

    /// Runs `work` until this instant. Returns `None` if it had not ended by then. The clock is read before each step
    /// of `work`, so that a process that was stopped midway does nothing late.
    pub async fn before<T>(self, work: impl Future<Output = T>) -> Option<T> {
        let mut work = pin!(work);
        let now = Self::now();
        let mut timer = pin!(tokio::time::sleep(self - now));
        let mut asked = Some(now);
        poll_fn(|context| {
            // The first step follows without a new reading of the clock.
            if asked.take().unwrap_or_else(Self::now) >= self {
                return Poll::Ready(None);
            }
            if let Poll::Ready(done) = work.as_mut().poll(context) {
                return Poll::Ready(Some(done));
            }
            timer.as_mut().poll(context).map(|()| None)
        })
        .await
    }

    pub(super) fn to_bits(self) -> u64 {
        self.0
    }

    pub(super) fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

impl Add<Duration> for BootInstant {
    type Output = Self;

    fn add(self, by: Duration) -> Self {
        Self(self.0.saturating_add(whole(by)))
    }
}

impl Sub for BootInstant {
    type Output = Duration;

    /// The time from `earlier` to `self`. Zero if `earlier` is later.
    fn sub(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

fn whole(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(target_os = "linux")]
fn nanoseconds() -> u64 {
    // Unlike the monotonic clock of `Instant`, this one counts suspended time too.
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    whole(Duration::try_from(now).unwrap_or_default())
}

#[cfg(not(target_os = "linux"))]
fn nanoseconds() -> u64 {
    use std::{sync::OnceLock, time::Instant};
    /// Makes instants before the first reading representable.
    const HEAD_START: Duration = Duration::from_secs(24 * 3600);
    static START: OnceLock<Instant> = OnceLock::new();
    whole(START.get_or_init(Instant::now).elapsed() + HEAD_START)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instants_add_up_and_never_overflow() {
        let now = BootInstant::now();
        let later = now + Duration::from_secs(3);
        assert_eq!((later - now, now - later), (Duration::from_secs(3), Duration::ZERO));
        assert_eq!(later.back(Duration::from_secs(3)), now);
        assert_eq!(now + Duration::MAX, BootInstant::NEVER);
        assert_eq!(now.back(Duration::MAX), BootInstant(0));
        assert_eq!(BootInstant::NEVER.on_calendar(), None);
        for (at, off) in [(now + Duration::from_secs(60), 60), (now.back(Duration::from_secs(1)), -1)] {
            let off = Timestamp::now() + SignedDuration::from_secs(off) - at.on_calendar().expect("a time");
            assert!(off.get_milliseconds().abs() + off.get_seconds().abs() * 1000 < 5000, "{off}");
        }
        assert!(now.has_passed() && !BootInstant::NEVER.has_passed() && BootInstant::now() >= now);
    }

    #[tokio::test]
    async fn work_does_not_start_after_its_deadline() {
        let (past, soon) = (BootInstant::now(), BootInstant::now() + Duration::from_millis(5));
        assert_eq!(past.before(async { 1 }).await, None);
        assert_eq!(soon.before(std::future::pending::<()>()).await, None);
        assert_eq!(BootInstant::NEVER.before(async { 1 }).await, Some(1));
    }
}
