//! What a writer does while the server has no place for its window. A reader has the bytes sent; a writer has no other way.

use std::time::Duration;

use super::ClientError;
use super::mapped::Mapped;
use crate::protocol::ErrorCode;
use crate::protocol::messages as m;

/// How long a writer asks for a window that there is no room for, before it is told: what passes (a truncation, a full cache, silent
/// clients) has passed by then.
const NO_ROOM: Duration = Duration::from_secs(2);
/// The same for a window that does not end moving: a move waits for a grace and for the drive.
const MOVING: Duration = Duration::from_secs(10);
/// And for one under a layout, whose recall has a deadline of its own.
const LEASED: Duration = Duration::from_secs(60);
/// Each refusal is waited out longer than the one before by this much,
const STEP: Duration = Duration::from_micros(200);
/// and never longer than this.
const LONGEST: Duration = Duration::from_millis(10);

/// A writer's refusals in a row, for one window.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    /// When it first asked.
    since: Option<Duration>,
    times: u32,
}

impl Refusals {
    /// Refused, by what is in the way, after having asked at `asked`: how long to wait before asking again. `None`: long enough.
    fn again(&mut self, what: ErrorCode, asked: Duration, now: Duration) -> Option<Duration> {
        let since = *self.since.get_or_insert(asked);
        self.times = self.times.saturating_add(1);
        let longest = match what {
            ErrorCode::Moving => MOVING,
            ErrorCode::Leased => LEASED,
            _ => NO_ROOM,
        };
        let waited = now.saturating_sub(since);
        (waited < longest).then(|| STEP.saturating_mul(self.times).min(LONGEST))
    }
}

impl Mapped {
    /// Asks for a window to be resident, for a writer who was refused like this so far. An error when that has gone on for too long: by
    /// the clock, and not by the number of refusals, for one may come at once or after all of the server's patience.
    #[cold]
    pub(super) fn fault_to_write(&self, index: usize, refusals: &mut Refusals) -> Result<(), ClientError> {
        let asked = self.clock().now();
        let Some(what) = self.fault(index, m::MAP_WRITE)? else {
            *refusals = Refusals::default();
            return Ok(());
        };
        if let Some(wait) = refusals.again(what, asked, self.clock().now()) {
            self.clock().pause(wait);
            return Ok(());
        }
        // Once more, for there is no room in the ring for what the server has to say.
        let offset = self.window_offset(index);
        match self.fault_in_words(index, m::MAP_WRITE) {
            Err(ClientError::Server(why)) if why.code == ErrorCode::NotResident => {
                Err(ClientError::NoPlace { offset, times: refusals.times, why })
            }
            Err(ClientError::Server(why)) if why.code.passes() => {
                let since = refusals.since.unwrap_or(asked);
                Err(ClientError::HeldUp { offset, waited: self.clock().now().saturating_sub(since), why })
            }
            other => other.map(|()| *refusals = Refusals::default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Refused after `each`, how often and how long a writer asks.
    fn asked(what: ErrorCode, each: Duration) -> (u32, Duration) {
        let (mut refusals, mut now, start) =
            (Refusals::default(), Duration::from_secs(7), Duration::from_secs(7));
        for times in 1..100_000 {
            let asked = now;
            now += each;
            match refusals.again(what, asked, now) {
                Some(wait) => now += wait,
                None => return (times, now - start),
            }
        }
        (u32::MAX, now - start)
    }

    #[test]
    fn the_bound_is_time_and_not_the_number_of_refusals() {
        let (at_once, patient) = (Duration::from_micros(300), Duration::from_secs(5));
        for (what, longest) in
            [(ErrorCode::NotResident, NO_ROOM), (ErrorCode::Moving, MOVING), (ErrorCode::Leased, LEASED)]
        {
            for each in [at_once, patient] {
                let (times, took) = asked(what, each);
                assert!(
                    took >= longest && took < longest + each + LONGEST,
                    "{what:?} {each:?}: {times} in {took:?}"
                );
            }
        }
        // What comes at once is asked for often, what the server waits for seldom.
        assert!(asked(ErrorCode::NotResident, at_once).0 > 200);
        assert_eq!(asked(ErrorCode::Moving, patient).0, 2);
    }
}
