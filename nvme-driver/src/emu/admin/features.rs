//! Get Features and Set Features (Base Specification, "Set Features command").

use super::super::bus::Bus;
use super::super::data::Direction;
use super::super::state::{Fixed, State};
use super::Event;
use crate::spec::features as f;
use crate::spec::{Command, Status};

/// Set Features: the value is to survive power-off.
const SAVE: u32 = 1 << 31;

/// Feature values that are plain dwords, by feature identifier.
#[derive(Clone, Copy, Debug)]
struct Values {
    arbitration: u32,
    power: u32,
    over_temperature: u32,
    under_temperature: u32,
    error_recovery: u32,
    write_cache: u32,
    coalescing: u32,
    atomicity: u32,
    events: u32,
}

impl Values {
    fn defaults(fixed: &Fixed) -> Self {
        Self {
            // Burst: no limit.
            arbitration: 7,
            power: 0,
            over_temperature: 343,
            under_temperature: 0,
            error_recovery: 0,
            write_cache: u32::from(fixed.volatile_cache),
            coalescing: 0,
            atomicity: 0,
            events: 0,
        }
    }
}

/// Features of the controller.
#[derive(Debug)]
pub(super) struct Features {
    values: Values,
    defaults: Values,
    /// Interrupt Vector Configuration: vectors with coalescing disabled.
    coalescing_disabled: Vec<bool>,
    /// Timestamp: what the host set, and when, both in milliseconds; `None`: never set.
    timestamp: Option<(u64, u64)>,
    /// When the controller was reset, in milliseconds: the timestamp counts from there until it is set.
    reset_at: u64,
}

/// The wall clock in milliseconds.
fn now_ms(fixed: &Fixed) -> u64 {
    (fixed.clock)() / 1_000_000
}

impl Features {
    pub(super) fn new(fixed: &Fixed) -> Self {
        let defaults = Values::defaults(fixed);
        let coalescing_disabled = vec![false; usize::from(fixed.io_queues) + 1];
        Self { values: defaults, defaults, coalescing_disabled, timestamp: None, reset_at: now_ms(fixed) }
    }

    pub(super) fn reset(&mut self, fixed: &Fixed) {
        *self = Self::new(fixed);
    }

    pub(super) fn arbitration_burst(&self) -> u32 {
        match self.values.arbitration & 7 {
            7 => u32::MAX,
            n => 1 << n,
        }
    }

    /// Asynchronous Event Configuration: whether the host wants to hear of this.
    pub(super) fn wants(&self, event: Event) -> bool {
        match (event.kind, event.info) {
            (0, _) => true,
            (1, 0) => self.values.events & 1 != 0,
            (1, 1) => self.values.events & 2 != 0,
            (1, _) => self.values.events & 4 != 0,
            (2, info) => self.values.events & (1u32 << 8).wrapping_shl(u32::from(info)) != 0,
            _ => false,
        }
    }
}

impl State {
    pub(super) fn get_features(&mut self, bus: &Bus<'_>, cmd: &Command) -> Result<u32, Status> {
        let (fid, select) = (cmd.cdw10 as u8, cmd.cdw10 >> 8 & 7);
        let values = match select {
            0 => self.admin.features.values,
            // Nothing is saveable, so the saved value is the default.
            1 | 2 => self.admin.features.defaults,
            3 => return capabilities(fid, self.fixed.volatile_cache),
            _ => return Err(Status::INVALID_FIELD),
        };
        match fid {
            f::FEAT_ARBITRATION => Ok(values.arbitration),
            f::FEAT_POWER_MANAGEMENT => Ok(values.power),
            f::FEAT_TEMPERATURE_THRESHOLD => temperature(values, cmd.cdw11),
            f::FEAT_ERROR_RECOVERY => Ok(values.error_recovery),
            f::FEAT_VOLATILE_WRITE_CACHE if self.fixed.volatile_cache => Ok(values.write_cache),
            f::FEAT_NUMBER_OF_QUEUES => Ok(self.number_of_queues()),
            f::FEAT_INTERRUPT_COALESCING => Ok(values.coalescing),
            f::FEAT_INTERRUPT_VECTOR => {
                let vector = cmd.cdw11 as u16;
                let list = &self.admin.features.coalescing_disabled;
                let off = *list.get(usize::from(vector)).ok_or(Status::INVALID_FIELD)?;
                // The admin queue's vector is never coalesced.
                Ok(u32::from(vector) | u32::from(off || vector == 0) << 16)
            }
            f::FEAT_WRITE_ATOMICITY => Ok(values.atomicity),
            f::FEAT_ASYNC_EVENT => Ok(values.events),
            f::FEAT_TIMESTAMP => {
                let data = self.timestamp();
                self.reply(bus, cmd, &data)
            }
            _ => Err(Status::INVALID_FIELD),
        }
    }

    /// Both counts, 0's based.
    fn number_of_queues(&self) -> u32 {
        let n = u32::from(self.fixed.io_queues - 1);
        n | n << 16
    }

    /// The Timestamp data structure.
    fn timestamp(&self) -> [u8; 8] {
        let now = now_ms(&self.fixed);
        let (value, origin) = match self.admin.features.timestamp {
            Some((set, at)) => (set.wrapping_add(now.saturating_sub(at)), 1),
            None => (now.saturating_sub(self.admin.features.reset_at), 0),
        };
        let mut data = (value & 0xffff_ffff_ffff).to_le_bytes();
        data[6] = origin << 1;
        data
    }

    pub(super) fn set_features(&mut self, bus: &Bus<'_>, cmd: &Command) -> Result<u32, Status> {
        let (fid, value) = (cmd.cdw10 as u8, cmd.cdw11);
        capabilities(fid, self.fixed.volatile_cache)?;
        if cmd.cdw10 & SAVE != 0 {
            return Err(Status::FEATURE_NOT_SAVEABLE);
        }
        // None of these belongs to a namespace.
        if !matches!(cmd.nsid, 0 | 0xffff_ffff) {
            return Err(Status::FEATURE_NOT_NAMESPACE_SPECIFIC);
        }
        let values = &mut self.admin.features.values;
        match fid {
            f::FEAT_ARBITRATION => values.arbitration = value & 0xffff_ff07,
            f::FEAT_POWER_MANAGEMENT => {
                // NPSS is 0: power state 0 is the only one.
                if value & 0x1f != 0 {
                    return Err(Status::INVALID_FIELD);
                }
                values.power = value & 0xff;
            }
            f::FEAT_TEMPERATURE_THRESHOLD => self.set_temperature(value)?,
            f::FEAT_ERROR_RECOVERY => {
                // DULBE: the namespace does not support it.
                if value & (1 << 16) != 0 {
                    return Err(Status::INVALID_FIELD);
                }
                values.error_recovery = value & 0xffff;
            }
            f::FEAT_VOLATILE_WRITE_CACHE => self.set_write_cache(value & 1 == 1)?,
            f::FEAT_NUMBER_OF_QUEUES => {
                if self.admin.queues_created {
                    return Err(Status::COMMAND_SEQUENCE_ERROR);
                }
                if value & 0xffff == 0xffff || value >> 16 == 0xffff {
                    return Err(Status::INVALID_FIELD);
                }
                return Ok(self.number_of_queues());
            }
            f::FEAT_INTERRUPT_COALESCING => values.coalescing = value & 0xffff,
            f::FEAT_INTERRUPT_VECTOR => {
                let list = &mut self.admin.features.coalescing_disabled;
                let slot = list.get_mut((value & 0xffff) as usize).ok_or(Status::INVALID_FIELD)?;
                *slot = value & (1 << 16) != 0;
            }
            f::FEAT_WRITE_ATOMICITY => values.atomicity = value & 1,
            f::FEAT_ASYNC_EVENT => values.events = value & 0x1ff,
            f::FEAT_TIMESTAMP => {
                let mut data = [0; 8];
                self.pointers.locate(bus, cmd, 8, Direction::Out)?;
                self.gather(bus, &mut data)?;
                let ms = u64::from_le_bytes(data) & 0xffff_ffff_ffff;
                self.admin.features.timestamp = Some((ms, now_ms(&self.fixed)));
            }
            _ => return Err(Status::INVALID_FIELD),
        }
        Ok(0)
    }

    fn set_write_cache(&mut self, on: bool) -> Result<(), Status> {
        if !on {
            self.namespace.flush().map_err(|_| Status::WRITE_FAULT)?;
        }
        if let Some(cache) = &mut self.namespace.cache {
            cache.set_enabled(on);
        }
        self.admin.features.values.write_cache = u32::from(on);
        Ok(())
    }

    /// TMPTH, TMPSEL, THSEL. Beyond the threshold the host hears of it.
    fn set_temperature(&mut self, value: u32) -> Result<(), Status> {
        let values = &mut self.admin.features.values;
        match (value >> 16 & 0xf, value >> 20 & 3) {
            // The composite temperature, or all sensors: there is no other.
            (0 | 0xf, 0) => values.over_temperature = value & 0xffff,
            (0 | 0xf, 1) => values.under_temperature = value & 0xffff,
            _ => return Err(Status::INVALID_FIELD),
        }
        if self.temperature_is_critical() {
            self.admin.raise(Event::TEMPERATURE);
        }
        Ok(())
    }

    /// See [`Faults::set_temperature`](super::super::Faults::set_temperature).
    pub(in super::super) fn become_hot(&mut self, kelvin: u16) {
        self.admin.temperature = super::logs::Kelvin(kelvin);
        if self.temperature_is_critical() {
            self.admin.raise(Event::TEMPERATURE);
        }
    }

    /// SMART critical warning bit 1: the temperature is at or beyond a threshold.
    pub(super) fn temperature_is_critical(&self) -> bool {
        let values = &self.admin.features.values;
        let t = u32::from(self.admin.temperature.0);
        t >= values.over_temperature || t <= values.under_temperature
    }
}

fn temperature(values: Values, cdw11: u32) -> Result<u32, Status> {
    match (cdw11 >> 16 & 0xf, cdw11 >> 20 & 3) {
        (0, 0) => Ok(values.over_temperature),
        (0, 1) => Ok(values.under_temperature),
        _ => Err(Status::INVALID_FIELD),
    }
}

/// Supported Capabilities (select 3): bit 2 changeable. An unknown feature is refused.
fn capabilities(fid: u8, volatile_cache: bool) -> Result<u32, Status> {
    match fid {
        f::FEAT_VOLATILE_WRITE_CACHE if !volatile_cache => Err(Status::INVALID_FIELD),
        f::FEAT_ARBITRATION
        | f::FEAT_POWER_MANAGEMENT
        | f::FEAT_TEMPERATURE_THRESHOLD
        | f::FEAT_ERROR_RECOVERY
        | f::FEAT_VOLATILE_WRITE_CACHE
        | f::FEAT_NUMBER_OF_QUEUES
        | f::FEAT_INTERRUPT_COALESCING
        | f::FEAT_INTERRUPT_VECTOR
        | f::FEAT_WRITE_ATOMICITY
        | f::FEAT_ASYNC_EVENT
        | f::FEAT_TIMESTAMP => Ok(1 << 2),
        _ => Err(Status::INVALID_FIELD),
    }
}
