//! The stream of PDUs: cut into headers and data on the way in, framed and digested on the way out.

use super::{BHS_BYTES, Header, padding};
use crate::Step;
use crate::error::Violation;
use crate::wire::Fields;

/// Which digests a connection has (13.1). Both are off until a login has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Digests {
    /// HeaderDigest=CRC32C.
    pub header: bool,
    /// DataDigest=CRC32C.
    pub data: bool,
}

/// A piece of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit<'a> {
    /// A PDU begins. Where it has data, [`Unit::Data`] follow, then [`Unit::End`]; where it has none, nothing does.
    Header {
        /// The basic header segment, raw: [`Header::decode`] reads it.
        bhs: &'a [u8; BHS_BYTES],
        /// Additional header segments, whole ones.
        ahs: &'a [u8],
        /// Bytes of data.
        data_length: u32,
    },
    /// The next bytes of the PDU's data: all of them that are in the input.
    Data(&'a [u8]),
    /// The PDU's data is complete.
    End {
        /// Whether the data digest matched, or there is none.
        intact: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Header,
    /// So many bytes of data are to come, and then so many of padding and digest.
    Data {
        left: u32,
        pad: u32,
    },
    Trailer {
        pad: u32,
    },
}

/// Cuts a stream into PDUs. It keeps no bytes: a header must be in the input as a whole ([`super::MAX_UNIT`]), data passes
/// through in whatever pieces it is given, so it may be read straight to where it belongs and shown to the decoder there.
#[derive(Debug, Clone)]
pub struct Decoder {
    digests: Digests,
    max_data: u32,
    max_ahs: u32,
    state: State,
    crc: u32,
}

impl Decoder {
    /// A decoder for a new connection, which has no digests yet, accepting up to `max_data` bytes of data and `max_ahs`
    /// bytes of additional header in a PDU.
    pub fn new(max_data: u32, max_ahs: u32) -> Self {
        Self { digests: Digests::default(), max_data, max_ahs, state: State::Header, crc: 0 }
    }

    /// What was negotiated holds from the next PDU on.
    pub fn set_negotiated(&mut self, digests: Digests, max_data: u32) {
        self.digests = digests;
        self.max_data = max_data;
    }

    /// Bytes of the current PDU's data that are still to come.
    pub fn data_left(&self) -> u32 {
        match self.state {
            State::Data { left, .. } => left,
            _ => 0,
        }
    }

    /// Whether a PDU has begun and is not complete.
    pub fn is_within(&self) -> bool {
        self.state != State::Header
    }

    /// The next piece of `input`, if there is a whole one. [`Unit::Data`] counts as consumed.
    ///
    /// # Errors
    /// A header that cannot be believed; the stream is lost.
    pub fn handle_input<'a>(&mut self, input: &'a [u8]) -> Result<Step<Unit<'a>>, Violation> {
        match self.state {
            State::Header => self.header(input),
            State::Data { left, pad } => Ok(self.data(input, left, pad)),
            State::Trailer { pad } => Ok(self.trailer(input, pad)),
        }
    }

    fn header<'a>(&mut self, input: &'a [u8]) -> Result<Step<Unit<'a>>, Violation> {
        let none = Step { consumed: 0, event: None };
        let Some((bhs, rest)) = input.split_first_chunk::<BHS_BYTES>() else { return Ok(none) };
        let ahs_length = u32::from(bhs.u8_at(4)).wrapping_mul(4);
        let data_length = bhs.u24_at(5);
        // A length is only believed when the digest says so, but a header must be complete to check it: the length of its
        // additional part is bounded by one byte.
        let ahs_bytes = ahs_length as usize;
        let Some((ahs, rest)) = rest.split_at_checked(ahs_bytes) else { return Ok(none) };
        let rest = if self.digests.header {
            let Some((digest, rest)) = rest.split_first_chunk::<4>() else { return Ok(none) };
            if u32::from_le_bytes(*digest) != crc32c::crc32c_append(crc32c::crc32c(bhs), ahs) {
                return Err(Violation::HeaderDigest);
            }
            rest
        } else {
            rest
        };
        let too_long =
            |what, length: u32, limit: u32| Violation::TooLong { what, length: length.into(), limit: limit.into() };
        if ahs_length > self.max_ahs {
            return Err(too_long("additional header", ahs_length, self.max_ahs));
        }
        check_ahs(ahs)?;
        if data_length > self.max_data {
            return Err(too_long("data segment", data_length, self.max_data));
        }
        if data_length > 0 {
            let digest = if self.digests.data { 4 } else { 0 };
            self.state = State::Data { left: data_length, pad: padding(data_length).wrapping_add(digest) };
            self.crc = 0;
        }
        let consumed = input.len().saturating_sub(rest.len());
        Ok(Step { consumed, event: Some(Unit::Header { bhs, ahs, data_length }) })
    }

    fn data<'a>(&mut self, input: &'a [u8], left: u32, pad: u32) -> Step<Unit<'a>> {
        let count = (left as usize).min(input.len());
        let (data, _) = input.split_at_checked(count).unwrap_or((input, &[]));
        if data.is_empty() {
            return Step { consumed: 0, event: None };
        }
        if self.digests.data {
            self.crc = crc32c::crc32c_append(self.crc, data);
        }
        // `count` is at most `left`, so it fits.
        let left = left.saturating_sub(u32::try_from(count).unwrap_or(left));
        self.state = if left == 0 { State::Trailer { pad } } else { State::Data { left, pad } };
        Step { consumed: count, event: Some(Unit::Data(data)) }
    }

    fn trailer<'a>(&mut self, input: &'a [u8], pad: u32) -> Step<Unit<'a>> {
        let Some(trailer) = input.get(..pad as usize) else { return Step { consumed: 0, event: None } };
        let intact = match trailer.split_last_chunk::<4>() {
            Some((zeros, digest)) if self.digests.data => {
                u32::from_le_bytes(*digest) == crc32c::crc32c_append(self.crc, zeros)
            }
            _ => true,
        };
        self.state = State::Header;
        Step { consumed: trailer.len(), event: Some(Unit::End { intact }) }
    }
}

/// Additional header segments must fill their part of the header exactly (11.2.2): each has a 16-bit length that counts from
/// its fourth byte on, and is padded to four.
fn check_ahs(ahs: &[u8]) -> Result<(), Violation> {
    let mut rest = ahs;
    while !rest.is_empty() {
        let length = usize::from(rest.u16_at(0)).saturating_add(3).next_multiple_of(4);
        rest = rest.get(length..).ok_or(Violation::Malformed("additional header"))?;
    }
    Ok(())
}

/// What follows a PDU's data: padding and, if agreed, its digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Trailer {
    bytes: [u8; 8],
    length: u8,
}

impl Trailer {
    /// Of a PDU with this data.
    pub fn of(data: &[u8], digests: Digests) -> Self {
        let pad = data.len().wrapping_neg() & 3;
        let mut trailer = Self::default();
        if data.is_empty() {
            return trailer;
        }
        let digest = if digests.data {
            crc32c::crc32c_append(crc32c::crc32c(data), trailer.bytes.get(..pad).unwrap_or_default())
        } else {
            0
        };
        if let Some(room) = trailer.bytes.get_mut(pad..).and_then(|rest| rest.first_chunk_mut()) {
            *room = digest.to_le_bytes();
        }
        let length = pad.saturating_add(if digests.data { 4 } else { 0 });
        trailer.length = u8::try_from(length).unwrap_or(8);
        trailer
    }

    /// As they go over the wire; 0 to 7 bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.length)).unwrap_or_default()
    }
}

/// Appends a PDU's header, for `data_length` bytes that the caller sends behind it, with a [`Trailer`] behind those.
pub fn put_header(out: &mut Vec<u8>, header: &Header, data_length: u32, digests: Digests) {
    let bhs = header.encode(data_length);
    out.extend_from_slice(&bhs);
    if digests.header {
        out.extend_from_slice(&crc32c::crc32c(&bhs).to_le_bytes());
    }
}

/// Appends a whole PDU. `data` is shorter than 2^24 bytes.
pub fn put(out: &mut Vec<u8>, header: &Header, data: &[u8], digests: Digests) {
    debug_assert!(data.len() <= super::MAX_DATA_SEGMENT as usize, "a data segment's length has 24 bits");
    put_header(out, header, u32::try_from(data.len()).unwrap_or(super::MAX_DATA_SEGMENT), digests);
    out.extend_from_slice(data);
    out.extend_from_slice(Trailer::of(data, digests).as_bytes());
}
