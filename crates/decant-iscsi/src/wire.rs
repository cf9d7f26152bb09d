//! Reading and writing of fixed fields.

/// Fields of a fixed block of bytes. A position past the end reads as zero; blocks here are of constant length, so that
/// means a mistake in this crate, which its golden tests would show.
pub(crate) trait Fields {
    fn u8_at(&self, at: usize) -> u8;
    fn u16_at(&self, at: usize) -> u16;
    fn u24_at(&self, at: usize) -> u32;
    fn u32_at(&self, at: usize) -> u32;
    fn u64_at(&self, at: usize) -> u64;
    fn array_at<const N: usize>(&self, at: usize) -> [u8; N];
}

impl Fields for [u8] {
    fn u8_at(&self, at: usize) -> u8 {
        self.get(at).copied().unwrap_or_default()
    }

    fn u16_at(&self, at: usize) -> u16 {
        u16::from_be_bytes(self.array_at(at))
    }

    fn u24_at(&self, at: usize) -> u32 {
        let [a, b, c] = self.array_at(at);
        u32::from_be_bytes([0, a, b, c])
    }

    fn u32_at(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.array_at(at))
    }

    fn u64_at(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.array_at(at))
    }

    fn array_at<const N: usize>(&self, at: usize) -> [u8; N] {
        self.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }
}

/// Sets fields of a fixed block of bytes; the counterpart of [`Fields`].
pub(crate) trait SetFields {
    fn set(&mut self, at: usize, bytes: &[u8]);
    fn set_u8(&mut self, at: usize, value: u8) {
        self.set(at, &[value]);
    }
    fn set_u16(&mut self, at: usize, value: u16) {
        self.set(at, &value.to_be_bytes());
    }
    fn set_u24(&mut self, at: usize, value: u32) {
        let [_, a, b, c] = value.to_be_bytes();
        self.set(at, &[a, b, c]);
    }
    fn set_u32(&mut self, at: usize, value: u32) {
        self.set(at, &value.to_be_bytes());
    }
    fn set_u64(&mut self, at: usize, value: u64) {
        self.set(at, &value.to_be_bytes());
    }
}

impl SetFields for [u8] {
    fn set(&mut self, at: usize, bytes: &[u8]) {
        if let Some(room) = self.get_mut(at..).and_then(|rest| rest.get_mut(..bytes.len())) {
            room.copy_from_slice(bytes);
        }
    }
}
