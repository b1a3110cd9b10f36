//! Error codes on the wire, and the text that goes with them.

use super::wire::wire_struct;

macro_rules! codes {
    ($($(#[$meta:meta])* $name:ident = $value:literal,)*) => {
        /// What went wrong, as a number that stays the same in every version. The text beside it says to what.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum ErrorCode {
            $($(#[$meta])* $name = $value,)*
        }
        impl ErrorCode {
            /// Every code.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The code behind a number, if there is one.
            pub fn from_u32(value: u32) -> Option<Self> {
                match value {
                    $($value => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

codes! {
    /// The message breaks the protocol; the connection is closed.
    BadMessage = 1,
    /// None of the client's versions is spoken here.
    BadVersion = 2,
    /// A request before hello, or a second hello.
    BadState = 3,
    /// No such open file, mapping or peer on this connection.
    BadHandle = 4,
    /// A value makes no sense here.
    Invalid = 5,
    /// The client's uid may not do this.
    Denied = 6,
    /// More than this server allows one client.
    TooMany = 7,
    /// The server is shutting down.
    ShuttingDown = 8,
    /// No such file or directory.
    NotFound = 16,
    /// It exists already.
    Exists = 17,
    /// A component of the path is no directory.
    NotADirectory = 18,
    /// It is a directory.
    IsADirectory = 19,
    /// The directory is not empty.
    NotEmpty = 20,
    /// The device is full.
    NoSpace = 21,
    /// A name is too long.
    NameTooLong = 22,
    /// The filesystem is read-only; the text says since when and why.
    ReadOnly = 23,
    /// The filesystem is damaged.
    Damaged = 24,
    /// The device failed.
    Device = 25,
    /// The file is too big.
    TooBig = 26,
    /// Bytes that were written and not committed are gone; the text says why.
    DataLost = 27,
    /// The window was revoked and cannot be made resident now.
    NotResident = 32,
    /// A peer's DMA was refused by its IOMMU.
    PeerFault = 33,
    /// The server cannot do this with this device or build.
    Unsupported = 34,
    /// The part of the server that was asked failed; the text says how.
    Internal = 35,
    /// A lease is in the way, and is being recalled: ask again.
    Leased = 36,
    /// The lease is not valid any more: returned, fenced, of another device generation, or its blocks are others by now.
    StaleLease = 37,
    /// The window is moving, for longer than one request waits; the text says what is in the way. Ask again.
    Moving = 38,
}

wire_struct! {
    /// The body of every reply whose header's status is not 0. The text follows it.
    ErrorBody {
        /// The `errno` that says the same, for clients that have to return one.
        errno: u32,
        /// Always 0.
        reserved: u32,
    }
}

/// An error as it crosses the wire: code, errno, text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct WireError {
    /// What went wrong.
    pub code: ErrorCode,
    /// The `errno` closest to it.
    pub errno: u32,
    /// What happened, to what, and what to do.
    pub text: String,
}

impl WireError {
    /// An error with its code's usual errno.
    pub fn new(code: ErrorCode, text: impl Into<String>) -> Self {
        Self { code, errno: code.errno(), text: text.into() }
    }
}

impl ErrorCode {
    /// Whether a window that is asked for may be had later: ask again.
    pub fn passes(self) -> bool {
        matches!(self, Self::NotResident | Self::Leased | Self::Moving)
    }

    /// The `errno` closest to this code.
    pub fn errno(self) -> u32 {
        let errno = match self {
            Self::BadMessage => libc::EPROTO,
            Self::BadVersion => libc::EPROTONOSUPPORT,
            Self::BadState | Self::Invalid => libc::EINVAL,
            Self::BadHandle => libc::EBADF,
            Self::Denied => libc::EACCES,
            Self::TooMany => libc::EMFILE,
            Self::ShuttingDown => libc::ESHUTDOWN,
            Self::NotFound => libc::ENOENT,
            Self::Exists => libc::EEXIST,
            Self::NotADirectory => libc::ENOTDIR,
            Self::IsADirectory => libc::EISDIR,
            Self::NotEmpty => libc::ENOTEMPTY,
            Self::NoSpace => libc::ENOSPC,
            Self::NameTooLong => libc::ENAMETOOLONG,
            Self::ReadOnly => libc::EROFS,
            Self::Damaged => libc::EUCLEAN,
            Self::Device | Self::DataLost | Self::Internal => libc::EIO,
            Self::TooBig => libc::EFBIG,
            Self::NotResident | Self::Leased | Self::Moving => libc::EAGAIN,
            Self::StaleLease => libc::ESTALE,
            Self::PeerFault => libc::EFAULT,
            Self::Unsupported => libc::EOPNOTSUPP,
        };
        errno.unsigned_abs()
    }
}
