//! The NBD protocol, client and server, without I/O.
