//! The registers of one controller, with "all ones" read as "gone".

use std::sync::Arc;

use super::ControllerError;
use crate::pci::{PciError, PciFunction};
use crate::spec::regs::{self, Aqa, Cap, Cc, Csts, Version};

#[derive(Clone, Debug)]
pub(crate) struct Registers {
    pub(crate) function: Arc<dyn PciFunction>,
}

impl Registers {
    fn removed(&self) -> ControllerError {
        PciError::Removed(self.function.name().to_owned()).into()
    }

    pub(crate) fn cap(&self) -> Result<Cap, ControllerError> {
        match self.function.read64(0, regs::CAP)? {
            u64::MAX => Err(self.removed()),
            v => Ok(v.into()),
        }
    }

    fn read(&self, offset: u64) -> Result<u32, ControllerError> {
        match self.function.read32(0, offset)? {
            u32::MAX => Err(self.removed()),
            v => Ok(v),
        }
    }

    pub(crate) fn version(&self) -> Result<Version, ControllerError> {
        self.read(regs::VS).map(Version::from)
    }

    pub(crate) fn cc(&self) -> Result<Cc, ControllerError> {
        self.read(regs::CC).map(Cc::from)
    }

    pub(crate) fn set_cc(&self, cc: Cc) -> Result<(), ControllerError> {
        Ok(self.function.write32(0, regs::CC, cc.into())?)
    }

    pub(crate) fn csts(&self) -> Result<Csts, ControllerError> {
        self.read(regs::CSTS).map(Csts::from)
    }

    pub(crate) fn crto(&self) -> Result<u32, ControllerError> {
        self.read(regs::CRTO)
    }

    /// AQA, ASQ and ACQ.
    pub(crate) fn set_admin_queues(&self, aqa: Aqa, asq: u64, acq: u64) -> Result<(), ControllerError> {
        self.function.write32(0, regs::AQA, aqa.into())?;
        self.function.write64(0, regs::ASQ, asq)?;
        Ok(self.function.write64(0, regs::ACQ, acq)?)
    }
}
