//! Messages with descriptors over `SOCK_SEQPACKET` sockets, without allocating.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect as connect_socket,
    listen as listen_socket, recvmsg, sendmsg, socket_with, socketpair,
};

/// How long connecting may wait behind others.
const QUEUE: Duration = Duration::from_secs(1);

/// Two connected sockets that keep message boundaries, both close-on-exec.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

fn socket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Listens at `path`, replacing what a dead process left there.
pub fn listen(path: &Path) -> io::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let socket = socket()?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen_socket(&socket, 16)?;
    Ok(socket)
}

/// Connects to who listens at `path`.
///
/// # Errors
/// `NotFound` or `ConnectionRefused` if nobody does, `WouldBlock` if whoever does has taken no connection for long.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket()?;
    // It bounds the wait for room in the listener's queue as well.
    set_socket_timeout(&socket, Timeout::Send, Some(QUEUE))?;
    connect_socket(&socket, &SocketAddrUnix::new(path)?)?;
    set_socket_timeout(&socket, Timeout::Send, None)?;
    Ok(socket)
}

/// Takes the next connection.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    Ok(accept_with(listener, SocketFlags::CLOEXEC)?)
}

/// Process and user at the other end of a connection, as they were when it was made.
pub fn peer(socket: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    let peer = socket_peercred(socket)?;
    Ok((peer.pid.as_raw_nonzero().get().cast_unsigned(), peer.uid.as_raw()))
}

/// Lets neither sending nor receiving take longer than `timeout`.
pub fn set_timeout(socket: BorrowedFd<'_>, timeout: Option<Duration>) -> io::Result<()> {
    set_socket_timeout(socket, Timeout::Recv, timeout)?;
    Ok(set_socket_timeout(socket, Timeout::Send, timeout)?)
}

/// Sends `bytes` with at most one descriptor.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let rights = fd.as_slice();
    if !rights.is_empty() && !control.push(SendAncillaryMessage::ScmRights(rights)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives one message into `buffer`: its length, and a descriptor if one came along. `None` when
/// the other side has gone.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Option<(usize, Option<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut received = None;
    for control in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = control {
            // Surplus ones are closed on drop.
            received = fds.last();
        }
    }
    Ok((message.bytes > 0).then_some((message.bytes, received)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    #[test]
    fn a_descriptor_arrives_with_its_message() {
        let dir = tempfile::tempdir().unwrap();
        let listener = listen(&dir.path().join("socket")).unwrap();
        let left = connect(&dir.path().join("socket")).unwrap();
        let right = accept(listener.as_fd()).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"hello").unwrap();

        send(left.as_fd(), b"take this", Some(file.as_fd())).unwrap();
        let mut buffer = [0; 64];
        let (len, fd) = receive(right.as_fd(), &mut buffer).unwrap().unwrap();

        assert_eq!(&buffer[..len], b"take this");
        assert_eq!(peer(right.as_fd()).unwrap().0, std::process::id());
        let mut copy = File::from(fd.unwrap());
        copy.rewind().unwrap();
        let mut text = String::new();
        copy.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    use std::fs::File;

    #[test]
    fn a_closed_peer_is_told_from_silence() {
        let (left, right) = pair().unwrap();
        let mut buffer = [0; 64];
        send(left.as_fd(), b"x", None).unwrap();
        drop(left);
        assert!(receive(right.as_fd(), &mut buffer).unwrap().is_some());
        assert!(receive(right.as_fd(), &mut buffer).unwrap().is_none());
    }
}
