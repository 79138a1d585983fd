use std::io::{self, BufWriter, Write};
use std::ops::ControlFlow;
use std::path::Path;

use super::header::{Member, RECORD, header};
use super::{UnpackError, UnpackReport, announce, device, path_of};
use crate::build::Progress;
use crate::image::{FirstPaths, Image, Inode, Kind, Visit};
use crate::reader::{FileReader, Files, Piece, ReadError};
use crate::tools::output::OutputFile;

/// Bytes gathered before they are written.
const BUFFER: usize = 1 << 18;

/// Zeros written at once.
const ZEROS: [u8; 4096] = [0; 4096];

/// Writes everything in the image to a tar archive at `path`, which is replaced when the archive is
/// complete and on disk.
///
/// # Errors
/// As [`to_stream`].
pub fn to_archive(files: &Files, path: &Path, progress: &dyn Progress) -> Result<UnpackReport, UnpackError> {
    let failed = |source| UnpackError::Write { path: path.to_owned(), source };
    let output = OutputFile::create(path).map_err(failed)?;
    let report = to_stream(files, &mut output.file(), progress).map_err(|error| match error {
        UnpackError::Stream(source) => failed(source),
        other => other,
    })?;
    output.finish().map_err(failed)?;
    Ok(report)
}

/// Writes everything in the image to `out` as a tar archive: ustar with PAX records where needed.
/// The same image gives the same bytes. Sockets are left out and counted.
///
/// # Errors
/// An [`UnpackError`] that names the entry at fault; what was written until then is no archive.
pub fn to_stream(files: &Files, out: &mut dyn Write, progress: &dyn Progress) -> Result<UnpackReport, UnpackError> {
    announce(files.image(), progress);
    let mut writer = Writer {
        image: files.image(),
        reader: files.reader(),
        out: BufWriter::with_capacity(BUFFER, out),
        progress,
        linked: FirstPaths::default(),
        report: UnpackReport::default(),
    };
    let mut walk = files.image().walk();
    let mut last = Vec::new();
    while let Some(step) = walk.next_visit() {
        let step = step.map_err(|cause| UnpackError::Image { path: path_of(&[&last]), cause })?;
        last = step.path.join(&b'/');
        writer.entry(&last, &step)?;
        progress.advance(1, 0);
    }
    // Two records of zeros end an archive.
    let ended = writer.out.write_all(&[0; 2 * RECORD]).and_then(|()| writer.out.flush());
    ended.map_err(UnpackError::Stream)?;
    Ok(writer.report)
}

struct Writer<'a> {
    image: &'a Image,
    reader: FileReader<'a>,
    out: BufWriter<&'a mut dyn Write>,
    progress: &'a dyn Progress,
    /// Of files with several paths.
    linked: FirstPaths<'a>,
    report: UnpackReport,
}

impl<'a> Writer<'a> {
    /// Writes one member; `path` is that of `visit` with slashes.
    fn entry(&mut self, path: &[u8], visit: &Visit<'_, 'a>) -> Result<(), UnpackError> {
        let inode = &visit.inode;
        let image = |cause| UnpackError::Image { path: path_of(&[path]), cause };
        if inode.kind == Kind::Socket {
            self.report.skipped.sockets += 1;
            return Ok(());
        }
        if inode.kind != Kind::Directory && inode.nlink > 1 {
            if let Some(first) = self.linked.get(inode.nid) {
                let header = header(path, inode, Member::Link(&first.join(&b'/')), &[]);
                self.report.hard_links += 1;
                return self.out.write_all(&header).map_err(UnpackError::Stream);
            }
            self.linked.note(inode.nid, visit.path);
        }
        let mut xattrs = Vec::new();
        let walked = self.image.xattrs(inode, &mut |xattr| {
            xattrs.push((xattr.name(), xattr.value));
            ControlFlow::Continue(())
        });
        walked.map_err(image)?;
        let target;
        let mut name = path.to_vec();
        let member = match inode.kind {
            Kind::Directory => {
                name = if path.is_empty() { b"./".to_vec() } else { [path, b"/"].concat() };
                Member::Directory
            }
            Kind::Regular => Member::Regular,
            Kind::Symlink => {
                target = self.image.symlink(inode).map_err(image)?;
                Member::Symlink(&target)
            }
            Kind::Character | Kind::Block => {
                let (major, minor) = device(inode.rdev);
                Member::Device { major, minor }
            }
            Kind::Fifo | Kind::Socket => Member::Fifo,
        };
        self.out.write_all(&header(&name, inode, member, &xattrs)).map_err(UnpackError::Stream)?;
        if inode.kind == Kind::Regular {
            self.content(path, inode)?;
        }
        self.report.count(inode.kind, inode.size);
        Ok(())
    }

    fn content(&mut self, path: &[u8], inode: &Inode) -> Result<(), UnpackError> {
        let (out, progress) = (&mut self.out, self.progress);
        let copied = self.reader.read(inode, &mut |piece| {
            let len = match piece {
                Piece::Bytes(bytes) => {
                    out.write_all(bytes)?;
                    bytes.len() as u64
                }
                Piece::Zeros(len) => {
                    zeros(out, len)?;
                    len
                }
            };
            progress.advance(0, len);
            Ok(())
        });
        match copied.and_then(|()| Ok(zeros(out, inode.size.next_multiple_of(RECORD as u64) - inode.size)?)) {
            Ok(()) => Ok(()),
            Err(Failure::Read(cause)) => Err(UnpackError::Content { path: path_of(&[path]), cause: Box::new(cause) }),
            Err(Failure::Write(error)) => Err(UnpackError::Stream(error)),
        }
    }
}

fn zeros(out: &mut dyn Write, mut len: u64) -> io::Result<()> {
    while len > 0 {
        let piece = usize::try_from(len).unwrap_or(usize::MAX).min(ZEROS.len());
        out.write_all(&ZEROS[..piece])?;
        len -= piece as u64;
    }
    Ok(())
}

/// The two ways in which a file is not copied.
enum Failure {
    Read(ReadError),
    Write(io::Error),
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        Self::Read(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Write(error)
    }
}
