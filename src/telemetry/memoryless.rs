//! Lines of the log by a process that must not ask for memory, in the form of all others.
//!
//! A keeper speaks when something has gone wrong, which may be that there is no memory. What it says is put
//! together on the stack and cut off where that ends.

use std::fmt::{self, Write};
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tracing::Level;

use super::logging::Format;
use crate::base::Plain;

/// Longest line, in bytes. A path is 4096 at most, and is cut off.
const LINE: usize = 1024;

/// What all lines say they come from.
const TARGET: &str = "rafsd::daemon::keeper";

/// The log of a process that must not ask for memory.
#[derive(Clone, Copy, Debug)]
pub struct MemorylessLog {
    format: Format,
    errors: bool,
    warnings: bool,
}

impl MemorylessLog {
    /// Says what the log that was started before would say, in this form.
    pub fn new(format: Format) -> Self {
        let errors = tracing::enabled!(target: TARGET, Level::ERROR);
        let warnings = tracing::enabled!(target: TARGET, Level::WARN);
        Self { format, errors, warnings }
    }

    /// Something is wrong. Nothing that is said may allocate when it is put into words; an `io::Error` does.
    pub fn error(&self, what: fmt::Arguments<'_>) {
        if self.errors {
            self.say("ERROR", what);
        }
    }

    /// Something is not as it should be.
    pub fn warn(&self, what: fmt::Arguments<'_>) {
        if self.warnings {
            self.say("WARN", what);
        }
    }

    fn say(&self, level: &str, what: fmt::Arguments<'_>) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let line = line(self.format, now, level, what);
        // There is nobody to tell that nobody hears.
        let _ = nix::unistd::write(io::stderr(), line.bytes());
    }
}

/// A line that began with what it says and ends with its newline, whatever was cut off.
struct Line {
    bytes: [u8; LINE],
    len: usize,
    /// Bytes at the end that are kept free.
    spare: usize,
}

impl Line {
    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            let room = (LINE - self.spare).saturating_sub(self.len);
            if character.len_utf8() > room {
                self.spare = LINE;
                break;
            }
            let end = self.len + character.encode_utf8(&mut self.bytes[self.len..]).len();
            self.len = end;
        }
        Ok(())
    }
}

/// What is said, as part of a JSON string; control characters as blanks.
struct Quoted<'a>(&'a mut Line);

impl Write for Quoted<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|character| match character {
            '"' => self.0.write_str("\\\""),
            '\\' => self.0.write_str("\\\\"),
            other if other.is_control() => self.0.write_char(' '),
            other => self.0.write_char(other),
        })
    }
}

fn line(format: Format, now: Duration, level: &str, what: fmt::Arguments<'_>) -> Line {
    const END: &str = "\"}}\n";
    let mut line = Line { bytes: [0; LINE], len: 0, spare: END.len() };
    let now = Timestamp(now);
    // A line takes everything, and cuts off what has no room.
    let _ = match format {
        Format::Text => write!(line, "{now} {level:>5} {TARGET}: {}", Plain(what)),
        Format::Json => {
            let head =
                write!(line, r#"{{"timestamp":"{now}","level":"{level}","target":"{TARGET}","fields":{{"message":""#);
            head.and_then(|()| write!(Quoted(&mut line), "{what}"))
        }
    };
    line.spare = 0;
    let _ = line.write_str(if format == Format::Json { END } else { "\n" });
    line
}

/// A time since 1970, as logs have it: in UTC, to the microsecond.
struct Timestamp(Duration);

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, micros) = (self.0.as_secs(), self.0.subsec_micros());
        let (days, of_day) = (seconds / 86_400, seconds % 86_400);
        // Years from March to February, in eras of 400 years of 146097 days.
        let since = days + 719_468;
        let (era, of_era) = (since / 146_097, since % 146_097);
        let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year + year / 4 - year / 100);
        let month = (5 * of_year + 2) / 153;
        let day = of_year - (153 * month + 2) / 5 + 1;
        let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
        let (hours, minutes, seconds) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
        let year = era * 400 + year + next;
        write!(f, "{year:04}-{month:02}-{day:02}T{hours:02}:{minutes:02}:{seconds:02}.{micros:06}Z")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(format: Format, what: fmt::Arguments<'_>) -> String {
        String::from_utf8(line(format, Duration::from_micros(1_709_251_199_000_042), "ERROR", what).bytes().to_vec())
            .unwrap()
    }

    #[test]
    fn a_line_looks_like_those_of_others() {
        let expected = "2024-02-29T23:59:59.000042Z ERROR rafsd::daemon::keeper: it is over: 7\n";
        assert_eq!(said(Format::Text, format_args!("it is over: {}", 7)), expected);
        let hostile = said(Format::Text, format_args!("cannot unmount {}", "/mnt\n\u{1b}[2J"));
        assert!(hostile.ends_with(": cannot unmount /mnt\\n\\u{1b}[2J\n"), "{hostile:?}");
        let json = said(Format::Json, format_args!("a \"b\"\\\n{}", 'ü'));
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["fields"]["message"], "a \"b\"\\ ü");
        assert_eq!((&json["level"], &json["timestamp"]), (&"ERROR".into(), &"2024-02-29T23:59:59.000042Z".into()));
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, shown) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000Z"),
            (951_868_800, "2000-03-01T00:00:00.000000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000Z"),
        ] {
            assert_eq!(Timestamp(Duration::from_secs(seconds)).to_string(), shown);
        }
    }

    #[test]
    fn what_is_too_long_is_cut_off_and_stays_a_line() {
        let long = "ä".repeat(LINE);
        let text = said(Format::Text, format_args!("{long}"));
        assert!(text.ends_with("ä\n") && text.len() <= LINE, "{text}");
        let json = said(Format::Json, format_args!("{long}"));
        assert!(json.len() <= LINE && serde_json::from_str::<serde_json::Value>(&json).is_ok(), "{json}");
    }
}
