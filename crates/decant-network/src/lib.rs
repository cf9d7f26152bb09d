//! Addresses, links and routes of machines, and the proxy that follows them.
