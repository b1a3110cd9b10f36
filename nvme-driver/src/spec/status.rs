//! Status codes (Base Specification, "Status Field Definition"; NVM Command Set Specification for SCT 0, 80h and up).
use std::fmt;

/// The 15-bit Status Field of a completion: SC (7:0), SCT (10:8), CRD (12:11), M (13), DNR (14).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Status(u16);

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = ($sct:literal, $sc:literal, $text:literal);)*) => {
        impl Status {
            $($(#[$doc])* #[doc = $text] pub const $name: Status = Status(($sct << 8) | $sc);)*

            /// The specification's name of this status, if it is one we know.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 & 0x7ff {
                    $(x if x == (($sct << 8) | $sc) => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

statuses! {
    SUCCESS = (0, 0x00, "Successful Completion");
    INVALID_OPCODE = (0, 0x01, "Invalid Command Opcode");
    INVALID_FIELD = (0, 0x02, "Invalid Field in Command");
    COMMAND_ID_CONFLICT = (0, 0x03, "Command ID Conflict");
    DATA_TRANSFER_ERROR = (0, 0x04, "Data Transfer Error");
    ABORTED_POWER_LOSS = (0, 0x05, "Commands Aborted due to Power Loss Notification");
    INTERNAL_ERROR = (0, 0x06, "Internal Error");
    ABORT_REQUESTED = (0, 0x07, "Command Abort Requested");
    ABORTED_SQ_DELETION = (0, 0x08, "Command Aborted due to SQ Deletion");
    ABORTED_FAILED_FUSED = (0, 0x09, "Command Aborted due to Failed Fused Command");
    ABORTED_MISSING_FUSED = (0, 0x0a, "Command Aborted due to Missing Fused Command");
    INVALID_NAMESPACE = (0, 0x0b, "Invalid Namespace or Format");
    COMMAND_SEQUENCE_ERROR = (0, 0x0c, "Command Sequence Error");
    INVALID_SGL_SEGMENT = (0, 0x0d, "Invalid SGL Segment Descriptor");
    INVALID_SGL_COUNT = (0, 0x0e, "Invalid Number of SGL Descriptors");
    SGL_LENGTH_INVALID = (0, 0x0f, "Data SGL Length Invalid");
    SGL_TYPE_INVALID = (0, 0x11, "SGL Descriptor Type Invalid");
    INVALID_USE_OF_CMB = (0, 0x12, "Invalid Use of Controller Memory Buffer");
    INVALID_PRP_OFFSET = (0, 0x13, "PRP Offset Invalid");
    OPERATION_DENIED = (0, 0x15, "Operation Denied");
    SANITIZE_IN_PROGRESS = (0, 0x1d, "Sanitize In Progress");
    NAMESPACE_WRITE_PROTECTED = (0, 0x20, "Namespace is Write Protected");
    COMMAND_INTERRUPTED = (0, 0x21, "Command Interrupted");
    TRANSIENT_TRANSPORT_ERROR = (0, 0x22, "Transient Transport Error");
    LBA_OUT_OF_RANGE = (0, 0x80, "LBA Out of Range");
    CAPACITY_EXCEEDED = (0, 0x81, "Capacity Exceeded");
    NAMESPACE_NOT_READY = (0, 0x82, "Namespace Not Ready");
    FORMAT_IN_PROGRESS = (0, 0x84, "Format In Progress");
    INVALID_CQ = (1, 0x00, "Completion Queue Invalid");
    INVALID_QUEUE_ID = (1, 0x01, "Invalid Queue Identifier");
    INVALID_QUEUE_SIZE = (1, 0x02, "Invalid Queue Size");
    ABORT_LIMIT_EXCEEDED = (1, 0x03, "Abort Command Limit Exceeded");
    AER_LIMIT_EXCEEDED = (1, 0x05, "Asynchronous Event Request Limit Exceeded");
    INVALID_INTERRUPT_VECTOR = (1, 0x08, "Invalid Interrupt Vector");
    INVALID_LOG_PAGE = (1, 0x09, "Invalid Log Page");
    INVALID_FORMAT = (1, 0x0a, "Invalid Format");
    INVALID_QUEUE_DELETION = (1, 0x0c, "Invalid Queue Deletion");
    FEATURE_NOT_SAVEABLE = (1, 0x0d, "Feature Identifier Not Saveable");
    FEATURE_NOT_CHANGEABLE = (1, 0x0e, "Feature Not Changeable");
    FEATURE_NOT_NAMESPACE_SPECIFIC = (1, 0x0f, "Feature Not Namespace Specific");
    CONFLICTING_ATTRIBUTES = (1, 0x80, "Conflicting Attributes");
    INVALID_PROTECTION_INFO = (1, 0x81, "Invalid Protection Information");
    READ_ONLY_RANGE = (1, 0x82, "Attempted Write to Read Only Range");
    WRITE_FAULT = (2, 0x80, "Write Fault");
    UNRECOVERED_READ_ERROR = (2, 0x81, "Unrecovered Read Error");
    COMPARE_FAILURE = (2, 0x85, "Compare Failure");
    ACCESS_DENIED = (2, 0x86, "Access Denied");
    DEALLOCATED_BLOCK = (2, 0x87, "Deallocated or Unwritten Logical Block");
}

impl Status {
    /// From the 15-bit Status Field (a completion's upper 16 bits of DW3, without the phase tag).
    pub const fn from_field(field: u16) -> Self {
        Self(field & 0x7fff)
    }

    /// The 15-bit Status Field.
    pub const fn field(self) -> u16 {
        self.0
    }

    /// Status Code.
    pub const fn sc(self) -> u8 {
        self.0 as u8
    }

    /// Status Code Type: 0 generic, 1 command specific, 2 media and data integrity, 3 path, 7 vendor.
    pub const fn sct(self) -> u8 {
        (self.0 >> 8) as u8 & 7
    }

    /// Do Not Retry.
    pub const fn dnr(self) -> bool {
        self.0 & 0x4000 != 0
    }

    /// The same status with Do Not Retry set.
    pub const fn with_dnr(self) -> Self {
        Self(self.0 | 0x4000)
    }

    /// Whether the command succeeded.
    pub const fn is_success(self) -> bool {
        self.0 & 0x7ff == 0
    }

    /// Whether this is `other`, whatever the retry and "more" bits say.
    pub const fn is(self, other: Self) -> bool {
        self.0 & 0x7ff == other.0 & 0x7ff
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name().unwrap_or("unknown status");
        write!(f, "{name} (SCT {:#x}, SC {:#04x}", self.sct(), self.sc())?;
        if self.dnr() {
            write!(f, ", do not retry")?;
        }
        write!(f, ")")
    }
}
