//! The system calls that a shim needs and that have no safe wrapper.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::process::Pid;
use rustix::thread::UnshareFlags;

/// `FITRIM`, include/uapi/linux/fs.h: `_IOWR('X', 121, struct fstrim_range)`.
const FITRIM: libc::c_ulong = 0xc018_5879;
/// `EXT4_IOC_CHECKPOINT`, include/uapi/linux/ext4.h: `_IOW('f', 43, __u32)`.
const EXT4_IOC_CHECKPOINT: libc::c_ulong = 0x4004_662b;
/// `MOUNT_ATTR_RDONLY`, include/uapi/linux/mount.h.
pub(crate) const MOUNT_ATTR_RDONLY: u64 = 0x1;
/// `MOUNT_ATTR_NOSUID`.
pub(crate) const MOUNT_ATTR_NOSUID: u64 = 0x2;
/// `MOUNT_ATTR_NODEV`.
pub(crate) const MOUNT_ATTR_NODEV: u64 = 0x4;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Forks. The child does `work` and exits with what it returns; nothing of the caller's is dropped there.
///
/// # Panics
/// If the process has more than one thread: the child could hang on a lock that another thread held.
pub(crate) fn fork(work: impl FnOnce() -> i32) -> io::Result<Pid> {
    assert_eq!(threads()?, 1, "a shim has one thread");
    // SAFETY: the process has one thread (checked above), so the child finds every lock free and every structure whole.
    let pid = check(unsafe { libc::fork() })?;
    if pid == 0 {
        // A panic must not unwind into what only the parent may do.
        let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or(101);
        // SAFETY: ends the child without running the parent's destructors and handlers.
        unsafe { libc::_exit(status) };
    }
    Pid::from_raw(pid).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Threads of this process.
pub(crate) fn threads() -> io::Result<usize> {
    Ok(std::fs::read_dir("/proc/self/task")?.count())
}

/// Leaves namespaces of the caller for new ones.
pub(crate) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    assert!(!flags.contains(UnshareFlags::FILES), "descriptors stay shared");
    // SAFETY: the call is unsafe for UnshareFlags::FILES only, excluded above.
    unsafe { rustix::thread::unshare_unsafe(flags) }?;
    Ok(())
}

/// Sets `attributes` (`MOUNT_ATTR_*`) on the mount `tree` and on all mounts below it.
pub(crate) fn set_mount_attributes(tree: BorrowedFd<'_>, attributes: u64) -> io::Result<()> {
    // struct mount_attr: attr_set, attr_clr, propagation, userns_fd.
    let attributes: [u64; 4] = [attributes, 0, 0, 0];
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: the path is a valid C string, the structure is MOUNT_ATTR_SIZE_VER0 = 32 bytes and outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            attributes.as_ptr(),
            size_of_val(&attributes),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// In a forked child: closes every descriptor but the standard ones and `keep`. The child must not touch what it closed.
pub(crate) fn close_all_but(keep: &[RawFd]) {
    let mut keep: Vec<libc::c_uint> = keep.iter().map(|fd| fd.cast_unsigned()).filter(|fd| *fd > 2).collect();
    keep.sort_unstable();
    let mut from = 3;
    for fd in keep.into_iter().chain([libc::c_uint::MAX]) {
        if fd > from {
            // SAFETY: closes descriptors of a forked child whose owners are never used or dropped in it.
            unsafe { libc::syscall(libc::SYS_close_range, from, fd - 1, 0) };
        }
        from = fd.saturating_add(1);
    }
}

/// Trims free space in `range`, bytes, of the file system that `directory` is on; the bytes that it says it trimmed.
pub(crate) fn trim(directory: BorrowedFd<'_>, range: &std::ops::Range<u64>) -> io::Result<u64> {
    // struct fstrim_range: start, len, minlen; the kernel writes what it trimmed to len.
    let mut range: [u64; 3] = [range.start, range.end - range.start, 0];
    // SAFETY: FITRIM reads and writes one struct fstrim_range, which outlives the call.
    check(unsafe { libc::ioctl(directory.as_raw_fd(), FITRIM, range.as_mut_ptr()) })?;
    Ok(range[1])
}

/// Has ext4 write what its journal holds to where it belongs, so that an unmount soon after has little left to do (Linux 5.14).
/// Other file systems do not know the call.
pub(crate) fn checkpoint(directory: BorrowedFd<'_>) -> io::Result<()> {
    let flags: u32 = 0;
    // SAFETY: EXT4_IOC_CHECKPOINT reads one u32, which outlives the call.
    check(unsafe { libc::ioctl(directory.as_raw_fd(), EXT4_IOC_CHECKPOINT, &raw const flags) }).map(drop)
}

/// Replaces the process by `program`; returns only what went wrong.
pub(crate) fn exec(program: &CStr, arguments: &[CString], environment: &[CString]) -> io::Error {
    let pointers = |texts: &[CString]| -> Vec<*const libc::c_char> {
        texts.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    // SAFETY: both vectors end with a null pointer and point to C strings that outlive the call.
    unsafe { libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

/// Gives every signal its default action and blocks none: a program starts without what its shim set for itself.
pub(crate) fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: sets a default action. SIGKILL, SIGSTOP and the C library's own refuse, which is as well.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: an all-zero sigset_t is the empty set on Linux; the kernel only reads it.
    unsafe {
        let empty: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, &raw const empty, std::ptr::null_mut());
    }
}

/// Blocks SIGCHLD and gives a descriptor that becomes readable when a child ends.
pub(crate) fn child_signals() -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset and outlives the calls; signalfd returns a new descriptor that nobody else owns.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        check(libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()))?;
        let fd = check(libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// User id of whoever connected to a unix socket. (Its process id is 0 here: it is not in our PID namespace.)
pub(crate) fn peer_uid(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut peer = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, one struct ucred, which outlives the call.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut length,
        )
    })?;
    Ok(peer.uid)
}
