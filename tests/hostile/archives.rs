//! Archives that are small and ask for much.

use std::io::{self, Read};
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use rafsd::build::{BuildError, BuildReport, BuildSpec, Compression, Source, build};

use super::allocations::peak_of;

fn build_from(stream: impl Read + 'static) -> Result<BuildReport, BuildError> {
    let out = tempfile::tempdir().unwrap();
    let source = Source::Archive { name: "hostile.tar".into(), stream: Box::new(stream) };
    let mut spec = BuildSpec::new(source, out.path());
    (spec.compression, spec.chunk_size, spec.threads) = (Compression::None, 4096, NonZeroUsize::MIN);
    build(spec, &())
}

/// PAX records with `count` xattrs whose names start with `prefix`.
fn xattrs(prefix: &str, count: usize) -> Vec<(String, Vec<u8>)> {
    (0..count).map(|number| (format!("SCHILY.xattr.{prefix}{number:05}"), Vec::new())).collect()
}

fn append(tar: &mut tar::Builder<Vec<u8>>, xattrs: &[(String, Vec<u8>)]) {
    tar.append_pax_extensions(xattrs.iter().map(|(name, value)| (name.as_str(), value.as_slice()))).unwrap();
}

fn add_file(tar: &mut tar::Builder<Vec<u8>>, name: &str) {
    let mut header = tar::Header::new_ustar();
    header.set_size(0);
    header.set_mode(0o644);
    tar.append_data(&mut header, name, io::empty()).unwrap();
}

/// Comparing each name with each takes minutes for these.
#[test]
fn very_many_xattrs_take_time_in_proportion() {
    let mut tar = tar::Builder::new(Vec::new());
    for number in 0..10 {
        append(&mut tar, &xattrs("user.", 20_000));
        add_file(&mut tar, &number.to_string());
    }
    let archive = tar.into_inner().unwrap();

    let clock = Instant::now();
    let report = build_from(io::Cursor::new(archive)).unwrap();

    assert_eq!(report.files, 10);
    assert!(clock.elapsed() < Duration::from_secs(8), "{:?}", clock.elapsed());
}

#[test]
fn extended_headers_in_a_row_count_as_one() {
    let mut tar = tar::Builder::new(Vec::new());
    append(&mut tar, &xattrs("user.", 10_000));
    let one = tar.get_ref().clone();
    // The same bytes over and over without an end, as a short gzip stream could hold them.
    let (error, peak) = peak_of(|| build_from(Endless { bytes: one, at: 0 }).unwrap_err());

    assert!(matches!(error, BuildError::Archive { .. }), "{error}");
    assert!(error.to_string().contains("1 MiB"), "{error}");
    assert!(peak < 16 << 20, "{peak} bytes of memory");
}

struct Endless {
    bytes: Vec<u8>,
    at: usize,
}

impl Read for Endless {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = &self.bytes[self.at..];
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        self.at = (self.at + len) % self.bytes.len();
        Ok(len)
    }
}
