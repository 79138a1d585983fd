//! The few lines of HTTP/1.1 a static server has to understand: a request head and its range.

use crate::base::ByteRange;

/// Longest request head that is read, in bytes. Ours are a few hundred.
pub(super) const MAX_HEAD: usize = 16 << 10;

/// What a request wants of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    Get,
    Head,
}

/// One `Range: bytes=...` with a single range, as it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// `a-b`, both included.
    Between(u64, u64),
    /// `a-`.
    From(u64),
    /// `-n`: the last `n` bytes.
    Last(u64),
}

impl Asked {
    /// Parses the value of a `Range` header. `None` for several ranges, other units and nonsense,
    /// all of which a server may ignore (RFC 9110 section 14.2).
    pub(super) fn parse(value: &str) -> Option<Self> {
        let (first, last) = value.trim().strip_prefix("bytes=")?.split_once('-')?;
        match (first.is_empty(), last.is_empty()) {
            (true, true) => None,
            (true, false) => Some(Self::Last(number(last)?)),
            (false, true) => Some(Self::From(number(first)?)),
            (false, false) => {
                let (first, last) = (number(first)?, number(last)?);
                (first <= last).then_some(Self::Between(first, last))
            }
        }
    }

    /// The bytes of a file of `len` bytes that are meant; `None` if there is not one of them.
    pub(super) fn within(self, len: u64) -> Option<ByteRange> {
        let range = match self {
            Self::Between(first, last) => ByteRange::new(first, last.saturating_add(1))?.clamp_end(len),
            Self::From(first) => ByteRange::new(first, u64::MAX)?.clamp_end(len),
            Self::Last(count) => ByteRange::new(len.saturating_sub(count), len)?,
        };
        (!range.is_empty()).then_some(range)
    }
}

/// The part of a request head that matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) method: Method,
    /// Path of the target without the leading slash and without its query; not decoded.
    pub(super) name: String,
    pub(super) asked: Option<Asked>,
    /// Whether the client wants the connection closed after the answer.
    pub(super) close: bool,
}

/// Why a request head cannot be answered, as a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadRequest(pub(super) u16);

/// Parses a request head, given without the empty line that ends it.
pub(super) fn parse_head(bytes: &[u8]) -> Result<Head, BadRequest> {
    let text = std::str::from_utf8(bytes).map_err(|_| BadRequest(400))?;
    let mut lines = text.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (Some(method), Some(target), Some(version), None) = (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(BadRequest(400));
    };
    let method = match method {
        "GET" => Method::Get,
        "HEAD" => Method::Head,
        _ => return Err(BadRequest(405)),
    };
    let path = target.split_once('?').map_or(target, |(path, _)| path);
    let name = path.strip_prefix('/').ok_or(BadRequest(400))?.to_owned();
    let mut head = Head { method, name, asked: None, close: version != "HTTP/1.1" };
    for line in lines {
        let (key, value) = line.split_once(':').ok_or(BadRequest(400))?;
        let value = value.trim();
        match key.to_ascii_lowercase().as_str() {
            "range" => head.asked = Asked::parse(value),
            "connection" => head.close |= value.eq_ignore_ascii_case("close"),
            // A body would be read as the next request; nobody who fetches a file sends one.
            "transfer-encoding" => return Err(BadRequest(411)),
            "content-length" if value != "0" => return Err(BadRequest(413)),
            _ => {}
        }
    }
    Ok(head)
}

/// Digits only: the standard parser would also take a sign.
fn number(text: &str) -> Option<u64> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_single_byte_ranges_are_understood() {
        for (value, asked) in [
            ("bytes=0-0", Some(Asked::Between(0, 0))),
            ("bytes=5-", Some(Asked::From(5))),
            ("bytes=-7", Some(Asked::Last(7))),
            ("bytes=0-1,4-5", None),
            ("bytes=2-1", None),
            ("bytes=+1-2", None),
            ("bytes=-", None),
            ("items=0-1", None),
            ("bytes=0-99999999999999999999", None),
        ] {
            assert_eq!(Asked::parse(value), asked, "{value}");
        }
    }

    #[test]
    fn ranges_end_where_the_file_does() {
        let within = |asked: Asked, len| asked.within(len).map(|r| (r.start(), r.end()));

        assert_eq!(within(Asked::Between(2, 99), 10), Some((2, 10)));
        assert_eq!(within(Asked::Between(0, u64::MAX), 10), Some((0, 10)));
        assert_eq!(within(Asked::Between(10, 11), 10), None);
        assert_eq!(within(Asked::From(9), 10), Some((9, 10)));
        assert_eq!(within(Asked::Last(99), 10), Some((0, 10)));
        assert_eq!(within(Asked::Last(0), 10), None);
        assert_eq!(within(Asked::From(0), 0), None);
    }

    #[test]
    fn heads_are_parsed_without_their_query() {
        let head = parse_head(b"GET /abc?sig=1 HTTP/1.1\r\nHost: x\r\nRANGE:  bytes=1-2\r\nConnection: close").unwrap();

        assert_eq!(
            head,
            Head { method: Method::Get, name: "abc".into(), asked: Some(Asked::Between(1, 2)), close: true }
        );
    }

    #[test]
    fn heads_that_are_not_plain_reads_are_refused() {
        for (bytes, status) in [
            (&b"GET /"[..], 400),
            (b"", 400),
            (b"GET abc HTTP/1.1", 400),
            (b"GET /a HTTP/1.1\r\nno colon", 400),
            (b"GET /\xff HTTP/1.1", 400),
            (b"POST /a HTTP/1.1", 405),
            (b"GET /a HTTP/1.1\r\nTransfer-Encoding: chunked", 411),
            (b"GET /a HTTP/1.1\r\nContent-Length: 3", 413),
        ] {
            assert_eq!(parse_head(bytes), Err(BadRequest(status)), "{}", bytes.escape_ascii());
        }
    }
}
