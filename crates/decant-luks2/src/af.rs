//! The anti-forensic splitter `luks1` (cryptsetup `lib/luks1/af.c`; Fruhwirth, "TKS1"): a key spread over 4000 stripes, all of
//! which are needed, so that overwriting any part of a keyslot destroys it.

use aws_lc_rs::digest;
use zeroize::Zeroizing;

use crate::kdf::Hash;
use crate::{Entropy, Error, KEY_BYTES};

/// The only number of stripes cryptsetup makes or reads.
pub(crate) const STRIPES: usize = 4000;
/// Bytes of split key material: 500 sectors of 512 bytes.
pub(crate) const SPLIT_BYTES: usize = KEY_BYTES * STRIPES;

/// Splits `key`. Secret until encrypted.
pub(crate) fn split(key: &[u8; KEY_BYTES], hash: Hash, entropy: &mut dyn Entropy) -> Result<Zeroizing<Vec<u8>>, Error> {
    let mut material = Zeroizing::new(vec![0u8; SPLIT_BYTES]);
    let mut state = Zeroizing::new([0u8; KEY_BYTES]);
    let (random, last) = material.split_last_chunk_mut::<KEY_BYTES>().expect("4000 stripes are more than one");
    entropy.fill(random)?;
    for stripe in random.chunks_exact(KEY_BYTES) {
        absorb(&mut state, stripe, hash);
    }
    for ((out, key), state) in last.iter_mut().zip(key).zip(state.iter()) {
        *out = key ^ state;
    }
    Ok(material)
}

/// The inverse of [`split`].
pub(crate) fn merge(material: &[u8], hash: Hash, key: &mut [u8; KEY_BYTES]) {
    assert_eq!(material.len(), SPLIT_BYTES, "the splitter works on 4000 stripes of 64 bytes");
    let mut state = Zeroizing::new([0u8; KEY_BYTES]);
    let (random, last) = material.split_last_chunk::<KEY_BYTES>().expect("4000 stripes are more than one");
    for stripe in random.chunks_exact(KEY_BYTES) {
        absorb(&mut state, stripe, hash);
    }
    for ((out, last), state) in key.iter_mut().zip(last).zip(state.iter()) {
        *out = last ^ state;
    }
}

fn absorb(state: &mut [u8; KEY_BYTES], stripe: &[u8], hash: Hash) {
    for (state, stripe) in state.iter_mut().zip(stripe) {
        *state ^= stripe;
    }
    diffuse(state, hash);
}

/// Replaces each block of one digest's length by the digest of its number (32 bits, big-endian) and itself, the last one cut.
fn diffuse(state: &mut [u8; KEY_BYTES], hash: Hash) {
    let algorithm = hash.digest();
    for (number, block) in state.chunks_mut(algorithm.output_len()).enumerate() {
        let mut context = digest::Context::new(algorithm);
        context.update(&(number as u32).to_be_bytes());
        context.update(block);
        let out = context.finish();
        block.copy_from_slice(&out.as_ref()[..block.len()]);
    }
}
