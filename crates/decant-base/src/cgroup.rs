//! What the control group of a worker is called: its machines and the keepers of its volumes are below the same one.

use std::path::{Path, PathBuf};

/// Where a worker's run directory usually is.
const USUAL_RUN_DIR: &str = "/run/decant";

/// The worker's group below the cgroup2 mount point: `decant/<worker>`. Two workers of one name on one host, as demos make them,
/// have different run directories and so different groups, `decant/<worker>.<hash>`.
pub fn of_worker(worker: &str, run_dir: &Path) -> PathBuf {
    let parent = Path::new("decant");
    if run_dir == Path::new(USUAL_RUN_DIR) {
        return parent.join(worker);
    }
    // FNV-1a, so that another version of this program finds the same group.
    let hash =
        run_dir.as_os_str().as_encoded_bytes().iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
    parent.join(format!("{worker}.{:08x}", hash >> 32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_of_one_name_in_different_run_directories_have_different_groups() {
        assert_eq!(of_worker("w1", Path::new("/run/decant")), Path::new("decant/w1"));
        let (a, b) = (of_worker("w1", Path::new("/tmp/a")), of_worker("w1", Path::new("/tmp/b")));
        assert_ne!(a, b);
        assert_eq!(a, of_worker("w1", Path::new("/tmp/a")));
        assert!(a.to_str().is_some_and(|path| path.starts_with("decant/w1.")), "{a:?}");
    }
}
