//! Medians with their spread.

use std::fmt;

/// Measurements of one contender.
#[derive(Default)]
pub(super) struct Spread(Vec<f64>);

impl Spread {
    pub(super) fn push(&mut self, value: f64) {
        self.0.push(value);
        self.0.sort_by(f64::total_cmp);
    }

    /// The middle value; the mean of the two middle ones of an even number.
    pub(super) fn median(&self) -> f64 {
        let n = self.0.len();
        match n {
            0 => f64::NAN,
            _ if n % 2 == 1 => self.0[n / 2],
            _ => f64::midpoint(self.0[n / 2 - 1], self.0[n / 2]),
        }
    }
}

/// `median (lowest–highest)`.
impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |value: f64| if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.1}") };
        match (self.0.first(), self.0.last()) {
            (Some(&low), Some(&high)) => write!(f, "{} ({}–{})", show(self.median()), show(low), show(high)),
            _ => f.write_str("–"),
        }
    }
}
