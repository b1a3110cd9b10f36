//! The NVM command set.

use nvme_driver::spec::{Command, Status};

use crate::host::{Host, data, pattern};

/// NVM "Read command", "Write command": what was written is read, at every size up to MDTS.
#[test]
fn what_was_written_is_read() {
    let mut h = Host::with_queue();
    for (slba, blocks) in [(0, 1), (7, 8), (100, 16), (1000, 17), (2000, 256), (5000, 1024)] {
        let bytes = pattern(slba, blocks * 512);
        h.write_blocks(slba, &bytes, 512);
        assert_eq!(h.read_blocks(slba, blocks as u32, 512), bytes, "{blocks} blocks at {slba}");
    }
}

/// Base "Status: Generic Command Status": LBA Out of Range.
#[test]
fn blocks_beyond_the_end_are_refused() {
    let mut h = Host::with_queue();
    let end = (4 << 20) / 512;
    let at = h.pages(2);
    for op in [0x01, 0x02, 0x05, 0x08, 0x0c] {
        for (slba, blocks) in [(end, 1), (end - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 2), (1 << 63, 1)] {
            let cmd = data(Command::new(op, 1).with_blocks(slba, blocks), at, &mut h, 1024);
            h.fails(1, cmd, Status::LBA_OUT_OF_RANGE);
        }
        let cmd = data(Command::new(op, 1).with_blocks(end - 1, 1), at, &mut h, 512);
        h.ok(1, cmd);
    }
}
