//! PAX records: what an extended header says about the member that follows.

use super::sparse::Segment;

/// Most bytes of extended headers and long names that one member may have. Ours and GNU tar's are far
/// below; without a limit a few bytes of archive could ask for any amount of memory.
pub(super) const MAX_EXTENSION: u64 = 1 << 20;

/// What one member's extended headers said.
#[derive(Debug, Default)]
pub(super) struct Extensions {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u64>,
    pub gid: Option<u64>,
    /// Seconds, and nanoseconds counted forwards from them.
    pub mtime: Option<(i64, u32)>,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub sparse: PaxSparse,
    /// Xattr names of ACLs that were given as text. The names of users in it mean something only
    /// where they were written, so it is not translated.
    pub text_acls: Vec<&'static [u8]>,
}

/// The `GNU.sparse` records, in any of their three versions.
#[derive(Debug, Default)]
pub(super) struct PaxSparse {
    pub name: Option<Vec<u8>>,
    /// Size of the file with its holes.
    pub real_size: Option<u64>,
    /// Versions 0.0 and 0.1: the map itself.
    pub map: Vec<Segment>,
    /// Version 1.0: the map is in front of the content.
    pub map_in_content: bool,
    pub is_sparse: bool,
    offset: Option<u64>,
}

impl Extensions {
    /// Applies the records in `bytes` over what earlier ones said.
    pub(super) fn apply(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        while !bytes.is_empty() {
            let (key, value, rest) = record(bytes).ok_or("damaged extended header")?;
            self.record(key, value)?;
            bytes = rest;
        }
        Ok(())
    }

    /// ACLs that the member has in no other form.
    pub(super) fn lost_acls(&self) -> u64 {
        let kept = |acl: &[u8]| self.xattrs.iter().any(|(name, _)| name == acl);
        self.text_acls.iter().filter(|acl| !kept(acl)).count() as u64
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), String> {
        let number =
            || decimal(value).ok_or_else(|| format!("extended header: {} is not a number", key.escape_ascii()));
        // An empty value takes back what an earlier header said.
        let unless_empty = || (!value.is_empty()).then(|| value.to_vec());
        match key {
            b"path" => self.path = unless_empty(),
            b"linkpath" => self.link = unless_empty(),
            b"size" => self.size = if value.is_empty() { None } else { Some(number()?) },
            b"uid" => self.uid = if value.is_empty() { None } else { Some(number()?) },
            b"gid" => self.gid = if value.is_empty() { None } else { Some(number()?) },
            b"mtime" if value.is_empty() => self.mtime = None,
            b"mtime" => self.mtime = Some(time(value).ok_or("extended header: mtime is not a time")?),
            b"SCHILY.acl.access" => self.text_acls.push(b"system.posix_acl_access"),
            b"SCHILY.acl.default" => self.text_acls.push(b"system.posix_acl_default"),
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.push((decoded(name), value.to_vec()));
                } else if let Some(field) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.record(field, value)?;
                }
            }
        }
        Ok(())
    }
}

impl PaxSparse {
    fn record(&mut self, field: &[u8], value: &[u8]) -> Result<(), String> {
        let number = || decimal(value).ok_or("extended header: damaged sparse map");
        match field {
            b"name" => self.name = Some(value.to_vec()),
            b"size" | b"realsize" => self.real_size = Some(number()?),
            b"offset" => self.offset = Some(number()?),
            b"numbytes" => {
                let offset = self.offset.take().ok_or("extended header: damaged sparse map")?;
                self.map.push(Segment { offset, len: number()? });
            }
            b"map" => {
                let numbers: Option<Vec<u64>> = value.split(|b| *b == b',').map(decimal).collect();
                let numbers = numbers.filter(|numbers| numbers.len().is_multiple_of(2));
                let numbers = numbers.ok_or("extended header: damaged sparse map")?;
                self.map = numbers.chunks_exact(2).map(|pair| Segment { offset: pair[0], len: pair[1] }).collect();
            }
            b"major" => match number()? {
                0 => {}
                1 => self.map_in_content = true,
                other => return Err(format!("sparse format {other} is not known")),
            },
            b"minor" | b"numblocks" => {}
            _ => return Ok(()),
        }
        self.is_sparse = true;
        Ok(())
    }
}

/// The first record of `bytes`, `LENGTH KEY=VALUE\n`, and what follows it. The length counts all
/// of the record, so a value may hold anything.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|b| *b == b' ')?;
    let len = usize::try_from(decimal(&bytes[..space])?).ok()?;
    let (record, rest) = bytes.split_at_checked(len)?;
    let body = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|b| *b == b'=')?;
    let key = &body[..equals];
    (!key.is_empty()).then_some((key, &body[equals + 1..], rest))
}

/// An xattr's name out of a key, which ends at the first `=`: GNU tar writes `%3D` for that, and
/// `%25` for the percent sign. Whoever does not, means what is there.
fn decoded(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&first, behind)) = rest.split_first() {
        let (byte, behind) = match behind.split_at_checked(2) {
            Some((b"3D", behind)) if first == b'%' => (b'=', behind),
            Some((b"25", behind)) if first == b'%' => (b'%', behind),
            _ => (first, behind),
        };
        out.push(byte);
        rest = behind;
    }
    out
}

/// A plain decimal number.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > 20 {
        return None;
    }
    text.iter().try_fold(0u64, |value, digit| match digit {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

/// A time as decimal seconds with a fraction; digits beyond nanoseconds are cut off.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |b| *b == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let mut nanos = 0u32;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    for i in 0..9 {
        nanos = nanos * 10 + u32::from(fraction.get(i).map_or(0, |digit| digit - b'0'));
    }
    Some(match (negative, nanos) {
        (false, _) => (seconds, nanos),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanos),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_count_their_fraction_forwards() {
        type Case = (&'static [u8], Option<(i64, u32)>);
        let cases: [Case; 8] = [
            (b"0", Some((0, 0))),
            (b"12.5", Some((12, 500_000_000))),
            (b"1.0000000019", Some((1, 1))),
            (b"-1", Some((-1, 0))),
            (b"-0.25", Some((-1, 750_000_000))),
            (b"-5.000000001", Some((-6, 999_999_999))),
            (b"1.x", None),
            (b"99999999999999999999", None),
        ];
        for (text, want) in cases {
            assert_eq!(time(text), want, "{}", text.escape_ascii());
        }
    }

    #[test]
    fn values_may_hold_newlines_and_equals_signs() {
        let mut extensions = Extensions::default();
        extensions.apply(b"30 SCHILY.xattr.user.a=x\n=\0y\n\n12 path=a/b\n").unwrap();
        assert_eq!(extensions.xattrs, [(b"user.a".to_vec(), b"x\n=\0y\n".to_vec())]);
        assert_eq!(extensions.path.as_deref(), Some(b"a/b".as_slice()));
    }

    #[test]
    fn names_of_xattrs_are_read_as_gnu_tar_writes_them() {
        for (key, name) in [("a%3Db%25", "a=b%"), ("%253D", "%3D"), ("50%", "50%"), ("%2", "%2"), ("%3d", "%3d")] {
            assert_eq!(decoded(key.as_bytes()), name.as_bytes());
        }
    }

    #[test]
    fn lengths_that_do_not_fit_are_errors() {
        for bad in [
            b"".as_slice(),
            b"5",
            b"0 a=b\n",
            b"3 a=b\n",
            b"7 a=b\n",
            b"99999999999999999999 a=b\n",
            b"6 a=bx",
            b"5 =b\n",
        ] {
            assert_eq!(record(bad), None, "{}", bad.escape_ascii());
        }
    }
}
