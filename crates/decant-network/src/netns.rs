//! Network namespaces pinned by name: a file with the namespace bind-mounted on it, as `ip netns` does.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::mount::UnmountFlags;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

/// `NSFS_MAGIC`, include/uapi/linux/magic.h.
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// An open network namespace.
#[derive(Debug)]
pub struct NetNs {
    file: File,
}

impl NetNs {
    /// Opens the namespace pinned at `path`, or makes one and pins it there. The flag says whether it was made.
    pub fn ensure(path: &Path) -> io::Result<(Self, bool)> {
        match Self::open(path) {
            Ok(netns) => return Ok((netns, false)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        File::create(path)?;
        on_own_thread(|| {
            new_network_namespace()?;
            rustix::mount::mount_bind("/proc/thread-self/ns/net", path)?;
            Ok(())
        })?;
        Ok((Self::open(path)?, true))
    }

    /// Opens the namespace pinned at `path`. A file that pins nothing, as a dead process leaves it, counts as not found.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let magic = rustix::fs::fstatfs(&file)?.f_type;
        if i128::from(magic) != i128::from(NSFS_MAGIC) {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("no namespace is pinned at {}", path.display()),
            ));
        }
        Ok(Self { file })
    }

    /// Unpins the namespace at `path` and removes the file. It lives on while a process or a socket is in it.
    pub fn remove(path: &Path) -> io::Result<()> {
        while path.exists() {
            match rustix::mount::unmount(path, UnmountFlags::DETACH) {
                Ok(()) => {}
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => break,
                Err(error) => return Err(error.into()),
            }
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Runs `work` on a thread of its own inside the namespace. Sockets opened and processes started there belong to it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        on_own_thread(|| {
            rustix::thread::move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))?;
            work()
        })
    }

    pub(crate) fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn on_own_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        std::thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, work)?.join().unwrap_or_else(|panic| {
            // A panic of the caller's closure goes on in the caller.
            std::panic::resume_unwind(panic)
        })
    })
}

#[allow(unsafe_code)]
fn new_network_namespace() -> io::Result<()> {
    // SAFETY: only the network namespace is unshared, not the table of descriptors, which is what the call is unsafe for.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
    Ok(())
}

/// Writes one of /proc/sys/net of the calling thread's network namespace, unless it has that value.
pub(crate) fn set_sysctl(name: &str, value: &str) -> io::Result<()> {
    let path = Path::new("/proc/sys/net").join(name);
    if fs::read_to_string(&path)?.trim() == value {
        return Ok(());
    }
    fs::write(&path, value)
}
