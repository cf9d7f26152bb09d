//! The root that a machine sees.
//!
//! ```text
//! /            tmpfs, read-only        /dev   null zero full random urandom tty ptmx pts shm, nothing else
//! /usr /etc    the host's, read-only   /run /tmp   its own tmpfs
//! /bin /lib …  as on the host          /proc  of its own process ids
//! <binds>      read-only               /data  its volume, mounted at `go`
//! ```
//! Host trees are opened as detached mounts before the root is changed and attached after: a path of the machine's is then
//! never looked up in the host's tree.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change, move_mount,
    open_tree, unmount,
};

use crate::spec::MachineSpec;
use crate::sys::{MOUNT_ATTR_NODEV, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY, set_mount_attributes};

/// Host trees every machine sees.
const SHARED: [&str; 2] = ["usr", "etc"];
/// Links into /usr on a merged-usr host, trees of their own elsewhere.
const BINARIES: [&str; 6] = ["bin", "sbin", "lib", "lib32", "lib64", "libx32"];
/// Devices: name, major, minor (Documentation/admin-guide/devices.txt).
const DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
/// The links that programs expect in /dev.
const DEVICE_LINKS: [(&str, &str); 5] = [
    ("ptmx", "pts/ptmx"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

/// What went wrong where.
pub(super) struct RootError(pub(super) String);

trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, RootError>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, RootError> {
        self.map_err(|error| RootError(format!("cannot {}: {}", what(), error.into())))
    }
}

/// Builds the root at `base`, an empty directory of the host, and makes it this mount namespace's. The namespace must be new.
pub(super) fn build(base: &Path, spec: &MachineSpec) -> Result<(), RootError> {
    // The host's unmounts still reach the copy of its mounts here, ours do not reach the host.
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .context(|| "separate from the host's mounts".to_owned())?;
    let shared: Vec<(&str, OwnedFd)> = SHARED
        .iter()
        .map(|name| Ok((*name, read_only(&Path::new("/").join(name))?)))
        .collect::<Result<_, RootError>>()?;
    let mut binaries = Vec::new();
    for name in BINARIES {
        let path = Path::new("/").join(name);
        match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_symlink() => {
                let link = fs::read_link(&path).context(|| format!("read {}", path.display()))?;
                binaries.push((name, Binary::Link(link)));
            }
            Ok(_) => binaries.push((name, Binary::Tree(read_only(&path)?))),
            Err(_) => {}
        }
    }
    let mut binds: Vec<(&Path, bool, OwnedFd)> = Vec::new();
    for bind in &spec.binds {
        let meta = fs::metadata(&bind.source).context(|| format!("find {}", bind.source.display()))?;
        binds.push((&bind.target, meta.is_dir(), read_only(&bind.source)?));
    }
    // A bind below another's target comes after it.
    binds.sort_by_key(|(target, _, _)| target.components().count());

    tmpfs(base, "mode=0755,size=1m,nr_inodes=4096", MountFlags::NODEV)?;
    std::env::set_current_dir(base).context(|| format!("enter {}", base.display()))?;
    for name in SHARED.into_iter().chain(["proc", "dev", "run", "tmp", "data"]) {
        fs::create_dir(name).context(|| format!("make /{name}"))?;
    }
    for (name, tree) in shared {
        attach(&tree, Path::new(name))?;
    }
    for (name, binary) in binaries {
        match binary {
            Binary::Link(to) => std::os::unix::fs::symlink(to, name).context(|| format!("link /{name}"))?,
            Binary::Tree(tree) => {
                fs::create_dir(name).context(|| format!("make /{name}"))?;
                attach(&tree, Path::new(name))?;
            }
        }
    }
    change_root()?;
    mount("proc", "/proc", "proc", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, None)
        .context(|| "mount /proc".to_owned())?;
    devices()?;
    let own = format!("mode=0755,size=64m,uid={},gid={}", spec.uid, spec.gid);
    tmpfs(Path::new("/run"), &own, MountFlags::NODEV)?;
    tmpfs(Path::new("/tmp"), "mode=1777,size=512m", MountFlags::NODEV)?;
    for (target, is_directory, tree) in binds {
        mount_point(target, is_directory)?;
        attach(&tree, target)?;
    }
    seal_root()
}

enum Binary {
    Link(PathBuf),
    Tree(OwnedFd),
}

/// A detached, read-only copy of the host's mounts at and below `path`.
fn read_only(path: &Path) -> Result<OwnedFd, RootError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, path, flags).context(|| format!("open {}", path.display()))?;
    set_mount_attributes(tree.as_fd(), MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV)
        .context(|| format!("make {} read-only", path.display()))?;
    Ok(tree)
}

fn attach(tree: &OwnedFd, target: &Path) -> Result<(), RootError> {
    move_mount(tree, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .context(|| format!("bind at {}", target.display()))
}

fn tmpfs(at: &Path, options: &str, flags: MountFlags) -> Result<(), RootError> {
    let options = std::ffi::CString::new(options).context(|| "make options".to_owned())?;
    mount("tmpfs", at, "tmpfs", flags | MountFlags::NOSUID, &*options).context(|| format!("mount {}", at.display()))
}

fn change_root() -> Result<(), RootError> {
    // pivot_root(".", "."): the old root is stacked on the new one, and falls off with the unmount (pivot_root(2)).
    rustix::process::pivot_root(".", ".").context(|| "change the root".to_owned())?;
    unmount(".", UnmountFlags::DETACH).context(|| "leave the host's root".to_owned())?;
    std::env::set_current_dir("/").context(|| "enter the new root".to_owned())
}

fn devices() -> Result<(), RootError> {
    tmpfs(Path::new("/dev"), "mode=0755,size=64k,nr_inodes=64", MountFlags::NOEXEC)?;
    for (name, major, minor) in DEVICES {
        let path = Path::new("/dev").join(name);
        let device = rustix::fs::makedev(major, minor);
        rustix::fs::mknodat(CWD, &path, FileType::CharacterDevice, Mode::from_raw_mode(0o666), device)
            .and_then(|()| rustix::fs::chmod(&path, Mode::from_raw_mode(0o666)))
            .context(|| format!("make {}", path.display()))?;
    }
    for (name, to) in DEVICE_LINKS {
        std::os::unix::fs::symlink(to, Path::new("/dev").join(name)).context(|| format!("link /dev/{name}"))?;
    }
    for name in ["pts", "shm"] {
        fs::create_dir(Path::new("/dev").join(name)).context(|| format!("make /dev/{name}"))?;
    }
    let pts = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount("devpts", "/dev/pts", "devpts", pts, c"newinstance,ptmxmode=0666,mode=0620")
        .context(|| "mount /dev/pts".to_owned())?;
    tmpfs(Path::new("/dev/shm"), "mode=1777,size=512m", MountFlags::NODEV | MountFlags::NOEXEC)
}

/// Makes what a bind needs to be attached to, in a tree that is ours.
fn mount_point(target: &Path, is_directory: bool) -> Result<(), RootError> {
    let make = || format!("make a place for {}; only what is not the host's can be bound over", target.display());
    let parent = if is_directory { Some(target) } else { target.parent() };
    if let Some(parent) = parent
        && !parent.is_dir()
    {
        fs::create_dir_all(parent).context(make)?;
    }
    if !is_directory && !target.exists() {
        fs::File::create(target).context(make)?;
    }
    Ok(())
}

/// The root itself becomes read-only; what is mounted below keeps what it is.
fn seal_root() -> Result<(), RootError> {
    rustix::mount::mount_remount(
        "/",
        MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV,
        c"",
    )
    .context(|| "make the root read-only".to_owned())
}

/// The program must be there as the machine sees it.
pub(super) fn check_program(spec: &MachineSpec) -> Result<(), RootError> {
    use std::os::unix::fs::PermissionsExt;
    let program = spec.command.first().map(Path::new).unwrap_or(Path::new("/"));
    let meta =
        fs::metadata(program).context(|| format!("find the program {} inside the machine", program.display()))?;
    if !meta.is_file() || meta.permissions().mode() & 0o111 == 0 {
        return Err(RootError(format!("{} is not an executable file", program.display())));
    }
    Ok(())
}
