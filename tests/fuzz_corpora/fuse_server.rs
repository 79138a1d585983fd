//! A hostile kernel: requests of any bytes, through a socket in the place of `/dev/fuse`, into a server that runs.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rafsd::base::ByteRange;
use rafsd::cache::{Completion, Fill, FillError, Request};
use rafsd::export::fuse::tree::ImageTree;
use rafsd::export::fuse::wire::{ROOT, RequestHead, opcode};
use rafsd::export::fuse::{Connected, Fuse};
use rafsd::export::{Backing, LiveImage};
use rafsd::image::Image;
use rafsd::sys::fuse::Device;
use rafsd::telemetry::{Backend, Telemetry};
use zerocopy::IntoBytes;

use super::support::tree::Random;
use super::{bodies, corpus, mutate};

/// A device of zeros: some of it is there, some comes, and some does not.
struct Zeros {
    len: u64,
    file: Arc<File>,
    asked: AtomicU64,
}

impl Fill for Zeros {
    fn decoded_len(&self) -> u64 {
        self.len
    }

    fn present(&self, _: ByteRange) -> bool {
        self.asked.fetch_add(1, Ordering::Relaxed).is_multiple_of(2)
    }

    fn fill_for(&self, _: Request, _: ByteRange, done: Completion) {
        let outcome = match self.asked.fetch_add(1, Ordering::Relaxed) % 5 {
            0 => Err(FillError::Cancelled),
            // As a bug in the cache would have it.
            1 => return drop(done),
            _ => Ok(()),
        };
        done(outcome);
    }

    fn touched(&self, _: ByteRange) {}
}

impl Backing for Zeros {
    fn path(&self) -> &Path {
        Path::new("/nowhere")
    }

    fn file(&self) -> Arc<File> {
        self.file.clone()
    }

    fn is_settled(&self) -> bool {
        false
    }

    fn when_settled(&self, _: Box<dyn FnOnce() + Send>) {}
}

fn live(image: Image) -> LiveImage {
    let devices = image.devices().iter().map(|device| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(device.len).unwrap();
        Arc::new(Zeros { len: device.len, file: Arc::new(file), asked: AtomicU64::new(0) }) as Arc<dyn Backing>
    });
    LiveImage { devices: devices.collect(), image: Arc::new(image), bootstrap: "/nowhere".into() }
}

/// The kernel's end of a connection.
struct Kernel {
    socket: UnixDatagram,
    unique: u64,
    /// What was asked and not answered; some of it never is.
    asked: HashSet<u64>,
}

impl Kernel {
    fn send(&mut self, mut request: Vec<u8>) {
        self.unique += 1;
        // The kernel does not get these wrong, and answers could not be told apart without.
        let len = u32::try_from(request.len()).unwrap();
        if let Some(word) = request.get_mut(..4) {
            word.copy_from_slice(&len.to_ne_bytes());
        }
        if let Some(word) = request.get_mut(8..16) {
            word.copy_from_slice(&self.unique.to_ne_bytes());
        }
        self.asked.insert(self.unique);
        self.socket.send(&request).unwrap();
    }

    /// The next answer: its number and its error.
    fn answer(&mut self) -> (u64, i32) {
        let mut buffer = vec![0; 2 << 20];
        let len = self.socket.recv(&mut buffer).expect("an answer");
        let word = |at: usize| u32::from_ne_bytes(buffer[at..at + 4].try_into().unwrap());
        assert_eq!(word(0) as usize, len, "an answer says how long it is");
        let error = i32::from_ne_bytes(buffer[4..8].try_into().unwrap());
        assert!((-511..=0).contains(&error) && (error == 0 || len == 16), "{error}, {len} bytes");
        let unique = u64::from_ne_bytes(buffer[8..16].try_into().unwrap());
        assert!(self.asked.remove(&unique), "an answer to {unique}, which nobody waits for");
        (unique, error)
    }

    /// Asks for the attributes of the root and reads answers until that of this question. Earlier requests,
    /// which another thread works on, may be answered later.
    fn is_well(&mut self) -> bool {
        self.send(request(opcode::GETATTR, &[0; 16]));
        loop {
            if let (unique, error) = self.answer()
                && unique == self.unique
            {
                return error == 0;
            }
        }
    }
}

fn request(opcode: u32, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(size_of::<RequestHead>() + body.len()).unwrap();
    let head = RequestHead { len, opcode, unique: 0, node: ROOT, uid: 0, gid: 0, pid: 1, extensions: 0, padding: 0 };
    [head.as_bytes(), body].concat()
}

fn connect(server: &Arc<Fuse>, image: Image) -> (Kernel, Connected) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    nix::sys::socket::setsockopt(&theirs, nix::sys::socket::sockopt::SndBuf, &(4 << 20)).unwrap();
    let device = Device::from_fd(theirs.into()).unwrap();
    let tree = Arc::new(ImageTree::new(&live(image)));
    let connected = server.connect(device, tree, Backend::FuseTree).unwrap();
    let mut kernel = Kernel { socket: ours, unique: 0, asked: HashSet::new() };
    let words = [7u32, 45, 131_072, 0x73ff_fffb, 0x3ff].map(u32::to_ne_bytes).concat();
    kernel.send(request(opcode::INIT, &[words, vec![0; 44]].concat()));
    assert_eq!(kernel.answer(), (1, 0), "shake hands");
    (kernel, connected)
}

/// The requests that a seed is made of.
fn requests(mut seed: &[u8]) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    while let [low, high, rest @ ..] = seed {
        let (request, rest) = rest.split_at(usize::from(u16::from_le_bytes([*low, *high])));
        all.push(request.to_vec());
        seed = rest;
    }
    all
}

#[test]
fn a_server_answers_on_whatever_a_kernel_asks() {
    let server = Fuse::new(Telemetry::default()).unwrap();
    let threads: Vec<_> = (0..2)
        .map(|_| {
            let server = server.clone();
            std::thread::spawn(move || server.run())
        })
        .collect();
    let seeds: Vec<Vec<u8>> = corpus("fuse_wire").values().flat_map(|seed| requests(seed)).collect();
    let inputs: Vec<&[u8]> = seeds.iter().map(Vec::as_slice).collect();
    let mut random = Random::new(20);
    for (name, input) in corpus("bootstrap") {
        let image = Image::parse(bodies::bootstrap::unpack(&input)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let nodes = image.summary().bootstrap_len / 32 + 4;
        let (mut kernel, connected) = connect(&server, image);
        for number in 0..600 {
            let mut input = mutate(&mut random, &inputs);
            // Often one that there is.
            if let Some(word) = input.get_mut(16..24).filter(|_| number % 4 != 0) {
                word.copy_from_slice(&random.below(nodes).to_ne_bytes());
            }
            input.truncate(8000);
            // A socket cannot tell an empty request from its end, and the kernel sends none.
            if !input.is_empty() {
                kernel.send(input);
                assert!(kernel.is_well(), "{name}, request {number}");
            }
        }
        let until = Instant::now() + Duration::from_secs(10);
        while connected.connection().waiting() > 0 {
            assert!(Instant::now() < until, "{name}: somebody was forgotten");
            std::thread::yield_now();
        }
        assert!(!connected.connection().has_ended(), "{name}");
        connected.close();
    }
    server.stop();
    for thread in threads {
        thread.join().expect("no thread has panicked").unwrap();
    }
}
