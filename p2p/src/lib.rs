//! Windows over the Controller Memory Buffer, their generations, peers and revocation. It knows nothing of files.
