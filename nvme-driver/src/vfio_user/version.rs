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
    /// Most bytes of data that the client takes in one message.
    pub(super) max_data: usize,
    /// The client takes our commands on a socket of their own.
    pub(super) twin_socket: bool,
}

/// Reads the client's proposal, gives back the reply's body. Version data is optional, and so is its terminating NUL. `calls`: we may
/// send commands of our own; then a twin socket that was agreed on is the first descriptor to go with the reply.
pub(super) fn negotiate(body: &[u8], calls: bool) -> Result<(Agreed, Vec<u8>), Errno> {
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
    let proposed = &proposal["capabilities"];
    let write_multi = proposed["write_multiple"] == Value::Bool(true);
    let twin_socket = calls && proposed["twin_socket"]["supported"] == Value::Bool(true);
    let max_data = proposed["max_data_xfer_size"].as_u64().and_then(|n| usize::try_from(n).ok());
    let mut capabilities = json!({
        "max_msg_fds": MAX_FDS,
        "max_data_xfer_size": MAX_DATA,
        "max_dma_maps": MAX_DMA_MAPS,
        "pgsizes": 4096,
    });
    if write_multi {
        capabilities["write_multiple"] = Value::Bool(true);
    }
    if twin_socket {
        capabilities["twin_socket"] = json!({ "supported": true, "fd_index": 0 });
    }
    let mut reply = Vec::new();
    reply.put_u16(MAJOR);
    reply.put_u16(minor.min(MINOR));
    reply.extend_from_slice(json!({ "capabilities": capabilities }).to_string().as_bytes());
    reply.push(0);
    let max_data = max_data.unwrap_or(MAX_DATA).clamp(1, MAX_DATA);
    Ok((Agreed { write_multi, max_data, twin_socket }, reply))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply_json(body: &[u8]) -> Value {
        let (_, reply) = negotiate(body, true).unwrap();
        assert_eq!(reply.last(), Some(&0));
        serde_json::from_slice(&reply[4..reply.len() - 1]).unwrap()
    }

    #[test]
    fn version_data_is_optional() {
        for body in [&[0, 0, 0, 0][..], &[0, 0, 9, 0, 0], b"\0\0\x01\0{}\0", b"\0\0\x01\0{}"] {
            assert_eq!(reply_json(body)["capabilities"]["max_data_xfer_size"], MAX_DATA);
        }
        let (_, reply) = negotiate(&[0, 0, 0, 0], true).unwrap();
        assert_eq!(&reply[..4], [0, 0, 0, 0], "the minor version is at most the client's");
    }

    #[test]
    fn write_multi_only_if_offered() {
        let offered = b"\0\0\0\0{\"capabilities\":{\"write_multiple\":true}}\0";
        assert!(negotiate(offered, true).unwrap().0.write_multi);
        assert_eq!(reply_json(offered)["capabilities"]["write_multiple"], true);
        assert!(reply_json(b"\0\0\0\0{}\0")["capabilities"].get("write_multiple").is_none());
    }

    #[test]
    fn a_twin_socket_only_if_both_want_it() {
        let wanted = b"\0\0\0\0{\"capabilities\":{\"twin_socket\":{\"supported\":true}}}\0";
        assert!(negotiate(wanted, true).unwrap().0.twin_socket);
        assert_eq!(reply_json(wanted)["capabilities"]["twin_socket"]["fd_index"], 0);
        assert!(!negotiate(wanted, false).unwrap().0.twin_socket);
        for other in [
            &b"\0\0\0\0{}\0"[..],
            b"\0\0\0\0{\"capabilities\":{\"twin_socket\":true}}",
            b"\0\0\0\0{\"capabilities\":{\"twin_socket\":{\"supported\":false}}}",
        ] {
            assert!(reply_json(other)["capabilities"].get("twin_socket").is_none());
        }
    }

    #[test]
    fn the_clients_limit_is_kept_and_bounded() {
        let limit = |text: &str| {
            let body = format!("\0\0\0\0{{\"capabilities\":{{\"max_data_xfer_size\":{text}}}}}");
            negotiate(body.as_bytes(), true).unwrap().0.max_data
        };
        assert_eq!(limit("4096"), 4096);
        assert_eq!(
            [limit("0"), limit("-1"), limit("null"), limit("1e30")],
            [1, MAX_DATA, MAX_DATA, MAX_DATA]
        );
        assert_eq!(limit("18446744073709551615"), MAX_DATA);
    }

    #[test]
    fn nonsense_is_an_error() {
        for body in [&b""[..], b"\0\0\0", b"\x01\0\0\0", b"\0\0\0\0{", b"\0\0\0\0\xff\0", b"\0\0\0\0[[[[\0"] {
            assert!(negotiate(body, true).is_err(), "{body:?}");
        }
        let deep = [b"\0\0\0\0".to_vec(), vec![b'['; 100_000]].concat();
        assert!(negotiate(&deep, true).is_err());
    }
}
