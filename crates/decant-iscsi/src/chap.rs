//! CHAP with MD5 (12.1.3, RFC 1994), one-way and mutual.
//!
//! CHAP authenticates a login and nothing after it: whoever can change packets needs no secret. MD5 is what every initiator
//! and target has; the answer to a challenge is 128 bits whatever the secret.
//!
//! What is refused, and why: secrets under 96 bits (12.1.3 forbids them outside of IPsec); the same secret in both
//! directions, and a peer's challenge that is our own (an attacker could then have us compute the answer to our own
//! challenge, on this connection or another); a challenge that is short. Random bytes come from the caller, who must draw
//! them anew for each login: a challenge used twice is an answer that was heard before (CVE-2024-45751).

use crate::error::Violation;
use crate::text;
use md5::{Digest, Md5};

/// Shortest secret, bytes: 96 bits (12.1.3).
pub const MIN_SECRET: usize = 12;
/// Longest secret, bytes.
pub const MAX_SECRET: usize = 255;
/// Bytes of a challenge that this side sends.
pub const CHALLENGE_BYTES: usize = 32;
/// Shortest challenge that is answered, bytes: the length of the answer; RFC 7143 asks for "long enough".
pub const MIN_CHALLENGE: usize = 16;
/// Longest challenge that is answered, bytes (12.1.3).
pub const MAX_CHALLENGE: usize = 1024;
/// Longest name, bytes.
pub const MAX_NAME: usize = 255;
/// Bytes of an answer.
pub const RESPONSE_BYTES: usize = 16;
/// CHAP_A of MD5 (RFC 1994).
pub const MD5: &str = "5";

/// A secret. It has no Debug and is overwritten when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

/// Why something cannot be a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// Not within [`MIN_SECRET`]..=[`MAX_SECRET`].
    #[error("a CHAP secret has {MIN_SECRET} to {MAX_SECRET} bytes, this one {0}")]
    Length(usize),
    /// One secret for both directions.
    #[error("the CHAP secrets of the two directions must differ")]
    SameBothWays,
}

impl Secret {
    /// A secret of these bytes.
    ///
    /// # Errors
    /// Its length.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Result<Self, SecretError> {
        let bytes = bytes.into();
        if (MIN_SECRET..=MAX_SECRET).contains(&bytes.len()) {
            Ok(Self(bytes))
        } else {
            Err(SecretError::Length(bytes.len()))
        }
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.fill(0);
        // Keeps the compiler from leaving the line above out.
        std::hint::black_box(&self.0);
    }
}

/// A name and the secret that proves it.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// CHAP_N; at most [`MAX_NAME`] bytes.
    pub name: String,
    /// What proves it.
    pub secret: Secret,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What a login proves: who the initiator is and, in mutual CHAP, who the target is. The same value configures both roles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chap {
    initiator: Credentials,
    target: Option<Credentials>,
}

impl Chap {
    /// One-way when `target` is `None`, else mutual.
    ///
    /// # Errors
    /// The same secret both ways.
    pub fn new(initiator: Credentials, target: Option<Credentials>) -> Result<Self, SecretError> {
        if target.as_ref().is_some_and(|target| target.secret == initiator.secret) {
            return Err(SecretError::SameBothWays);
        }
        Ok(Self { initiator, target })
    }

    /// What the initiator proves itself with.
    pub fn initiator(&self) -> &Credentials {
        &self.initiator
    }

    /// What the target proves itself with.
    pub fn target(&self) -> Option<&Credentials> {
        self.target.as_ref()
    }
}

/// A challenge of this side's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenge {
    /// CHAP_I.
    pub id: u8,
    /// CHAP_C.
    pub bytes: [u8; CHALLENGE_BYTES],
}

/// Random bytes that make a [`Challenge`]: one for its id, the rest for itself.
pub const RANDOM_BYTES: usize = CHALLENGE_BYTES + 1;

impl Challenge {
    /// From bytes that the caller drew at random for this login alone.
    pub fn new(random: [u8; RANDOM_BYTES]) -> Self {
        let [id, bytes @ ..] = random;
        Self { id, bytes }
    }

    /// Whether `response` (CHAP_R, as text) proves knowledge of `secret`. Takes the same time wherever they differ.
    pub fn is_answered_by(&self, secret: &Secret, response: &str) -> bool {
        let Some(response) = text::binary(response, RESPONSE_BYTES) else { return false };
        let expected = answer(self.id, secret, &self.bytes);
        let difference = expected.iter().zip(&response).fold(0, |sum, (a, b)| sum | (a ^ b));
        response.len() == RESPONSE_BYTES && std::hint::black_box(difference) == 0
    }

    /// Puts the challenge into text: CHAP_I and CHAP_C.
    pub fn put(&self, out: &mut text::TextOut) {
        out.push("CHAP_I", &self.id.to_string());
        out.push("CHAP_C", &text::to_hexadecimal(&self.bytes));
    }
}

/// The answer to a challenge (RFC 1994 4.1): MD5 of id, secret, challenge.
pub fn answer(id: u8, secret: &Secret, challenge: &[u8]) -> [u8; RESPONSE_BYTES] {
    let mut hash = Md5::new();
    hash.update([id]);
    hash.update(&secret.0);
    hash.update(challenge);
    hash.finalize().into()
}

/// Answers the challenge that a peer sent as `id` (CHAP_I) and `challenge` (CHAP_C). `ours` is the challenge that this side
/// sent on the connection, if it did.
///
/// # Errors
/// The challenge is malformed, or our own come back (8.2.1, reflection).
pub fn answer_text(secret: &Secret, id: &str, challenge: &str, ours: Option<&Challenge>) -> Result<String, Violation> {
    let id = text::number(id).and_then(|id| u8::try_from(id).ok()).ok_or(Violation::Authentication("CHAP_I"))?;
    let challenge = text::binary(challenge, MAX_CHALLENGE).ok_or(Violation::Authentication("CHAP_C"))?;
    if challenge.len() < MIN_CHALLENGE {
        return Err(Violation::Authentication("the challenge is too short"));
    }
    if ours.is_some_and(|ours| ours.bytes == *challenge) {
        return Err(Violation::Authentication("the challenge is our own, reflected"));
    }
    Ok(text::to_hexadecimal(&answer(id, secret, &challenge)))
}
