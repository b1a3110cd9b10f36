//! Feature identifiers, log page identifiers and Identify CNS values that this stack uses.

/// Feature: Arbitration.
pub const FEAT_ARBITRATION: u8 = 0x01;
/// Feature: Power Management.
pub const FEAT_POWER_MANAGEMENT: u8 = 0x02;
/// Feature: Temperature Threshold.
pub const FEAT_TEMPERATURE_THRESHOLD: u8 = 0x04;
/// Feature: Error Recovery.
pub const FEAT_ERROR_RECOVERY: u8 = 0x05;
/// Feature: Volatile Write Cache.
pub const FEAT_VOLATILE_WRITE_CACHE: u8 = 0x06;
/// Feature: Number of Queues.
pub const FEAT_NUMBER_OF_QUEUES: u8 = 0x07;
/// Feature: Interrupt Coalescing.
pub const FEAT_INTERRUPT_COALESCING: u8 = 0x08;
/// Feature: Interrupt Vector Configuration.
pub const FEAT_INTERRUPT_VECTOR: u8 = 0x09;
/// Feature: Write Atomicity Normal.
pub const FEAT_WRITE_ATOMICITY: u8 = 0x0a;
/// Feature: Asynchronous Event Configuration.
pub const FEAT_ASYNC_EVENT: u8 = 0x0b;
/// Feature: Timestamp.
pub const FEAT_TIMESTAMP: u8 = 0x0e;

/// Log page: Supported Log Pages.
pub const LOG_SUPPORTED: u8 = 0x00;
/// Log page: Error Information.
pub const LOG_ERROR: u8 = 0x01;
/// Log page: SMART / Health Information.
pub const LOG_SMART: u8 = 0x02;
/// Log page: Firmware Slot Information.
pub const LOG_FIRMWARE: u8 = 0x03;
/// Log page: Commands Supported and Effects.
pub const LOG_EFFECTS: u8 = 0x05;

/// Identify CNS: namespace.
pub const CNS_NAMESPACE: u8 = 0x00;
/// Identify CNS: controller.
pub const CNS_CONTROLLER: u8 = 0x01;
/// Identify CNS: active namespace ID list.
pub const CNS_ACTIVE_NAMESPACES: u8 = 0x02;
/// Identify CNS: namespace identification descriptor list.
pub const CNS_NAMESPACE_DESCRIPTORS: u8 = 0x03;
/// Identify CNS: I/O command set specific namespace.
pub const CNS_CS_NAMESPACE: u8 = 0x05;
/// Identify CNS: I/O command set specific controller.
pub const CNS_CS_CONTROLLER: u8 = 0x06;
