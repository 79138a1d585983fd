//! Archives from a seed: few names, so that members hit each other, and every awkward thing often.

use super::member::{Content, Damage, Island, Item, Long, Member, Numbers, Sparse, Style, What};
use super::model::{Model, normal};
use crate::support::tree::Random;

/// A list of members from a generator. About one in six cannot become an image.
pub fn items(random: &mut Random) -> Vec<Item> {
    let mut items = sound(random, 25);
    if random.below(8) == 0 {
        let at = below(random, items.len() + 1);
        let item = if random.below(2) == 0 { Item::Member(refused(random)) } else { Item::Damaged(damage(random)) };
        items.insert(at, item);
    }
    items
}

/// Members that can also be made with system calls, for trees in a directory.
pub fn tree(random: &mut Random) -> Vec<Item> {
    let mut items = sound(random, u64::MAX);
    for item in &mut items {
        let Item::Member(member) = item else { continue };
        member.xattrs.retain(|(name, _)| !name.starts_with(b"com."));
        // Links have no mode of their own.
        if matches!(member.what, What::Symlink(_)) {
            member.mode = 0o777;
        }
    }
    items
}

/// Layers of one image, the lowest first, with whiteouts and with other kinds of entries over what
/// is below. Every parent is listed, since readers differ about those that are not.
pub fn layers(random: &mut Random, count: usize) -> Vec<Vec<Item>> {
    let mut made = Vec::new();
    (0..count).map(|number| layer(random, &mut made, number > 0)).collect()
}

fn layer(random: &mut Random, made: &mut Vec<Vec<u8>>, whiteouts: bool) -> Vec<Item> {
    let (mut model, mut items) = (Model::default(), Vec::new());
    for _ in 0..=random.below(16) {
        let mut member = member(random, made);
        let Ok(path) = normal(&member.path) else { continue };
        // Device 0/0 is a whiteout of another kind.
        let marked = path.windows(4).any(|four| four == b".wh.") || matches!(member.what, What::Character(0, 0));
        if marked || path.is_empty() {
            continue;
        }
        let mut parts = vec![];
        for at in (0..path.len()).filter(|at| path[*at] == b'/') {
            if !model.has_directory(&path[..at]) {
                parts.push(Member { path: path[..at].to_vec(), what: What::Directory, ..member.clone() });
            }
        }
        parts.iter_mut().for_each(|parent| parent.xattrs.clear());
        // Links have no mode of their own.
        if matches!(member.what, What::Symlink(_)) {
            member.mode = 0o777;
        }
        if whiteouts && random.below(3) == 0 {
            member = whiteout(random, &path, member);
        }
        parts.push(member);
        let mut next = model.clone();
        if parts.iter().all(|member| next.put(member).is_ok()) && next.skipped_xattrs == 0 {
            model = next;
            items.extend(parts.into_iter().map(Item::Member));
        }
    }
    items
}

/// A marker that removes `path`, or, below the root, everything beside it.
fn whiteout(random: &mut Random, path: &[u8], member: Member) -> Member {
    let at = path.iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1);
    // The name of the marker has to fit as well.
    let name = &path[at..path.len().min(at + 251)];
    let name = if at > 0 && random.below(3) == 0 { b".wh..opq" } else { name };
    let what = What::File(Content { size: 0, islands: Vec::new() });
    Member { path: [&path[..at], b".wh.", name].concat(), what, xattrs: Vec::new(), ..member }
}

/// Up to 24 parts of an archive. One in `refused` of those that make it unfit stays.
fn sound(random: &mut Random, refused: u64) -> Vec<Item> {
    let (mut model, mut made, mut items) = (Model::default(), Vec::new(), Vec::new());
    for _ in 0..=random.below(24) {
        let item = item(random, &mut made);
        if let Item::Member(member) = &item {
            let mut next = model.clone();
            if next.put(member).is_ok() {
                model = next;
            } else if random.below(refused) > 0 {
                continue;
            }
        }
        items.push(item);
    }
    items
}

fn below(random: &mut Random, limit: usize) -> usize {
    usize::try_from(random.below(limit as u64)).unwrap()
}

fn pick<T: Clone>(random: &mut Random, from: &[T]) -> T {
    from[below(random, from.len())].clone()
}

fn item(random: &mut Random, made: &mut Vec<Vec<u8>>) -> Item {
    match random.below(20) {
        0 => Item::EndMark,
        1 => Item::Global(vec![(b"comment".to_vec(), b"0123\n=\0abc".to_vec())]),
        _ => Item::Member(member(random, made)),
    }
}

fn member(random: &mut Random, made: &mut Vec<Vec<u8>>) -> Member {
    let path = path(random, made);
    let is_root = path.iter().all(|b| b"./".contains(b)) && !path.windows(2).any(|two| two == b"..");
    let what = if is_root { What::Directory } else { what(random, made) };
    let style = style(random);
    let mtime = pick(
        random,
        &[
            (0, 0),
            (1_700_000_000, 0),
            (1_700_000_000, 999_999_999),
            (-1, 500_000_000),
            (-1, 0),
            (-86_400 * 365 * 50, 1),
            // Behind 2106 and 2242, the ends of 32 bits and of eleven octal digits.
            (4_294_967_296, 5),
            (8_589_934_592, 0),
            (60_000_000_000, 123_456_789),
        ],
    );
    let mut member = Member {
        path,
        mode: pick(random, &[0o644, 0o755, 0o7777, 0, 0o100_644, 0o4711]),
        uid: pick(random, &[0, 1000, 65_534, 2_097_151, 2_097_152, 4_294_967_293]),
        gid: pick(random, &[0, 100, 70_000, 4_000_000_000]),
        // Only a record has room for a fraction.
        mtime: if style.numbers == Numbers::Pax { mtime } else { (mtime.0, 0) },
        xattrs: xattrs(random, &what),
        what,
        style,
    };
    if matches!(member.what, What::Directory) && random.below(3) == 0 {
        member.path.push(b'/');
    }
    made.push(member.path.strip_suffix(b"/").unwrap_or(&member.path).to_vec());
    member
}

/// A new path, often below or on top of one that is there.
fn path(random: &mut Random, made: &[Vec<u8>]) -> Vec<u8> {
    let mut path = match random.below(10) {
        0..3 if !made.is_empty() => pick(random, made),
        3..5 if !made.is_empty() => [pick(random, made), b"/".to_vec(), name(random)].concat(),
        5 => return pick(random, &[b"/".to_vec(), b"./".to_vec(), b".".to_vec(), b"./.".to_vec()]),
        _ => name(random),
    };
    for _ in 0..random.below(4) {
        path = [path.as_slice(), b"/", &name(random)].concat();
    }
    match random.below(800) {
        // Refused, so rarely.
        0 => [b"/".as_slice(), &path].concat(),
        1..=100 => [b"./".as_slice(), &path].concat(),
        101..=200 => path.iter().flat_map(|b| if *b == b'/' { b"//./".to_vec() } else { vec![*b] }).collect(),
        _ => path,
    }
}

fn name(random: &mut Random) -> Vec<u8> {
    match random.below(12) {
        0 => pick(
            random,
            &[
                b"x y".to_vec(),
                b"\xff\xfe\x80".to_vec(),
                b"new\nline".to_vec(),
                b"a=b".to_vec(),
                b"...".to_vec(),
                b"..dots".to_vec(),
                b".wh.a".to_vec(),
                b".wh..wh..opq".to_vec(),
                b"-".to_vec(),
                b"caf\xc3\xa9".to_vec(),
                b"\x01".to_vec(),
            ],
        ),
        1 => vec![b'n'; pick(random, &[99, 100, 101, 155, 254, 255])],
        _ => vec![pick(random, b"abcde")],
    }
}

fn what(random: &mut Random, made: &[Vec<u8>]) -> What {
    match random.below(16) {
        0..6 => What::File(content(random)),
        6..9 => What::Directory,
        9..11 if !made.is_empty() => {
            let target = pick(random, made);
            What::HardLink(if random.below(3) == 0 { [b"./".as_slice(), &target].concat() } else { target })
        }
        11 | 12 => What::Symlink(pick(
            random,
            &[
                b"a".to_vec(),
                b"../../up".to_vec(),
                b"/absolute//./kept".to_vec(),
                b"\xff\n=".to_vec(),
                vec![b't'; 100],
                vec![b't'; 101],
                b"long/".repeat(819),
            ],
        )),
        13 => What::Character(pick(random, &[0, 1, 255, 256, 4095]), pick(random, &[0, 3, 255, 256, 1_048_575])),
        14 => What::Block(pick(random, &[0, 8, 259, 4095]), pick(random, &[0, 65_536, 1_048_575])),
        15 => What::Fifo,
        _ => What::File(content(random)),
    }
}

/// Sizes around the edges of tar blocks and of chunks of 4 KiB; holes on tar blocks, since readers
/// of sparse members differ about anything else.
fn content(random: &mut Random) -> Content {
    let size = pick(random, &[0, 1, 511, 512, 513, 4095, 4096, 4097, 8192, 9000, 20_000]);
    // Few seeds, so that contents come again.
    let seed = random.below(12);
    if random.below(3) > 0 || size < 1024 {
        let islands = if size == 0 { vec![] } else { vec![Island { at: 0, len: size, seed }] };
        return Content { size: size as u64, islands };
    }
    let (mut islands, mut at) = (Vec::new(), 512 * random.below(3));
    let longest = pick(random, &[1, 1, 8]);
    while at < size as u64 {
        let len = (512 * (1 + random.below(longest))).min(size as u64 - at);
        islands.push(Island { at, len: usize::try_from(len).unwrap(), seed: seed + at });
        at += len + 512 * (1 + random.below(longest));
    }
    Content { size: size as u64, islands }
}

fn xattrs(random: &mut Random, what: &What) -> Vec<(Vec<u8>, Vec<u8>)> {
    if random.below(4) > 0 || matches!(what, What::HardLink(_)) {
        return Vec::new();
    }
    let space: &[u8] = match what {
        // The kernel lets nobody read other ones of these.
        What::File(_) | What::Directory => pick(random, &[b"user.".as_slice(), b"trusted.", b"security."]),
        _ => b"trusted.",
    };
    let mut xattrs = vec![([space, b"a"].concat(), b"\0\n=binary\xff 12 path=x\n".to_vec())];
    match random.below(8) {
        0 => xattrs.push(([space, &vec![b'n'; 255 - space.len()]].concat(), b"longest name".to_vec())),
        1 => xattrs.push(([space, b"big"].concat(), random.noise(65_535))),
        2 => xattrs.push(([space, b"empty"].concat(), Vec::new())),
        3 => xattrs.push(([space, b"with=equals"].concat(), b"=".to_vec())),
        4 => xattrs.push((b"com.example.unknown".to_vec(), b"dropped".to_vec())),
        // The same name again: the later one holds.
        5 => xattrs.push(([space, b"a"].concat(), b"again".to_vec())),
        _ => {}
    }
    xattrs
}

fn style(random: &mut Random) -> Style {
    Style {
        long: pick(random, &[Long::Gnu, Long::Pax, Long::Prefix]),
        numbers: pick(random, &[Numbers::Octal, Numbers::Base256, Numbers::Pax]),
        sparse: pick(random, &[Sparse::No, Sparse::OldGnu, Sparse::Pax00, Sparse::Pax01, Sparse::Pax10]),
        file_type: pick(random, &[b'0', b'0', 0, b'7']),
        strange_records: random.below(5) == 0,
    }
}

/// A member that no image can hold.
fn refused(random: &mut Random) -> Member {
    let plain = |path: &[u8], what| Member {
        path: path.to_vec(),
        what,
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: (0, 0),
        xattrs: Vec::new(),
        style: Style::default(),
    };
    let file = What::File(Content { size: 0, islands: Vec::new() });
    match random.below(13) {
        0 => plain(b"a/../../b", file),
        1 => plain(b"..", What::Directory),
        2 => plain(b"new", What::HardLink(b"../out".to_vec())),
        3 => plain(b"itself-and-new", What::HardLink(b"itself-and-new".to_vec())),
        4 => plain(b"new", What::HardLink(b"missing".to_vec())),
        5 => plain(b"new", What::HardLink(b"/".to_vec())),
        6 => plain(b".", file),
        7 => plain(&[b'n'; 256], file),
        8 => plain(b"l", What::Symlink(vec![b't'; 4096])),
        9 => plain(b"d", What::Character(4096, 0)),
        10 => plain(b"d", What::Block(0, 1 << 20)),
        11 => Member {
            uid: 1 << 32,
            style: Style { numbers: pick(random, &[Numbers::Base256, Numbers::Pax]), ..Style::default() },
            ..plain(b"owner", file)
        },
        _ => Member { xattrs: vec![(b"user.big".to_vec(), random.noise(65_536))], ..plain(b"x", file) },
    }
}

fn damage(random: &mut Random) -> Damage {
    pick(
        random,
        &[
            Damage::NegativeOwner,
            Damage::NegativeSize,
            Damage::HugeSize,
            Damage::MissingContent,
            Damage::SizeRecord("-1"),
            Damage::SizeRecord("99999999999999999999999"),
            Damage::SizeRecord("0x10"),
            Damage::Checksum,
            Damage::UnknownType,
            Damage::RecordLength,
            Damage::SparseMap("0,512,256,512"),
            Damage::SparseMap("4000,512"),
            Damage::SparseMap("18446744073709551615,1"),
            Damage::SparseMap("1024,0,512"),
        ],
    )
}
