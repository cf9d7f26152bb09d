//! The kernel's key retention service: three system calls that no crate here wraps.

#![allow(unsafe_code)]

use std::ffi::{CString, c_long};
use std::io::{Error, ErrorKind};

use decant_base::VolumeId;
use decant_luks2::Passphrase;
use zeroize::Zeroizing;

use super::{KeyError, MOST_BYTES};

// include/uapi/linux/keyctl.h
const KEYCTL_LINK: c_long = 8;
const KEYCTL_READ: c_long = 11;
const PROCESS_KEYRING: c_long = -2;
const USER_KEYRING: c_long = -4;

/// Reads the key `decant:VOLUME` of type `user`.
pub(super) fn read(volume: &VolumeId) -> Result<Passphrase, KeyError> {
    let description = format!("decant:{volume}");
    let fail = |source| KeyError::Keyring { description: description.clone(), source };
    let name = CString::new(description.as_str()).map_err(|_| fail(ErrorKind::InvalidInput.into()))?;
    let serial = match find(&name) {
        Ok(serial) => serial,
        // A service has a session keyring without a link to the user's: link that one to this process's own, then it is
        // possessed and its keys can be found and read.
        Err(_) => {
            link_user_keyring().map_err(fail)?;
            find(&name).map_err(fail)?
        }
    };
    let mut bytes = Zeroizing::new(vec![0u8; MOST_BYTES + 1]);
    // SAFETY: the kernel writes at most the length passed into the buffer, which is that long, and returns the key's length.
    let length = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_READ, serial, bytes.as_mut_ptr(), bytes.len(), 0) };
    let length = usize::try_from(length).map_err(|_| fail(Error::last_os_error()))?;
    // A longer key was cut; it is then one byte too long and refused below.
    bytes.truncate(length);
    super::passphrase(bytes, || format!("the key {description}"))
}

fn find(name: &CString) -> Result<c_long, Error> {
    // SAFETY: both strings end with NUL and outlive the call; a null callout means that no program is asked.
    let serial = unsafe {
        libc::syscall(libc::SYS_request_key, c"user".as_ptr(), name.as_ptr(), std::ptr::null::<libc::c_char>(), 0)
    };
    if serial < 0 { Err(Error::last_os_error()) } else { Ok(serial) }
}

fn link_user_keyring() -> Result<(), Error> {
    // SAFETY: plain numbers.
    let result = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_LINK, USER_KEYRING, PROCESS_KEYRING, 0, 0) };
    if result < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}

/// Adds a key to the user's keyring, for tests.
#[cfg(test)]
pub(super) fn add(description: &str, payload: &[u8]) -> Result<c_long, Error> {
    let name = CString::new(description).map_err(|_| ErrorKind::InvalidInput)?;
    // SAFETY: both strings end with NUL; the payload has the length passed.
    let serial = unsafe {
        libc::syscall(libc::SYS_add_key, c"user".as_ptr(), name.as_ptr(), payload.as_ptr(), payload.len(), USER_KEYRING)
    };
    if serial < 0 { Err(Error::last_os_error()) } else { Ok(serial) }
}

/// Takes a key away again, for tests.
#[cfg(test)]
pub(super) fn unlink(serial: c_long) {
    const KEYCTL_UNLINK: c_long = 9;
    // SAFETY: plain numbers.
    unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_UNLINK, serial, USER_KEYRING, 0, 0) };
}
