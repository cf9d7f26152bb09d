//! Where the passphrases of volumes come from, and memory that holds a volume key.
//!
//! A passphrase is asked for when a volume is made, prepared or attached, and erased as soon as it opened the keyslot. It is
//! never in a log, an argument list or an environment variable; what a source says on its error stream is shown to people.

mod command;
mod file;
mod keyring;
mod secret;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use decant_base::VolumeId;
use decant_luks2::{Passphrase, SystemEntropy};
use serde::{Deserialize, Serialize};

pub use secret::{SecretError, SecretKind, SecretMemory};

/// Most bytes taken from a source: the longest passphrase and a newline.
const MOST_BYTES: usize = decant_luks2::PASSPHRASE_BYTES + 1;

/// Where passphrases come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "source", deny_unknown_fields)]
pub enum KeySource {
    /// `DIRECTORY/VOLUME.key`, a file that only its owner can read. `volume create` makes it if there is none.
    File {
        /// Which directory.
        directory: PathBuf,
    },
    /// What a program prints, e.g. a client of a secrets store. It runs without a shell, with an empty standard input, for at
    /// most 30 s. `{volume}` in any argument is replaced by the volume's id, which is a DNS label.
    Command {
        /// Program and arguments.
        command: Vec<String>,
    },
    /// The kernel's keyring: the key of type `user` named `decant:VOLUME`, in the keyrings of the process, the session or the user.
    Keyring,
}

/// Why there is no passphrase. `Display` is name, cause and fix.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The file is not there.
    #[error(
        "key-missing: there is no key file {path}; copy it from the worker that the volume comes from, or restore it from a backup"
    )]
    FileMissing {
        /// Where it should be.
        path: PathBuf,
    },
    /// Others can read it.
    #[error(
        "key-exposed: {path} has mode {mode:o} and owner {owner}; only its owner, this process's user or root, may have access: chmod 0600 it"
    )]
    FileExposed {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// The owner's uid.
        owner: u32,
    },
    /// It is a directory, a device, a pipe, or a symbolic link.
    #[error("key-not-a-file: {path} is no regular file; put the passphrase into one")]
    NotAFile {
        /// Which.
        path: PathBuf,
    },
    /// The file system says no.
    #[error("key-io: {action} {path} failed: {source}; check the directory named in [keys]")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// Empty or too long.
    #[error(
        "key-length: what {from} gives is no passphrase: {source}; it must be 1 to 512 bytes, and one newline at the end is ignored"
    )]
    Length {
        /// The source.
        from: String,
        /// What is wrong with it.
        #[source]
        source: decant_luks2::Error,
    },
    /// The program could not be started.
    #[error("key-command: {program} cannot be run: {source}; check `command` in [keys]")]
    CommandStart {
        /// Which.
        program: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The program failed.
    #[error("key-command: {program} ended with {status}: {stderr}; run it by hand to see why")]
    CommandFailed {
        /// Which.
        program: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// The end of what it said on its error stream.
        stderr: String,
    },
    /// The program did not end in time and was killed.
    #[error("key-command: {program} did not end within {seconds} s and was killed; run it by hand to see why")]
    CommandSlow {
        /// Which.
        program: String,
        /// How long it had.
        seconds: u64,
    },
    /// No program is configured.
    #[error("key-command: no program is named; write command = [\"PROGRAM\", \"{{volume}}\"] in [keys]")]
    CommandEmpty,
    /// The keyring has no such key, or it may not be read.
    #[error(
        "key-keyring: the kernel's keyring gives no key user \"{description}\": {source}; add it with `keyctl padd user {description} @u`"
    )]
    Keyring {
        /// The key's name.
        description: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The source cannot make new passphrases.
    #[error(
        "key-not-made: {from} has no passphrase for volume {volume} yet and cannot make one: put a random one of 64 hexadecimal digits there first ({source})"
    )]
    CannotGenerate {
        /// The source.
        from: &'static str,
        /// For which volume.
        volume: VolumeId,
        /// What it said.
        #[source]
        source: Box<KeyError>,
    },
    /// No randomness.
    #[error("key-entropy: no passphrase could be made: {0}")]
    Entropy(#[source] decant_luks2::Error),
}

impl KeySource {
    /// The passphrase of `volume`. Blocks on the file system or the program, at most 30 s.
    ///
    /// # Errors
    /// See [`KeyError`].
    pub fn passphrase(&self, volume: &VolumeId) -> Result<Passphrase, KeyError> {
        match self {
            Self::File { directory } => file::read(&file::path(directory, volume)),
            Self::Command { command } => command::run(command, volume, command::PATIENCE),
            Self::Keyring => keyring::read(volume),
        }
    }

    /// The passphrase for a volume that is being made: the one that is there, or a new random one in the file source, durable
    /// before this returns. An existing file is never overwritten.
    ///
    /// # Errors
    /// See [`KeyError`]; [`KeyError::CannotGenerate`] if the source is no directory of files.
    pub fn provide(&self, volume: &VolumeId) -> Result<Passphrase, KeyError> {
        let refuse =
            |from| move |source| KeyError::CannotGenerate { from, volume: volume.clone(), source: Box::new(source) };
        match self {
            Self::File { directory } => {
                let path = file::path(directory, volume);
                match file::read(&path) {
                    Err(KeyError::FileMissing { .. }) => {}
                    other => return other,
                }
                let passphrase = Passphrase::generate(&mut SystemEntropy).map_err(KeyError::Entropy)?;
                file::publish(directory, &path, &passphrase)?;
                // What is read back is what the next attach will get, also when another process published first.
                file::read(&path)
            }
            Self::Command { .. } => self.passphrase(volume).map_err(refuse("the command")),
            Self::Keyring => self.passphrase(volume).map_err(refuse("the keyring")),
        }
    }
}

/// Takes what a source gave, without one newline at its end: editors and programs add it. `cryptsetup --key-file` would count
/// it, `cryptsetup` reading a prompt or a pipe does not.
fn passphrase(mut bytes: zeroize::Zeroizing<Vec<u8>>, from: impl FnOnce() -> String) -> Result<Passphrase, KeyError> {
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    Passphrase::new(std::mem::take(&mut *bytes)).map_err(|source| KeyError::Length { from: from(), source })
}
