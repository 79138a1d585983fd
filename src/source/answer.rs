//! What an answer to a ranged request means, judged by its head alone.

use std::time::Duration;

use reqwest::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderName};

use super::{Failure, SourceError};
use crate::base::{BlobId, ByteRange};
use crate::net::retry_after;

/// The head of an answer, seen from a request for a range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The body is the range, nothing else.
    Range,
    /// There is no such object.
    NotFound,
    /// The object is kept from us.
    Refused(u16),
    /// The object ends before the range does; its length, if the server told.
    Ends(Option<u64>),
    /// Not an answer to what was asked.
    Improper(String),
    /// Try again, perhaps after a while.
    Busy { status: u16, retry_after: Option<Duration> },
}

impl Answer {
    /// What is told of an answer of `place` that is not `range` of `blob`, to whoever wanted that.
    pub(super) fn failure(self, blob: &BlobId, place: &str, range: ByteRange) -> Failure {
        let (blob, place) = (blob.clone(), place.to_owned());
        let error = match self {
            Self::NotFound => SourceError::NotFound { blob, place },
            Self::Refused(status) => SourceError::Refused { blob, place, status },
            Self::Ends(Some(len)) => SourceError::OutOfRange { blob, place, range, len },
            Self::Improper(detail) => SourceError::NoRanges { place, detail },
            Self::Busy { status, retry_after } => {
                let detail = format!("it answered with status {status}");
                return Failure { error: SourceError::Unavailable { blob, place, detail }, retry_after };
            }
            Self::Ends(None) => {
                SourceError::NoRanges { place, detail: "it did not tell the length of the blob".into() }
            }
            Self::Range => SourceError::NoRanges { place, detail: "it sent what was not asked for".into() },
        };
        error.into()
    }

    /// Judges the answer to a request for `stored`, which is not empty.
    pub(super) fn to_range(status: u16, headers: &HeaderMap, stored: ByteRange) -> Self {
        match status {
            200 | 206 if is_encoded(headers) => Self::Improper("it compressed the body".into()),
            // Its length would say that the blob is cut short; it is the way into a network, or out of it.
            200 if is_page(headers) => Self::Improper("it sent a page in HTML".into()),
            200 => match content_length(headers) {
                Some(len) if len < stored.end() => Self::Ends(Some(len)),
                Some(len) if ByteRange::at(0, len) == Some(stored) => Self::Range,
                // Without a length the body decides; it must then be the whole object.
                None if stored.start() == 0 => Self::Range,
                _ => Self::Improper("it sent the whole object instead of a part".into()),
            },
            206 => Self::to_part(headers, stored),
            416 => Self::Ends(unsatisfied_length(headers)),
            _ => Self::failed(status, headers),
        }
    }

    fn to_part(headers: &HeaderMap, stored: ByteRange) -> Self {
        let Some(ContentRange { range, total }) = content_range(headers) else {
            return Self::Improper("it sent a part without saying which".into());
        };
        match total {
            Some(total) if total < stored.end() && range.start() == stored.start() && range.end() == total => {
                Self::Ends(Some(total))
            }
            _ if range != stored => Self::Improper(format!("it sent {range} when asked for {stored}")),
            _ => match content_length(headers) {
                Some(len) if len != stored.len() => {
                    Self::Improper(format!("it announced {len} bytes when asked for {stored}"))
                }
                _ => Self::Range,
            },
        }
    }

    /// Judges a status that is neither success nor 416.
    pub(super) fn failed(status: u16, headers: &HeaderMap) -> Self {
        match status {
            404 | 410 => Self::NotFound,
            408 | 425 | 429 | 500..=599 => Self::Busy { status, retry_after: retry_after(headers) },
            400..=499 => Self::Refused(status),
            _ => Self::Improper(format!("it answered with status {status}")),
        }
    }
}

/// A `Content-Range` of bytes that are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ContentRange {
    pub(super) range: ByteRange,
    /// Length of the whole object, unless the server does not know it.
    pub(super) total: Option<u64>,
}

impl ContentRange {
    /// Parses `bytes FIRST-LAST/TOTAL` or `bytes FIRST-LAST/*`, and nothing that merely looks alike.
    pub(super) fn parse(value: &str) -> Option<Self> {
        let (range, total) = value.strip_prefix("bytes ")?.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return None;
        }
        let range = ByteRange::new(first, last.checked_add(1)?)?;
        let total = if total == "*" { None } else { Some(number(total)?) };
        total.is_none_or(|total| range.end() <= total).then_some(Self { range, total })
    }
}

/// The announced length of the body. Read from the head: a `HEAD` answer has no body to measure.
pub(super) fn content_length(headers: &HeaderMap) -> Option<u64> {
    number(text(headers, &CONTENT_LENGTH)?)
}

/// The part of the object that the body is said to be.
pub(super) fn content_range(headers: &HeaderMap) -> Option<ContentRange> {
    ContentRange::parse(text(headers, &CONTENT_RANGE)?)
}

/// The length in `Content-Range: bytes */LENGTH`, which explains a 416.
pub(super) fn unsatisfied_length(headers: &HeaderMap) -> Option<u64> {
    number(text(headers, &CONTENT_RANGE)?.strip_prefix("bytes */")?)
}

/// Whether the body is not the object's own bytes, although nothing else was acceptable.
pub(super) fn is_encoded(headers: &HeaderMap) -> bool {
    headers.get_all(CONTENT_ENCODING).iter().any(|value| !value.as_bytes().eq_ignore_ascii_case(b"identity"))
}

fn is_page(headers: &HeaderMap) -> bool {
    let kind = text(headers, &CONTENT_TYPE).and_then(|value| value.split(';').next());
    kind.is_some_and(|kind| kind.trim().eq_ignore_ascii_case("text/html"))
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

/// Digits only: the standard parser would also take a sign.
fn number(text: &str) -> Option<u64> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use reqwest::header::{DATE, HeaderValue, RETRY_AFTER};

    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end).unwrap()
    }

    fn headers(pairs: &[(HeaderName, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), HeaderValue::from_static(value))).collect()
    }

    fn judge(status: u16, pairs: &[(HeaderName, &'static str)]) -> Answer {
        Answer::to_range(status, &headers(pairs), range(10, 20))
    }

    #[test]
    fn content_ranges_are_parsed_strictly() {
        let parsed = |start, end, total| Some(ContentRange { range: range(start, end), total });
        for (value, expected) in [
            ("bytes 0-9/100", parsed(0, 10, Some(100))),
            ("bytes 0-9/*", parsed(0, 10, None)),
            ("bytes 9-9/10", parsed(9, 10, Some(10))),
            ("bytes 0-9/9", None),
            ("bytes 9-0/10", None),
            ("bytes */10", None),
            ("bytes 0-9", None),
            ("bytes=0-9/10", None),
            ("bytes +0-9/10", None),
            ("bytes 0-9/10, 3-4/10", None),
            ("items 0-9/10", None),
            ("bytes -9/10", None),
            ("bytes 0-18446744073709551615/*", None),
        ] {
            assert_eq!(ContentRange::parse(value), expected, "{value}");
        }
    }

    #[test]
    fn a_part_is_accepted_only_if_it_is_the_one_asked_for() {
        assert_eq!(judge(206, &[(CONTENT_RANGE, "bytes 10-19/100"), (CONTENT_LENGTH, "10")]), Answer::Range);
        assert_eq!(judge(206, &[(CONTENT_RANGE, "bytes 10-19/*")]), Answer::Range);
        for wrong in ["bytes 11-20/100", "bytes 10-18/100", "bytes 10-20/100", "bytes 0-9/100", "rubbish"] {
            let answer = judge(206, &[(CONTENT_RANGE, wrong)]);
            assert!(matches!(answer, Answer::Improper(_)), "{wrong}: {answer:?}");
        }
        assert!(matches!(judge(206, &[]), Answer::Improper(_)));
        let longer = judge(206, &[(CONTENT_RANGE, "bytes 10-19/100"), (CONTENT_LENGTH, "11")]);
        assert!(matches!(longer, Answer::Improper(_)), "{longer:?}");
    }

    #[test]
    fn the_whole_object_is_accepted_only_if_it_was_asked_for() {
        let whole = headers(&[(CONTENT_LENGTH, "20")]);

        assert_eq!(Answer::to_range(200, &whole, range(0, 20)), Answer::Range);
        assert_eq!(Answer::to_range(200, &HeaderMap::new(), range(0, 20)), Answer::Range);
        assert!(matches!(Answer::to_range(200, &whole, range(0, 19)), Answer::Improper(_)));
        assert!(matches!(Answer::to_range(200, &whole, range(1, 20)), Answer::Improper(_)));
        assert!(matches!(Answer::to_range(200, &HeaderMap::new(), range(1, 20)), Answer::Improper(_)));
    }

    #[test]
    fn objects_that_end_too_early_are_recognized_in_every_disguise() {
        assert_eq!(judge(416, &[(CONTENT_RANGE, "bytes */5")]), Answer::Ends(Some(5)));
        assert_eq!(judge(416, &[]), Answer::Ends(None));
        assert_eq!(judge(206, &[(CONTENT_RANGE, "bytes 10-14/15")]), Answer::Ends(Some(15)));
        assert_eq!(judge(200, &[(CONTENT_LENGTH, "15")]), Answer::Ends(Some(15)));
    }

    #[test]
    fn compressed_bodies_are_never_taken_for_the_object() {
        for encoding in ["gzip", "identity, gzip", ""] {
            let answer = judge(206, &[(CONTENT_RANGE, "bytes 10-19/100"), (CONTENT_ENCODING, encoding)]);
            assert!(matches!(answer, Answer::Improper(_)), "{encoding:?}: {answer:?}");
        }
        assert_eq!(judge(206, &[(CONTENT_RANGE, "bytes 10-19/100"), (CONTENT_ENCODING, "Identity")]), Answer::Range);
    }

    #[test]
    fn a_page_for_people_says_nothing_about_the_object() {
        for kind in ["text/html", "Text/HTML; charset=utf-8"] {
            let answer = judge(200, &[(CONTENT_LENGTH, "15"), (CONTENT_TYPE, kind)]);
            assert!(matches!(answer, Answer::Improper(_)), "{kind}: {answer:?}");
        }
        assert_eq!(judge(200, &[(CONTENT_LENGTH, "15"), (CONTENT_TYPE, "text/plain")]), Answer::Ends(Some(15)));
    }

    #[test]
    fn failures_are_sorted_by_what_can_be_done_about_them() {
        let busy = |status, retry_after| Answer::Busy { status, retry_after };
        for (status, expected) in [
            (401, Answer::Refused(401)),
            (403, Answer::Refused(403)),
            (451, Answer::Refused(451)),
            (404, Answer::NotFound),
            (410, Answer::NotFound),
            (408, busy(408, None)),
            (425, busy(425, None)),
            (429, busy(429, None)),
            (500, busy(500, None)),
            (599, busy(599, None)),
            (204, Answer::Improper("it answered with status 204".into())),
            (304, Answer::Improper("it answered with status 304".into())),
        ] {
            assert_eq!(judge(status, &[]), expected, "{status}");
        }
        assert_eq!(judge(503, &[(RETRY_AFTER, "7")]), busy(503, Some(Duration::from_secs(7))));
        let until = (RETRY_AFTER, "Fri, 31 Dec 1999 23:59:59 GMT");
        for (date, pause) in [
            ("Fri, 31 Dec 1999 23:59:00 GMT", Some(Duration::from_secs(59))),
            ("Fri, 31 Dec 1999 23:59:59 GMT", Some(Duration::ZERO)),
            ("Sat, 01 Jan 2000 00:00:00 GMT", None),
            ("yesterday", None),
        ] {
            assert_eq!(judge(503, &[until.clone(), (DATE, date)]), busy(503, pause), "{date}");
        }
        assert_eq!(judge(503, &[until]), busy(503, None));
        assert_eq!(judge(503, &[(RETRY_AFTER, "soon"), (DATE, "Fri, 31 Dec 1999 23:59:00 GMT")]), busy(503, None));
    }
}
