//! Lengths of time as Go's library writes them, which Kubernetes uses.

use std::time::Duration;

/// A length of time as Go writes it: `1h30m`, `0s`, `1.5h`.
pub(super) fn go_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut seconds = 0.0_f64;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        seconds += number
            * match &rest[..unit] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "\u{b5}s" => 1e-6,
                "ns" => 1e-9,
                _ => return None,
            };
        rest = &rest[unit..];
    }
    if text.is_empty() { None } else { Duration::try_from_secs_f64(seconds).ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_go_writes_them() {
        for (text, seconds) in
            [("12h", 43_200.0), ("1h30m0s", 5400.0), ("0s", 0.0), ("0", 0.0), ("1.5m", 90.0), ("250ms", 0.25)]
        {
            assert_eq!(go_duration(text), Some(Duration::from_secs_f64(seconds)), "{text}");
        }
        for text in ["", "5", "h", "-1s", "1d", "1..2s", "9999999999999999999999h", "1 s", "\u{b5}s"] {
            assert_eq!(go_duration(text), None, "{text}");
        }
    }
}
