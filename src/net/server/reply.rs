//! What is going to be sent for a request: decided as a value, before a byte moves.

use std::fmt::Write;

use super::Fault;
use super::wire::Asked;
use crate::base::ByteRange;

/// How a body stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// As announced; the connection lives on.
    Whole,
    /// As announced, followed by this many bytes nobody asked for.
    Surplus(u64),
    /// The connection is closed after this many bytes.
    Cut(u64),
    /// The connection is reset after this many bytes.
    Reset(u64),
    /// Nothing follows these bytes, and the connection stays open.
    Stall(u64),
}

/// A response, ready to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) status: u16,
    /// Header lines, each with its line end; the empty line that ends the head is not included.
    headers: String,
    /// The bytes of the file that make the body.
    pub(super) body: ByteRange,
    pub(super) ending: Ending,
    /// Offset in the file of a byte to be sent inverted.
    pub(super) flip: Option<u64>,
}

impl Reply {
    /// A response without a body.
    pub(super) fn empty(status: u16) -> Self {
        let headers = "Content-Length: 0\r\n".to_owned();
        Self { status, headers, body: ByteRange::default(), ending: Ending::Whole, flip: None }
    }

    /// The answer for file `name` of `len` bytes (`None` if there is no such file), bent by `fault`.
    pub(super) fn new(name: &str, len: Option<u64>, asked: Option<Asked>, fault: &Fault) -> Self {
        match fault {
            Fault::Status { code, retry_after } => {
                let mut reply = Self::empty(*code);
                if let Some(seconds) = retry_after {
                    reply.header("Retry-After", seconds);
                }
                return reply;
            }
            Fault::Redirect { location } => {
                let mut reply = Self::empty(307);
                reply.header("Location", location);
                return reply;
            }
            _ => {}
        }
        let Some(len) = len else { return Self::empty(404) };
        let asked = if matches!(fault, Fault::IgnoreRange) { None } else { asked };
        let whole = ByteRange::at(0, len).unwrap_or_default();
        let (status, body) = match asked.map(|asked| asked.within(len)) {
            None => (200, whole),
            Some(Some(part)) => (206, part),
            Some(None) => {
                let mut reply = Self::empty(416);
                reply.header("Content-Range", format_args!("bytes */{len}"));
                return reply;
            }
        };
        let mut reply = Self { status, headers: String::new(), body, ending: Ending::Whole, flip: None };
        reply.header("Accept-Ranges", "bytes");
        reply.header("Content-Type", "application/octet-stream");
        if status == 206 {
            let shift = u64::from(matches!(fault, Fault::WrongContentRange));
            let (first, last) = (body.start() + shift, body.end() - 1 + shift);
            reply.header("Content-Range", format_args!("bytes {first}-{last}/{len}"));
        }
        reply.bend(name, fault);
        if !matches!(reply.ending, Ending::Surplus(_)) {
            reply.header("Content-Length", body.len());
        }
        reply
    }

    /// Applies the faults that leave the head of an answer mostly alone.
    fn bend(&mut self, name: &str, fault: &Fault) {
        match fault {
            Fault::Cut { after } => self.ending = Ending::Cut(*after),
            Fault::Reset { after } => self.ending = Ending::Reset(*after),
            Fault::Stall { after } => self.ending = Ending::Stall(*after),
            Fault::Surplus { bytes } => self.ending = Ending::Surplus(*bytes),
            Fault::Encoded => self.header("Content-Encoding", "gzip"),
            Fault::FlipByte { blob, offset } if blob == name => self.flip = Some(*offset),
            Fault::FlipByte { .. }
            | Fault::None
            | Fault::StallHead
            | Fault::IgnoreRange
            | Fault::WrongContentRange
            | Fault::Status { .. }
            | Fault::Redirect { .. } => {}
        }
    }

    fn header(&mut self, name: &str, value: impl std::fmt::Display) {
        let _ = write!(self.headers, "{name}: {value}\r\n");
    }

    /// Whether the connection ends with this response.
    pub(super) fn closes(&self) -> bool {
        self.ending != Ending::Whole
    }

    /// The head as it is sent.
    pub(super) fn head(&self, close: bool) -> String {
        let connection = if close || self.closes() { "close" } else { "keep-alive" };
        format!("HTTP/1.1 {} {}\r\n{}Connection: {connection}\r\n\r\n", self.status, reason(self.status), self.headers)
    }
}

/// The phrase people know; clients ignore it.
fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        206 => "Partial Content",
        307 => "Temporary Redirect",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        416 => "Range Not Satisfiable",
        500 => "Internal Server Error",
        503 => "Service Unavailable",
        _ => "Status",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(asked: Option<Asked>, fault: &Fault) -> String {
        Reply::new("a", Some(100), asked, fault).head(false)
    }

    #[test]
    fn a_range_is_answered_with_its_place_in_the_file() {
        let head = head(Some(Asked::Between(10, 19)), &Fault::None);

        assert!(head.starts_with("HTTP/1.1 206 Partial Content\r\n"), "{head}");
        assert!(head.contains("\r\nContent-Range: bytes 10-19/100\r\n"), "{head}");
        assert!(head.contains("\r\nContent-Length: 10\r\n"), "{head}");
    }

    #[test]
    fn a_range_behind_the_end_is_answered_with_the_length() {
        let head = head(Some(Asked::From(100)), &Fault::None);

        assert!(head.starts_with("HTTP/1.1 416 "), "{head}");
        assert!(head.contains("\r\nContent-Range: bytes */100\r\n"), "{head}");
    }

    #[test]
    fn a_cut_body_is_announced_whole() {
        let reply = Reply::new("a", Some(100), None, &Fault::Cut { after: 3 });

        assert_eq!((reply.status, reply.body.len(), reply.ending), (200, 100, Ending::Cut(3)));
        assert!(reply.head(false).contains("Content-Length: 100\r\n"));
    }

    #[test]
    fn only_the_named_blob_gets_a_flipped_byte() {
        let fault = Fault::FlipByte { blob: "a".into(), offset: 7 };

        assert_eq!(Reply::new("a", Some(100), None, &fault).flip, Some(7));
        assert_eq!(Reply::new("b", Some(100), None, &fault).flip, None);
    }

    #[test]
    fn missing_files_are_not_found_whatever_the_fault() {
        assert_eq!(Reply::new("a", None, None, &Fault::IgnoreRange), Reply::empty(404));
    }
}
