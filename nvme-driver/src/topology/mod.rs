//! The way between two PCI functions of this machine: where it leads, whether it passes the IOMMU, and so what a peer may do and what
//! takes it back.
//!
//! * [`Topology`]: sysfs, by default the machine's
//! * [`Verdict`]: whether one function's DMA can reach another's memory, which [`Fence`] stops it, and why
//! * `config_space`: port type and Access Control Services as read from config space
//!
//! A request from one function to another is routed by its address. A switch, or a root complex, may route it straight to the other
//! function; only where Access Control Services redirect it upwards does the IOMMU see every request. Where they do not, a function that
//! was told a bus address could use it past the IOMMU: then unmapping is no fence.
mod config_space;

use std::fs;
use std::path::PathBuf;

pub use config_space::{Acs, Port};

use crate::pci::PciAddress;

/// One function on the way from the host bridge down to a device, that device included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    /// Its address.
    pub address: PciAddress,
    /// What it is.
    pub port: Port,
    /// Its Access Control Services.
    pub acs: Acs,
    /// Whether it forwards to a bus behind it.
    pub bridge: bool,
    multifunction: bool,
}

/// A function's way down from its host bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The host bridge, as sysfs calls it: `pci0000:00`.
    pub host_bridge: String,
    /// From the root down, the function last.
    pub hops: Vec<Hop>,
}

/// Where two ways part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meeting {
    /// They are the same function.
    Function,
    /// In the switch with this upstream port.
    Switch(PciAddress),
    /// On the bus right behind this port: two functions of one device.
    Device(PciAddress),
    /// In the root complex, behind one host bridge.
    RootComplex,
    /// Nowhere below the processors: they have different host bridges.
    Nowhere,
}

/// Whether a function's DMA reaches another's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It does.
    Yes,
    /// It depends on the platform: it is tried, and believed when the bytes have arrived.
    Try,
    /// It does not, or nothing would keep it in bounds.
    No,
}

/// What makes a peer's DMA impossible.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Fence {
    /// Unmapping: every request passes the IOMMU.
    #[default]
    Unmap,
    /// Unmapping, and deleting the peer's queue (or resetting it): a request may pass the IOMMU by.
    Queue,
}

/// What is known about the way from a requester to another function's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether the requester's DMA reaches the memory.
    pub answer: Answer,
    /// What stops it.
    pub fence: Fence,
    /// Where the two ways part.
    pub meeting: Meeting,
    /// The requester's way.
    pub requester: Route,
    /// The memory's owner's way.
    pub owner: Route,
    /// Why, in words.
    pub reason: String,
    /// What to do about it, if there is something.
    pub advice: Option<String>,
}

/// The machine's fabric could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    /// No such function.
    #[error("there is no PCI function {0}; `cmbfs devices` lists the NVMe functions of this machine")]
    NoSuchFunction(PciAddress),
    /// sysfs does not look as it should.
    #[error("cannot make out where {address} is: {} names no host bridge", path.display())]
    Strange {
        /// The function.
        address: PciAddress,
        /// Where its folder is.
        path: PathBuf,
    },
}

/// The PCI functions of a machine as sysfs shows them.
#[derive(Clone, Debug)]
pub struct Topology {
    sys: PathBuf,
}

impl Default for Topology {
    fn default() -> Self {
        Self::at("/sys")
    }
}

impl Topology {
    /// As found under `sys`, where sysfs is mounted.
    pub fn at(sys: impl Into<PathBuf>) -> Self {
        Self { sys: sys.into() }
    }

    /// A function's way down from its host bridge.
    pub fn route(&self, address: PciAddress) -> Result<Route, TopologyError> {
        let link = self.sys.join("bus/pci/devices").join(address.to_string());
        let path = fs::canonicalize(&link).map_err(|_| TopologyError::NoSuchFunction(address))?;
        let mut host_bridge = None;
        let mut hops = Vec::new();
        let mut folder = PathBuf::new();
        for part in path.components() {
            folder.push(part);
            let Some(name) = part.as_os_str().to_str() else { continue };
            match (&host_bridge, name.parse::<PciAddress>()) {
                (None, _) if name.starts_with("pci") && name[3..].contains(':') => {
                    host_bridge = Some(name.to_owned());
                }
                (Some(_), Ok(address)) => {
                    let space = fs::read(folder.join("config")).unwrap_or_default();
                    hops.push(Hop {
                        address,
                        port: config_space::port(&space),
                        acs: config_space::acs(&space),
                        bridge: config_space::is_bridge(&space),
                        multifunction: config_space::is_multifunction(&space),
                    });
                }
                _ => {}
            }
        }
        match host_bridge {
            Some(host_bridge) if hops.last().is_some_and(|hop| hop.address == address) => {
                Ok(Route { host_bridge, hops })
            }
            _ => Err(TopologyError::Strange { address, path }),
        }
    }

    /// Whether `requester`'s DMA can reach memory of `owner`.
    pub fn between(&self, requester: PciAddress, owner: PciAddress) -> Result<Verdict, TopologyError> {
        Ok(judge(self.route(requester)?, self.route(owner)?))
    }
}

impl Route {
    /// The hops below the first `shared` ones.
    fn below(&self, shared: usize) -> &[Hop] {
        self.hops.get(shared..).unwrap_or_default()
    }
}

fn meeting(a: &Route, b: &Route, shared: usize) -> Meeting {
    if a.host_bridge != b.host_bridge {
        return Meeting::Nowhere;
    }
    match shared.checked_sub(1).and_then(|last| a.hops.get(last)) {
        None => Meeting::RootComplex,
        Some(_) if shared == a.hops.len() && shared == b.hops.len() => Meeting::Function,
        Some(last) if last.port == Port::Upstream => Meeting::Switch(last.address),
        Some(last) => Meeting::Device(last.address),
    }
}

/// What on the way keeps the IOMMU from seeing every request: the kernel's own rule for IOMMU groups.
fn leak(hops: &[Hop]) -> Option<&Hop> {
    hops.iter().find(|hop| match hop.port {
        Port::Root | Port::Downstream => !hop.acs.redirects(),
        // The only function of its device has nobody to bypass the port above with.
        Port::Endpoint | Port::RootComplex | Port::Upstream => hop.multifunction && !hop.acs.redirects(),
        Port::Bridge | Port::Conventional | Port::Unknown => true,
    })
}

fn judge(requester: Route, owner: Route) -> Verdict {
    let shared = requester.hops.iter().zip(&owner.hops).take_while(|(a, b)| a.address == b.address).count();
    let meeting = meeting(&requester, &owner, shared);
    let apart = || requester.below(shared).iter().chain(owner.below(shared));
    let conventional = requester
        .hops
        .iter()
        .chain(&owner.hops)
        .find(|hop| matches!(hop.port, Port::Bridge | Port::Conventional));
    let leaking = leak(requester.below(shared)).or_else(|| leak(owner.below(shared))).cloned();
    let (answer, why) = match (meeting, conventional) {
        (Meeting::Function, _) => (
            Answer::Yes,
            "a controller decodes its own memory: its requests do not reach the IOMMU".to_owned(),
        ),
        (_, Some(hop)) => {
            let text = format!(
                "{} is {}: behind it functions share one requester id, so the IOMMU cannot tell them apart",
                hop.address, hop.port
            );
            (Answer::No, text)
        }
        (Meeting::Nowhere, _) => {
            let text = format!(
                "they are behind different host bridges ({} and {}), and few platforms forward peer requests between those",
                requester.host_bridge, owner.host_bridge
            );
            (Answer::No, text)
        }
        (Meeting::Switch(upstream), _) => (Answer::Yes, format!("they share the switch at {upstream}")),
        (Meeting::Device(port), _) => {
            (Answer::Try, format!("they are functions of one device behind {port}"))
        }
        (Meeting::RootComplex, _) => {
            let text = format!(
                "they meet in the root complex ({}), and whether that forwards peer requests depends on the platform: it is tried",
                requester.host_bridge
            );
            (Answer::Try, text)
        }
    };
    let fence = if meeting == Meeting::Function || leaking.is_some() { Fence::Queue } else { Fence::Unmap };
    let passes = match (&leaking, meeting) {
        (_, Meeting::Function) => String::new(),
        (None, _) => "; every request passes the IOMMU".to_owned(),
        (Some(hop), _) => {
            format!("; at {} ({}, {}) requests may bypass the IOMMU", hop.address, hop.port, hop.acs)
        }
    };
    let advice = advice(answer, leaking.as_ref(), apart().any(|hop| hop.acs == Acs::Unreadable));
    let reason = why + if answer == Answer::No { "" } else { &passes };
    Verdict { answer, fence, meeting, requester, owner, reason, advice }
}

fn advice(answer: Answer, leaking: Option<&Hop>, unreadable: bool) -> Option<String> {
    if unreadable {
        return Some("run this as root: others are shown the first 64 bytes of config space only".to_owned());
    }
    if answer == Answer::No {
        return Some(
            "put both drives behind one PCI Express switch, or behind root ports of one processor".to_owned(),
        );
    }
    let hop = leaking?;
    Some(match hop.acs {
        Acs::Present { .. } => format!(
            "switch {} on at {} (in the firmware, or with the kernel parameter pci=config_acs=) to have unmapping fence its DMA",
            hop.acs.missing().join(", "),
            hop.address
        ),
        _ => format!(
            "{} cannot redirect (it has no ACS): the peer's queue is deleted when it is revoked; a slot whose port has ACS spares that",
            hop.address
        ),
    })
}

#[cfg(test)]
mod tests;
