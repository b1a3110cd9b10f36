//! What the tests of this crate share.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part of it")]

pub mod ram;
