//! The shared-memory protocol: wire format, server and client.
