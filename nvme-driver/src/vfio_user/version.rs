//! The first message: version and capabilities (spec, "VFIO_USER_VERSION").

use rustix::io::Errno;
use serde_json::{Value, json};

use super::protocol::{Fields, MAX_DATA, MAX_FDS, Put};

/// Major version 0 is the only one there is.
const MAJOR: u16 = 0;
const MINOR: u16 = 1;
/// DMA regions a client may have at once.
pub(super) const MAX_DMA_MAPS: usize = 65535;

/// What was agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Agreed {
    /// The client knows REGION_WRITE_MULTI.
    pub(super) write_multi: bool,
}

/// Reads the client's proposal, gives back the reply's body. Version data is optional, and so is its terminating NUL.
pub(super) fn negotiate(body: &[u8]) -> Result<(Agreed, Vec<u8>), Errno> {
    let mut fields = Fields(body);
    let (major, minor) = (fields.u16()?, fields.u16()?);
    if major != MAJOR {
        return Err(Errno::NOTSUP);
    }
    let text = fields.0.split(|b| *b == 0).next().unwrap_or_default();
    let proposal = match text {
        [] => Value::Null,
        text => serde_json::from_slice(text).map_err(|_| Errno::INVAL)?,
    };
    let write_multi = proposal["capabilities"]["write_multiple"] == Value::Bool(true);
    let mut capabilities = json!({
        "max_msg_fds": MAX_FDS,
        "max_data_xfer_size": MAX_DATA,
        "max_dma_maps": MAX_DMA_MAPS,
        "pgsizes": 4096,
    });
    if write_multi {
        capabilities["write_multiple"] = Value::Bool(true);
    }
    let mut reply = Vec::new();
    reply.put_u16(MAJOR);
    reply.put_u16(minor.min(MINOR));
    reply.extend_from_slice(json!({ "capabilities": capabilities }).to_string().as_bytes());
    reply.push(0);
    Ok((Agreed { write_multi }, reply))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply_json(body: &[u8]) -> Value {
        let (_, reply) = negotiate(body).unwrap();
        assert_eq!(reply.last(), Some(&0));
        serde_json::from_slice(&reply[4..reply.len() - 1]).unwrap()
    }

    #[test]
    fn version_data_is_optional() {
        for body in [&[0, 0, 0, 0][..], &[0, 0, 9, 0, 0], b"\0\0\x01\0{}\0", b"\0\0\x01\0{}"] {
            assert_eq!(reply_json(body)["capabilities"]["max_data_xfer_size"], MAX_DATA);
        }
        let (_, reply) = negotiate(&[0, 0, 0, 0]).unwrap();
        assert_eq!(&reply[..4], [0, 0, 0, 0], "the minor version is at most the client's");
    }

    #[test]
    fn write_multi_only_if_offered() {
        let offered = b"\0\0\0\0{\"capabilities\":{\"write_multiple\":true}}\0";
        assert!(negotiate(offered).unwrap().0.write_multi);
        assert_eq!(reply_json(offered)["capabilities"]["write_multiple"], true);
        assert!(reply_json(b"\0\0\0\0{}\0")["capabilities"].get("write_multiple").is_none());
    }

    #[test]
    fn nonsense_is_an_error() {
        for body in [&b""[..], b"\0\0\0", b"\x01\0\0\0", b"\0\0\0\0{", b"\0\0\0\0\xff\0", b"\0\0\0\0[[[[\0"] {
            assert!(negotiate(body).is_err(), "{body:?}");
        }
        let deep = [b"\0\0\0\0".to_vec(), vec![b'['; 100_000]].concat();
        assert!(negotiate(&deep).is_err());
    }
}
