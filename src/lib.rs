//! cmbfs: files on an NVMe drive as shared memory, straight from its Controller Memory Buffer.
