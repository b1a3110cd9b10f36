//! Fixed-size little-endian values.
//!
//! [`wire_struct!`](crate::protocol::wire) defines a struct, its size and both directions from one list of fields, so that they
//! cannot drift apart. Fields are listed largest alignment first or padded by name: the C structs then have no hidden padding.

/// A value with one fixed-size little-endian encoding.
pub trait Wire: Sized {
    /// Encoded size in bytes.
    const SIZE: usize;
    /// Appends the encoding to `out`.
    fn put(&self, out: &mut Vec<u8>);
    /// Decodes from the front of `from`, and returns what is left of it; `None` when it is too short.
    fn take(from: &[u8]) -> Option<(Self, &[u8])>;

    /// The encoding alone.
    fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::SIZE);
        self.put(&mut out);
        out
    }

    /// Decodes a slice that must be exactly as long as the encoding.
    fn from_bytes(from: &[u8]) -> Option<Self> {
        let (value, rest) = Self::take(from)?;
        rest.is_empty().then_some(value)
    }
}

macro_rules! wire_int {
    ($($t:ty),*) => {$(
        impl Wire for $t {
            const SIZE: usize = size_of::<$t>();
            fn put(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
            fn take(from: &[u8]) -> Option<(Self, &[u8])> {
                let (bytes, rest) = from.split_first_chunk()?;
                Some((<$t>::from_le_bytes(*bytes), rest))
            }
        }
    )*};
}
wire_int!(u8, u16, u32, u64, i64);

impl<const N: usize> Wire for [u8; N] {
    const SIZE: usize = N;
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self);
    }
    fn take(from: &[u8]) -> Option<(Self, &[u8])> {
        let (bytes, rest) = from.split_first_chunk()?;
        Some((*bytes, rest))
    }
}

/// Defines a fixed-size struct and its encoding.
macro_rules! wire_struct {
    ($(#[$meta:meta])* $name:ident { $($(#[$fmeta:meta])* $field:ident: $t:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name {
            $($(#[$fmeta])* pub $field: $t,)*
        }
        impl $crate::protocol::wire::Wire for $name {
            const SIZE: usize = 0 $(+ <$t as $crate::protocol::wire::Wire>::SIZE)*;
            #[allow(unused_variables, reason = "a struct without fields")]
            fn put(&self, out: &mut Vec<u8>) {
                $($crate::protocol::wire::Wire::put(&self.$field, out);)*
            }
            fn take(from: &[u8]) -> Option<(Self, &[u8])> {
                $(let ($field, from) = <$t as $crate::protocol::wire::Wire>::take(from)?;)*
                Some((Self { $($field,)* }, from))
            }
        }
    };
}
pub(crate) use wire_struct;
