//! One agent per worker: event loop, timers, sockets, wiring.
