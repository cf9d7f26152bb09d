//! The JSON area (LUKS2 on-disk format 1.1, §3): typed where we use it, kept as it is where we do not.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde::ser::Serializer;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The whole area.
#[derive(Serialize, Deserialize)]
pub(crate) struct Metadata {
    pub(crate) keyslots: Objects<Keyslot>,
    pub(crate) tokens: Objects<Value>,
    pub(crate) segments: Objects<Segment>,
    pub(crate) digests: Objects<Digest>,
    pub(crate) config: Config,
}

/// Objects by their number. A repeated number is an error: two readers could pick different ones.
pub(crate) struct Objects<T>(pub(crate) BTreeMap<String, T>);

impl<T> Objects<T> {
    pub(crate) fn one(object: T) -> Self {
        Self(BTreeMap::from([("0".to_owned(), object)]))
    }

    pub(crate) fn none() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T: Serialize> Serialize for Objects<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Objects<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Numbered<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Numbered<T> {
            type Value = Objects<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("objects by number")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut objects = BTreeMap::new();
                while let Some(number) = map.next_key::<String>()? {
                    // 32 of each is the most that LUKS2 has.
                    if number.is_empty() || number.len() > 2 || !number.bytes().all(|b| b.is_ascii_digit()) {
                        return Err(A::Error::custom("an object's name is no number"));
                    }
                    if objects.insert(number, map.next_value()?).is_some() {
                        return Err(A::Error::custom("an object is there twice"));
                    }
                }
                Ok(Objects(objects))
            }
        }
        deserializer.deserialize_map(Numbered(PhantomData))
    }
}

/// A keyslot: ours, or of a kind that is tolerated and kept.
pub(crate) enum Keyslot {
    Luks2(Box<Luks2Keyslot>),
    Unknown(Value),
}

impl Serialize for Keyslot {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Luks2(keyslot) => keyslot.serialize(serializer),
            Self::Unknown(value) => value.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Keyslot {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        if value.get("type").and_then(Value::as_str) == Some("luks2") {
            let keyslot = Luks2Keyslot::deserialize(value).map_err(D::Error::custom)?;
            Ok(Self::Luks2(Box::new(keyslot)))
        } else {
            Ok(Self::Unknown(value))
        }
    }
}

/// §3.2.
#[derive(Serialize, Deserialize)]
pub(crate) struct Luks2Keyslot {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) key_size: u32,
    /// 0 never tried, 1 normal, 2 preferred.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) priority: Option<u32>,
    pub(crate) af: Splitter,
    pub(crate) area: Area,
    pub(crate) kdf: KdfObject,
}

/// §3.2.3.
#[derive(Serialize, Deserialize)]
pub(crate) struct Splitter {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) stripes: u32,
    pub(crate) hash: String,
}

/// §3.2.2.
#[derive(Serialize, Deserialize)]
pub(crate) struct Area {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    #[serde(with = "decimal")]
    pub(crate) offset: u64,
    #[serde(with = "decimal")]
    pub(crate) size: u64,
    pub(crate) encryption: String,
    pub(crate) key_size: u32,
}

/// §3.2.4, all kinds in one: which fields must be there depends on the type.
#[derive(Serialize, Deserialize)]
pub(crate) struct KdfObject {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) hash: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) iterations: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) time: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) memory: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cpus: Option<u32>,
    pub(crate) salt: String,
}

/// §3.3. Any other field is kept in `extra`, to be refused: it would change what the bytes mean.
#[derive(Serialize, Deserialize)]
pub(crate) struct Segment {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    #[serde(with = "decimal")]
    pub(crate) offset: u64,
    /// A number, or `dynamic`: to the end of the device.
    pub(crate) size: String,
    #[serde(default, with = "optional_decimal", skip_serializing_if = "Option::is_none")]
    pub(crate) iv_tweak: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) encryption: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sector_size: Option<u32>,
    #[serde(flatten)]
    pub(crate) extra: BTreeMap<String, Value>,
}

/// §3.4.
#[derive(Serialize, Deserialize)]
pub(crate) struct Digest {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) keyslots: Vec<String>,
    pub(crate) segments: Vec<String>,
    #[serde(default)]
    pub(crate) hash: String,
    #[serde(default)]
    pub(crate) iterations: u32,
    #[serde(default)]
    pub(crate) salt: String,
    #[serde(default)]
    pub(crate) digest: String,
}

/// §3.5.
#[derive(Serialize, Deserialize)]
pub(crate) struct Config {
    #[serde(with = "decimal")]
    pub(crate) json_size: u64,
    #[serde(with = "decimal")]
    pub(crate) keyslots_size: u64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) flags: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) requirements: Option<Value>,
}

/// Reads what LUKS2 writes as a string of decimal digits, because JSON numbers do not hold 64 bits everywhere.
pub(crate) fn parse_decimal(text: &str) -> Option<u64> {
    let plain = !text.is_empty() && text.len() <= 20 && text.bytes().all(|b| b.is_ascii_digit());
    if plain { text.parse().ok() } else { None }
}

mod decimal {
    use serde::de::{Deserialize, Deserializer, Error as _};
    use serde::ser::Serializer;

    pub(super) fn serialize<S: Serializer>(number: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(number)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        let text = String::deserialize(deserializer)?;
        super::parse_decimal(&text).ok_or_else(|| D::Error::custom("not a decimal number of 64 bits"))
    }
}

mod optional_decimal {
    use serde::de::{Deserialize, Deserializer, Error as _};
    use serde::ser::Serializer;

    pub(super) fn serialize<S: Serializer>(number: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
        match number {
            Some(number) => serializer.collect_str(number),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
        let text = String::deserialize(deserializer)?;
        super::parse_decimal(&text).map(Some).ok_or_else(|| D::Error::custom("not a decimal number of 64 bits"))
    }
}
