//! Times of day as protocols write them.

use std::time::{Duration, SystemTime};

/// A moment of UTC, taken apart.
struct Civil {
    year: u64,
    month: u64,
    day: u64,
    weekday: usize,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Civil {
    fn of(time: SystemTime) -> Self {
        let seconds = time.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs();
        let (days, rest) = (seconds / 86_400, seconds % 86_400);
        // Howard Hinnant's civil_from_days, for days after 1970.
        let shifted = days + 719_468;
        let (era, of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        Self {
            year: year_of_era + era * 400 + u64::from(month <= 2),
            month,
            day: day_of_year - (153 * shifted_month + 2) / 5 + 1,
            weekday: usize::try_from((days + 4) % 7).expect("small"),
            hour: rest / 3600,
            minute: rest / 60 % 60,
            second: rest % 60,
        }
    }
}

/// `Fri, 27 Nov 2026 06:00:00 GMT`.
pub fn http(time: SystemTime) -> String {
    const DAYS: [&str; 7] = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"];
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let Civil { year, month, day, weekday, hour, minute, second } = Civil::of(time);
    let month = MONTHS[usize::try_from(month - 1).expect("small")];
    format!("{}, {day:02} {month} {year} {hour:02}:{minute:02}:{second:02} GMT", DAYS[weekday])
}

/// `2026-11-27T06:00:00Z`.
pub fn rfc3339(time: SystemTime) -> String {
    let Civil { year, month, day, hour, minute, second, .. } = Civil::of(time);
    format!("{year}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// `20261127T060000Z`, as in signed addresses of S3.
pub fn compact(time: SystemTime) -> String {
    rfc3339(time).replace(['-', ':'], "")
}

/// The time `ahead` seconds ahead, or behind.
pub fn skewed(time: SystemTime, ahead: i64) -> SystemTime {
    let by = Duration::from_secs(ahead.unsigned_abs());
    if ahead < 0 { time - by } else { time + by }
}

#[test]
fn moments_are_written_as_others_write_them() {
    let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);

    assert_eq!(http(at(784_111_777)), "Sun, 06 Nov 1994 08:49:37 GMT");
    assert_eq!(rfc3339(at(951_782_400)), "2000-02-29T00:00:00Z");
    assert_eq!(compact(at(1_735_689_599)), "20241231T235959Z");
}
