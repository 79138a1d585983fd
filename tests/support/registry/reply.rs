//! The answer to a request for a part of a blob, and everything that can be wrong with it.

use std::io::Write;
use std::time::Duration;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;

use super::body::Ending;
use super::fault::Fault;

/// An answer before it is sent.
#[derive(Clone, Debug)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: Bytes,
    /// Whether the length is said beforehand.
    pub(super) measured: bool,
    pub(super) ending: Ending,
    /// How long to wait with it; for ever.
    pub(super) late: Option<Duration>,
}

impl Reply {
    pub(super) fn new(status: u16, body: impl Into<Bytes>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), measured: true, ending: Ending::Whole, late: None }
    }

    pub(super) fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// The part that `asked`, the value of `Range`, names; everything if there is none.
    pub(super) fn to_range(blob: &Bytes, asked: Option<&str>, fault: Option<&Fault>) -> Self {
        let len = blob.len();
        let Some(asked) = asked else {
            return Self::new(200, blob.clone()).with("accept-ranges", "bytes").bent(fault);
        };
        let Some((start, end)) = parse(asked, len) else {
            return Self::new(416, "").with("content-range", format!("bytes */{len}"));
        };
        if let Some(reply) = Self::instead_of_range(blob, start, end, fault) {
            return reply;
        }
        Self::part(blob, start, end).bent(fault)
    }

    fn part(blob: &Bytes, start: usize, end: usize) -> Self {
        let place = format!("bytes {start}-{}/{}", end - 1, blob.len());
        Self::new(206, blob.slice(start..end)).with("content-range", place)
    }

    fn instead_of_range(blob: &Bytes, start: usize, end: usize, fault: Option<&Fault>) -> Option<Self> {
        let (len, exact) = (blob.len(), blob.slice(start..end));
        let under = |place: String| Self::new(206, exact.clone()).with("content-range", place);
        Some(match fault? {
            Fault::WholeFor206 => Self::new(200, blob.clone()),
            Fault::OtherRange => {
                let by = if start > 0 { start - 1 } else { 1 };
                Self::part(blob, by, (by + end - start).min(len))
            }
            Fault::WrongContentRange => under(format!("bytes {}-{}/{}", start + 1, end, len + 1)),
            Fault::WrongTotal => under(format!("bytes {start}-{}/{}", end - 1, end - 1)),
            Fault::NoContentRange => Self::new(206, exact),
            Fault::Multipart => {
                let head = format!("--x\r\ncontent-range: bytes {start}-{}/{len}\r\n\r\n", end - 1);
                let body = [head.as_bytes(), &exact, b"\r\n--x--\r\n"].concat();
                Self::new(206, body).with("content-type", "multipart/byteranges; boundary=x")
            }
            Fault::ShorterRange => Self::part(blob, start, start + (end - start).div_ceil(2)),
            Fault::Page => {
                Self::new(200, "<html>Please log in to the network</html>").with("content-type", "text/html")
            }
            _ => return None,
        })
    }

    /// The same answer with a fault of its body.
    fn bent(mut self, fault: Option<&Fault>) -> Self {
        match fault {
            Some(Fault::Reset { after }) => self.ending = Ending::Reset(size(*after)),
            Some(Fault::Cut { after }) => self.ending = Ending::Cut(size(*after)),
            Some(Fault::Stall { after }) => self.ending = Ending::Stall(size(*after)),
            Some(Fault::Trickle) => self.ending = Ending::Trickle,
            Some(Fault::Surplus(more)) => {
                self.measured = false;
                self.body = [&self.body[..], &vec![0x55; size(*more)]].concat().into();
            }
            Some(Fault::Missing(fewer)) => {
                self.measured = false;
                self.body.truncate(self.body.len() - size(*fewer).min(self.body.len()));
            }
            Some(Fault::Flip) => {
                let mut bytes = self.body.to_vec();
                let middle = bytes.len() / 2;
                bytes[middle] ^= 4;
                self.body = bytes.into();
            }
            Some(Fault::Zeros) => self.body = vec![0; self.body.len()].into(),
            Some(Fault::Gzip) => {
                let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
                gzip.write_all(&self.body).expect("memory");
                self.body = gzip.finish().expect("memory").into();
                self.headers.push(("content-encoding", "gzip".to_owned()));
            }
            _ => {}
        }
        self
    }
}

/// `bytes=A-B` or `bytes=A-` within a body of `len` bytes: the first byte, and the one behind the last.
fn parse(asked: &str, len: usize) -> Option<(usize, usize)> {
    let (start, last) = asked.strip_prefix("bytes=")?.split_once('-')?;
    let start: usize = start.parse().ok()?;
    let last: usize = if last.is_empty() { len.checked_sub(1)? } else { last.parse().ok()? };
    (start < len && start <= last).then(|| (start, last.saturating_add(1).min(len)))
}

fn size(bytes: u64) -> usize {
    usize::try_from(bytes).expect("fits into memory")
}
