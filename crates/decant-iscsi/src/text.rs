//! Text as login and text requests carry it: `key=value`, each ended by a zero byte, over one PDU or several (6.1).

use crate::error::Violation;

/// Longest key name, bytes (6.1).
pub const MAX_KEY: usize = 63;
/// Longest value that is accepted, bytes: the standard's 255 for names and lists does not hold for binary values, of which
/// the longest, a CHAP challenge of 1024 bytes, has 2050 digits.
pub const MAX_VALUE: usize = 4096;
/// Most bytes of text in one exchange, continuation included: what a whole login says is under 2 KiB.
pub const MAX_TEXT: usize = 16 * 1024;
/// Most pairs in one exchange.
pub const MAX_PAIRS: usize = 128;

/// Text that arrives, collected until a PDU comes without the C bit.
#[derive(Debug, Clone, Default)]
pub struct TextIn {
    bytes: Vec<u8>,
}

impl TextIn {
    /// Adds part of a PDU's data.
    ///
    /// # Errors
    /// More than [`MAX_TEXT`].
    pub fn push(&mut self, data: &[u8]) -> Result<(), Violation> {
        let length = self.bytes.len().saturating_add(data.len());
        if length > MAX_TEXT {
            return Err(Violation::TooLong { what: "text", length: length as u64, limit: MAX_TEXT as u64 });
        }
        self.bytes.extend_from_slice(data);
        Ok(())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Takes all pairs, in order, and leaves nothing.
    ///
    /// # Errors
    /// Text that is not pairs, or has a key twice.
    pub fn take(&mut self) -> Result<Pairs, Violation> {
        Pairs::parse(&std::mem::take(&mut self.bytes))
    }
}

/// The pairs of one exchange.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pairs {
    pairs: Vec<(String, String)>,
}

impl Pairs {
    /// From text in which every pair is ended by a zero byte. Zero bytes in excess, with which some initiators fill up a
    /// PDU, are passed over.
    ///
    /// # Errors
    /// As [`TextIn::take`].
    pub fn parse(text: &[u8]) -> Result<Self, Violation> {
        let mut pairs: Vec<(String, String)> = Vec::new();
        if text.last().is_some_and(|last| *last != 0) {
            return Err(Violation::Malformed("text: its last pair does not end"));
        }
        for pair in text.split(|byte| *byte == 0).filter(|pair| !pair.is_empty()) {
            let pair = std::str::from_utf8(pair).map_err(|_| Violation::Malformed("text: not UTF-8"))?;
            let (key, value) = pair.split_once('=').ok_or(Violation::Malformed("text: a pair without ="))?;
            if key.is_empty() || !key.bytes().all(is_key_byte) {
                return Err(Violation::Malformed("text: key"));
            }
            if key.len() > MAX_KEY {
                return Err(Violation::TooLong { what: "key", length: key.len() as u64, limit: MAX_KEY as u64 });
            }
            if value.len() > MAX_VALUE {
                return Err(Violation::TooLong { what: "value", length: value.len() as u64, limit: MAX_VALUE as u64 });
            }
            if pairs.len() >= MAX_PAIRS {
                return Err(Violation::Malformed("text: too many pairs"));
            }
            // A key may be negotiated once (6.3); the one exception, TargetAddress, is only ever sent by a target, in
            // answer to SendTargets, as is TargetName there.
            if key != "TargetAddress" && key != "TargetName" && pairs.iter().any(|(known, _)| known == key) {
                return Err(Violation::Malformed("text: a key twice"));
            }
            pairs.push((key.to_owned(), value.to_owned()));
        }
        Ok(Self { pairs })
    }

    /// The value of `key`, the first if it is there more than once.
    pub fn value(&self, key: &str) -> Option<&str> {
        self.pairs.iter().find(|(known, _)| known == key).map(|(_, value)| value.as_str())
    }

    /// All of them in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.pairs.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }
}

fn is_key_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b".-+@_#".contains(&byte)
}

/// Text to be sent, handed out in pieces that fit the peer's PDUs.
#[derive(Debug, Clone, Default)]
pub struct TextOut {
    bytes: Vec<u8>,
    sent: usize,
}

impl TextOut {
    /// Adds a pair.
    pub fn push(&mut self, key: &str, value: &str) {
        self.bytes.extend_from_slice(key.as_bytes());
        self.bytes.push(b'=');
        self.bytes.extend_from_slice(value.as_bytes());
        self.bytes.push(0);
    }

    /// Whether everything was handed out.
    pub fn is_empty(&self) -> bool {
        self.sent >= self.bytes.len()
    }

    /// The next piece, of at most `limit` bytes, and whether more follow (the C bit). Pairs may be cut anywhere (6.2).
    pub fn next_piece(&mut self, limit: usize) -> (Vec<u8>, bool) {
        let rest = self.bytes.get(self.sent..).unwrap_or_default();
        let piece = rest.get(..limit.max(1)).unwrap_or(rest).to_vec();
        self.sent = self.sent.saturating_add(piece.len());
        let more = !self.is_empty();
        if !more {
            self.bytes.clear();
            self.sent = 0;
        }
        (piece, more)
    }
}

/// A number as text has it: decimal or, with 0x, hexadecimal (6.1).
pub fn number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) if digits.bytes().all(|byte| byte.is_ascii_hexdigit()) => u32::from_str_radix(digits, 16).ok(),
        Some(_) => None,
        None if text.bytes().all(|byte| byte.is_ascii_digit()) => text.parse().ok(),
        None => None,
    }
}

/// Bytes as text has them: hexadecimal with 0x, base 64 with 0b (6.1). At most `limit` of them; `None` also for none.
pub fn binary(text: &str, limit: usize) -> Option<Vec<u8>> {
    let (prefix, digits) = text.split_at_checked(2)?;
    let bytes = match prefix {
        "0x" | "0X" => hexadecimal(digits)?,
        "0b" | "0B" => base64(digits)?,
        _ => return None,
    };
    (!bytes.is_empty() && bytes.len() <= limit).then_some(bytes)
}

fn hexadecimal(digits: &str) -> Option<Vec<u8>> {
    let nibble = |byte: &u8| char::from(*byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    // An odd count of digits has a leading zero left out.
    let (first, rest) = digits.as_bytes().split_at_checked(digits.len() & 1)?;
    let mut bytes = Vec::with_capacity(digits.len().div_ceil(2));
    if let [one] = first {
        bytes.push(nibble(one)?);
    }
    for pair in rest.chunks_exact(2) {
        let [high, low] = pair else { return None };
        bytes.push((nibble(high)? << 4) | nibble(low)?);
    }
    Some(bytes)
}

fn base64(digits: &str) -> Option<Vec<u8>> {
    if !digits.len().is_multiple_of(4) {
        return None;
    }
    let body = digits.trim_end_matches('=');
    if digits.len().saturating_sub(body.len()) > 2 {
        return None;
    }
    let mut bytes = Vec::with_capacity(body.len());
    let (mut bits, mut count) = (0u32, 0u32);
    for byte in body.bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte.wrapping_sub(b'A'),
            b'a'..=b'z' => byte.wrapping_sub(b'a').wrapping_add(26),
            b'0'..=b'9' => byte.wrapping_sub(b'0').wrapping_add(52),
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6) | u32::from(value);
        count = count.wrapping_add(6);
        if count >= 8 {
            count = count.wrapping_sub(8);
            let [_, _, _, low] = (bits >> (count & 31)).to_be_bytes();
            bytes.push(low);
        }
    }
    // What is left over must be zero bits, or the same bytes had two spellings.
    let left = bits & (1u32 << (count & 31)).wrapping_sub(1);
    (left == 0).then_some(bytes)
}

/// Bytes as hexadecimal text, with 0x.
pub fn to_hexadecimal(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(bytes.len().saturating_mul(2).saturating_add(2));
    text.push_str("0x");
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Longest iSCSI name, bytes (4.2.7.1).
const MAX_NAME: usize = 223;
/// What separates names from what stands beside them: in text, in URLs, and in lists that people write.
const SEPARATORS: &str = ",;=/\\\"'?#%";

/// Whether this is an iSCSI name as it should be (4.2.7, RFC 3722): `iqn.`, `eui.` or `naa.`, at most 223 bytes. Names of our
/// own are. Upper case is let pass, which normalisation would have made lower case: compare names with that in mind.
pub fn is_name(name: &str) -> bool {
    is_name_of(name, |c| c.is_alphanumeric() || "-.:".contains(c))
}

/// Whether this is taken for an iSCSI name of a peer's: some tools put names of hosts and machines into theirs as they are, with
/// `_` and what else can be printed. No spaces, and nothing that separates.
pub fn is_peer_name(name: &str) -> bool {
    is_name_of(name, |c| c.is_alphanumeric() || (c.is_ascii_graphic() && !SEPARATORS.contains(c)))
}

/// What [`is_peer_name`] asks of a name, for whoever wrote another.
pub const PEER_NAME: &str =
    "they begin with iqn., eui. or naa., have at most 223 bytes, and neither spaces nor any of , ; = / \\ \" ' ? # %";

fn is_name_of(name: &str, visible: impl Fn(char) -> bool) -> bool {
    let kind = name.get(..4).is_some_and(|kind| matches!(kind, "iqn." | "eui." | "naa."));
    kind && name.len() > 4 && name.len() <= MAX_NAME && name.chars().all(visible)
}
