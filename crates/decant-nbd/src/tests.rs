//! A client and a server with a network between them, in one process; golden bytes; hostile peers.

mod golden;
mod hostile;
mod pair;
mod properties;
