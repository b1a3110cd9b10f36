//! Names of devices: `emu:disk.img?cmb=64M&size=1G`, `emu:ram?size=1G`, `file:/path`, `pci:0000:01:00.0`, `vfio-user:/run/n.sock`.
//!
//! The first `?` ends the path; so a path with a `?` in it cannot be named.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::pci::PciAddress;

/// A device's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceUrl {
    /// `emu:`: an emulated controller in this process.
    Emulated(EmulatedUrl),
    /// `file:`: a file or block device, without a controller and without a CMB.
    File(PathBuf),
    /// `pci:`: a controller bound to vfio-pci.
    Pci(PciAddress),
    /// `vfio-user:`: a controller that another process serves on this socket.
    VfioUser(PathBuf),
}

/// Where an emulated controller keeps its namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EmulatedBacking {
    /// `emu:PATH`: an image; created if it does not exist. (`emu:./ram` is a file named `ram`.)
    Image(PathBuf),
    /// `emu:ram`: in memory.
    Ram,
    /// `emu:null`: nowhere; for measuring.
    Null,
}

/// An emulated controller and its parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmulatedUrl {
    /// Where the namespace's bytes are.
    pub backing: EmulatedBacking,
    /// `size=`: bytes of the namespace. Default: the image's, or 1G for a new one.
    pub size: Option<u64>,
    /// `cmb=`: bytes of Controller Memory Buffer; 0: none. Default: 64M.
    pub cmb: u64,
    /// `pmr=`: bytes of Persistent Memory Region; 0: none. An image's is kept in a file beside it, `IMAGE.pmr`. Default: 0.
    pub pmr: u64,
    /// `lba=`: bytes per logical block, 512 or 4096. Default: 4096.
    pub lba: u32,
    /// `cache=on|off|lossy`: whether writes are volatile until flushed. Default: on.
    pub cache: bool,
    /// `cache=lossy`: a cache that is lost with the process, so that killing it is a power cut (for tests of images).
    pub lossy: bool,
}

/// Size of an image, or of a RAM drive, if the URL does not say.
pub const DEFAULT_SIZE: u64 = 1 << 30;
const DEFAULT_CMB: u64 = 64 << 20;
const DEFAULT_LBA: u32 = 4096;
const FORMS: &str = "emu:IMAGE, emu:ram, file:PATH, pci:DDDD:BB:DD.F, vfio-user:SOCKET (as in `emu:disk.img?cmb=64M&size=1G`)";
const PARAMETERS: &str = "size=BYTES, cmb=BYTES, pmr=BYTES, lba=512|4096, cache=on|off|lossy";

/// A text is no device URL.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// There is no scheme that we know.
    #[error("`{0}` names no device; a device is one of {FORMS}")]
    Scheme(String),
    /// The part behind the scheme is empty or makes no sense.
    #[error("`{url}`: {reason}")]
    Place {
        /// The text.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// A parameter is unknown, repeated, or has an impossible value.
    #[error("`{url}`: parameter `{parameter}`: {reason}")]
    Parameter {
        /// The text.
        url: String,
        /// The parameter.
        parameter: String,
        /// What is wrong, and what is possible.
        reason: String,
    },
}

/// Reads a size in bytes: digits, then nothing or one of K, M, G, T (binary: 1K is 1024).
pub fn parse_size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        b'T' | b't' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Writes a size the way [`parse_size`] reads it, in the largest unit that divides it.
pub fn format_size(bytes: u64) -> String {
    for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
        if bytes != 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}

impl EmulatedUrl {
    /// An emulated controller with the defaults.
    pub fn new(backing: EmulatedBacking) -> Self {
        Self { backing, size: None, cmb: DEFAULT_CMB, pmr: 0, lba: DEFAULT_LBA, cache: true, lossy: false }
    }

    /// Where an image's PMR is kept, whether or not it has one: the image's name and `.pmr`.
    pub fn pmr_file(&self) -> Option<PathBuf> {
        let EmulatedBacking::Image(path) = &self.backing else { return None };
        let mut name = path.clone().into_os_string();
        name.push(".pmr");
        Some(name.into())
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        let size = || parse_size(value).ok_or_else(|| "a size is digits and maybe K, M, G or T".to_owned());
        match name {
            "size" => match size()? {
                0 => return Err("a namespace cannot be empty".to_owned()),
                bytes => self.size = Some(bytes),
            },
            "cmb" => match size()? {
                bytes if bytes % 4096 != 0 => return Err("a CMB is a multiple of 4K (0: none)".to_owned()),
                bytes => self.cmb = bytes,
            },
            "pmr" => match size()? {
                0 => self.pmr = 0,
                bytes if bytes.is_power_of_two() && (4096..=1 << 30).contains(&bytes) => self.pmr = bytes,
                _ => return Err("a PMR is a power of two from 4K to 1G (0: none)".to_owned()),
            },
            "lba" => match size()? {
                512 => self.lba = 512,
                4096 => self.lba = 4096,
                _ => return Err("a block has 512 or 4096 bytes".to_owned()),
            },
            "cache" => match value {
                "on" => self.cache = true,
                "off" => self.cache = false,
                "lossy" => (self.cache, self.lossy) = (true, true),
                _ => return Err("it is on or off or lossy".to_owned()),
            },
            _ => return Err(format!("unknown; valid are {PARAMETERS}")),
        }
        Ok(())
    }
}

impl FromStr for DeviceUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let Some((scheme, rest)) = text.split_once(':') else {
            return Err(UrlError::Scheme(text.to_owned()));
        };
        let (place, query) = rest.split_once('?').map_or((rest, None), |(p, q)| (p, Some(q)));
        let bad_place = |reason: String| UrlError::Place { url: text.to_owned(), reason };
        let path = |what: &str| match place {
            "" => Err(bad_place(format!("the {what} is missing"))),
            _ => Ok(PathBuf::from(place)),
        };
        let mut url = match scheme {
            "emu" => Self::Emulated(EmulatedUrl::new(match place {
                "ram" => EmulatedBacking::Ram,
                "null" => EmulatedBacking::Null,
                _ => EmulatedBacking::Image(path("image (or `ram`)")?),
            })),
            "file" => Self::File(path("path")?),
            "pci" => {
                Self::Pci(place.parse().map_err(|e: crate::pci::BadPciAddress| bad_place(e.to_string()))?)
            }
            "vfio-user" => Self::VfioUser(path("socket")?),
            _ => return Err(UrlError::Scheme(text.to_owned())),
        };
        let mut seen: Vec<&str> = Vec::new();
        for parameter in query.into_iter().flat_map(|q| q.split('&')) {
            let bad = |reason: String| UrlError::Parameter {
                url: text.to_owned(),
                parameter: parameter.to_owned(),
                reason,
            };
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            let Self::Emulated(emulated) = &mut url else {
                return Err(bad(format!("`{scheme}:` takes no parameters")));
            };
            if seen.contains(&name) {
                return Err(bad("given twice".to_owned()));
            }
            seen.push(name);
            emulated.set(name, value).map_err(bad)?;
        }
        Ok(url)
    }
}

impl fmt::Display for DeviceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Pci(address) => write!(f, "pci:{address}"),
            Self::VfioUser(path) => write!(f, "vfio-user:{}", path.display()),
            Self::Emulated(e) => {
                match &e.backing {
                    EmulatedBacking::Image(path) => write!(f, "emu:{}", path.display())?,
                    EmulatedBacking::Ram => f.write_str("emu:ram")?,
                    EmulatedBacking::Null => f.write_str("emu:null")?,
                }
                let parameters = [
                    (e.cmb != DEFAULT_CMB).then(|| format!("cmb={}", format_size(e.cmb))),
                    (e.pmr != 0).then(|| format!("pmr={}", format_size(e.pmr))),
                    e.size.map(|size| format!("size={}", format_size(size))),
                    (e.lba != DEFAULT_LBA).then(|| format!("lba={}", e.lba)),
                    (!e.cache).then(|| "cache=off".to_owned()),
                    e.lossy.then(|| "cache=lossy".to_owned()),
                ];
                for (i, parameter) in parameters.into_iter().flatten().enumerate() {
                    write!(f, "{}{parameter}", if i == 0 { '?' } else { '&' })?;
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_reads_back_as_itself() {
        for text in [
            "emu:disk.img",
            "emu:disk.img?cmb=128M&size=1G",
            "emu:/a b/c:d.img?cmb=0&size=1536M&lba=512&cache=off",
            "emu:disk.img?cache=lossy",
            "emu:disk.img?pmr=16M",
            "emu:ram?size=1000000",
            "emu:null",
            "emu:./ram",
            "file:/dev/nvme0n1",
            "pci:0000:01:00.0",
            "vfio-user:/run/n.sock",
        ] {
            let url: DeviceUrl = text.parse().unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(url.to_string(), text);
            assert_eq!(url.to_string().parse::<DeviceUrl>().unwrap(), url);
        }
        let DeviceUrl::Emulated(e) = "emu:disk.img?cmb=64M&size=1G".parse().unwrap() else { panic!() };
        assert_eq!((e.cmb, e.size, e.lba, e.cache), (64 << 20, Some(1 << 30), 4096, true));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            ("disk.img", "emu:IMAGE"),
            ("nvme:1", "emu:IMAGE"),
            ("", "emu:IMAGE"),
            ("emu:", "missing"),
            ("emu:?size=1G", "missing"),
            ("file:", "missing"),
            ("pci:hello", "hello"),
            ("emu:a?sise=1G", "valid are size="),
            ("emu:a?", "valid are size="),
            ("emu:a?size=1G&size=2G", "twice"),
            ("emu:a?size=0", "empty"),
            ("emu:a?size=-1", "digits"),
            ("emu:a?size=99999999T", "digits"),
            ("emu:a?cmb=1000", "4K"),
            ("emu:a?pmr=3M", "power of two"),
            ("emu:a?pmr=2G", "power of two"),
            ("emu:a?lba=520", "512 or 4096"),
            ("emu:a?cache=maybe", "on or off"),
            ("file:/x?size=1G", "no parameters"),
        ] {
            let error = text.parse::<DeviceUrl>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [("0", 0), ("1", 1), ("4k", 4096), ("64M", 64 << 20), ("3T", 3 << 40)] {
            assert_eq!(parse_size(text), Some(bytes));
        }
        for text in ["", "K", "1KB", "1.5G", "+1", "0x10", "16777216T"] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }
}
