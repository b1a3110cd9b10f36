//! A tiny extent filesystem with leases: blocks, names, layouts. It knows nothing of memory windows.
