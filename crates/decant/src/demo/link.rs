//! `--link RATE,DELAY`.

use std::str::FromStr;
use std::time::Duration;

/// What the links between the demo's workers can carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Link {
    /// Bits per second, each direction of each worker.
    pub(crate) bits_per_s: u64,
    /// One way.
    pub(crate) delay: Duration,
}

impl FromStr for Link {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fail = || format!("{text:?} is no link: write a rate and a delay, e.g. 200mbit,5ms");
        let (rate, delay) = text.split_once(',').ok_or_else(fail)?;
        let digits = rate.find(|c: char| !c.is_ascii_digit()).ok_or_else(fail)?;
        let (number, unit) = rate.split_at(digits);
        let number: u64 = number.parse().map_err(|_| fail())?;
        let scale = match unit {
            "kbit" => 1_000,
            "mbit" => 1_000_000,
            "gbit" => 1_000_000_000,
            _ => return Err(fail()),
        };
        let bits_per_s = number.checked_mul(scale).filter(|bits| *bits >= 1_000_000).ok_or_else(fail)?;
        let delay = crate::cli::parse_duration(delay)?;
        if delay > 2_000 {
            return Err("a delay above 2s is no network".to_owned());
        }
        Ok(Self { bits_per_s, delay: Duration::from_millis(delay) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_read_as_people_write_them() {
        let link: Link = "200mbit,5ms".parse().expect("a link");
        assert_eq!(link, Link { bits_per_s: 200_000_000, delay: Duration::from_millis(5) });
        for text in ["", "200mbit", "200,5ms", "mbit,5ms", "10kbit,5ms", "1gbit,1h", "99999999999999999999gbit,1ms"] {
            assert!(text.parse::<Link>().is_err(), "{text}");
        }
    }
}
