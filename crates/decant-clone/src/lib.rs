//! Which blocks are here, what to fetch next, what may be acknowledged, and the map that says so.
