//! One damage for each field that a reader relies on: the error names it.

use rafsd::base::Chain;
use rafsd::build::{ConvertSpec, convert, lift};
use rafsd::format::rafs::Algorithm;
use rafsd::image::Image;
use rafsd::image::check::Code;
use rafsd::image::v5::Bootstrap;
use rafsd::tools::check::v5;

use crate::everything;
use crate::support::tree::Random;
use crate::support::v5::{Item, Writer, Written, noise, tree};

fn image() -> Written {
    Writer::default().image(&everything())
}

/// Why an image cannot be lifted.
fn refusal(image: &Written) -> Option<String> {
    let lifted = Bootstrap::parse(&image.bytes).map_err(Into::into).and_then(|image| lift(&image));
    lifted.err().map(|error| Chain(&error).to_string())
}

type Damage = fn(&mut Written);

/// What is done to an image, and what the error must say.
const DAMAGES: &[(&str, Damage)] = &[
    ("no magic", |i| i.set(0, b"X")),
    ("version 0x600", |i| i.set(5, &[6])),
    ("RAFS v4", |i| i.set(4, &0x400u32.to_le_bytes())),
    ("superblock size", |i| i.set(8, &[1])),
    ("chunk size", |i| i.set(12, &4097u32.to_le_bytes())),
    ("chunk size", |i| i.set(12, &2048u32.to_le_bytes())),
    ("chunk size", |i| i.set(12, &(32u32 << 20).to_le_bytes())),
    ("flags of the superblock", |i| i.set(17, &[2])),
    ("number of inodes", |i| i.set(24, &99u64.to_le_bytes())),
    ("inode table of 60 bytes at byte 12 does not start", |i| i.set(32, &12u64.to_le_bytes())),
    ("inode table of 60 bytes at byte 4096 lies in the superblock", |i| i.set(32, &4096u64.to_le_bytes())),
    ("inode table of 60 bytes at byte 9223372036854775800 does not lie", |i| {
        i.set(32, &(i64::MAX as u64 & !7).to_le_bytes())
    }),
    ("inode table and the extended blob table overlap", |i| i.set(72, &8192u64.to_le_bytes())),
    ("blob table of 72 bytes", |i| i.set(48, &(1u64 << 32).to_le_bytes())),
    ("number of inode table entries", |i| i.set(56, &[0])),
    ("inode table of 17179869180 bytes", |i| i.set(56, &[0xff; 4])),
    ("inode table and the prefetch table overlap", |i| {
        i.set(40, &8192u64.to_le_bytes());
        i.set(60, &[1]);
    }),
    ("extended blob table of", |i| i.set(68, &[0xff; 4])),
    ("blob 0 has no usable id", |i| i.set(i.blobs_at + 8, b"../")),
    ("blob 0 has no usable id", |i| i.set(i.blobs_at + 8, &[0])),
    ("number of chunks of blob 0", |i| i.set(i.extended_at, &[0xff; 4])),
    ("decoded size of blob 0", |i| i.set(i.extended_at + 8, &[0xff; 8])),
    ("stored size of blob 0", |i| i.set(i.extended_at + 16, &[0xff; 8])),
    ("blob 0 is encrypted", |i| i.set(i.extended_at + 5, &[1])),
    ("blob 0 is an external object", |i| i.set(i.extended_at + 5, &[8])),
    ("row of the inode table of inode 3", |i| i.set(8192 + 8, &1024u32.to_le_bytes())),
    ("row of the inode table of inode 3", |i| i.set(8192 + 8, &(1u32 << 29).to_le_bytes())),
    ("inode at byte", |i| i.set(8192 + 8, &((1u32 << 29) - 1).to_le_bytes())),
    ("name of inode 1 is that of the root", |i| i.put("", 128, b"x")),
    ("the root is not a directory", |i| {
        i.put("", 0x3c, &0o010_755u32.to_le_bytes());
        i.put("", 0x60, &[0; 4]);
    }),
    ("name of inode 2 is empty", |i| i.put("-", 0x64, &[0, 0])),
    ("name of inode 2 is '.' or '..'", |i| i.put("-", 128, b".")),
    ("name of inode 2 has a '/' or NUL", |i| i.put("-", 128, b"/")),
    ("name of inode 2 is longer than 256", |i| i.put("-", 0x64, &257u16.to_le_bytes())),
    ("name of an inode at byte", |i| i.put("\u{e9}", 0x64, &[0xff; 2])),
    ("name of inode 4 does not sort behind", |i| i.put("link", 128, b"d")),
    ("name of inode 3 does not sort behind", |i| i.put("dir", 128, b"!")),
    ("inode number of inode 2 has the value 0", |i| i.put("-", 0x28, &[0])),
    ("inode number of inode 2 has the value 9", |i| i.put("-", 0x28, &[9])),
    ("inode number of inode 3 has the value 2, and a directory", |i| i.put("dir", 0x28, &[2])),
    ("kind or size of inode 9 is not that of inode 2", |i| i.put("\u{e9}", 0x28, &[2])),
    ("inode number of inode 15 is not that of inode 14", |i| i.put("dir/deep/z", 0x28, &[14])),
    ("digest of inode 14 is not that of inode 12", |i| i.put("dir/deep/a", 9, &[0x5a])),
    ("chunks of inode 14 is not that of inode 12", |i| {
        // It has the xattrs of its first name in front of its chunks.
        i.put("dir/deep/a", 128 + 8 + 8 + 40 + 80 + 7, &[0x5a]);
    }),
    ("mode of inode 2", |i| i.put("-", 0x3c, &[0; 4])),
    ("mode of inode 2", |i| i.put("-", 0x3e, &[1])),
    ("flags of inode 2 has the value 16", |i| i.put("-", 0x50, &[16])),
    ("a file with holes", |i| i.put("-", 0x50, &[8])),
    ("link count of inode 2", |i| i.put("-", 0x58, &[0])),
    ("mtime_nsec of inode 2", |i| i.put("-", 0x6c, &[0xff; 4])),
    ("size of inode 2", |i| i.put("-", 0x40, &[0xff; 8])),
    ("number of chunks of inode 2", |i| i.put("-", 0x60, &[1])),
    ("number of chunks of inode 9", |i| i.put("\u{e9}", 0x40, &8193u64.to_le_bytes())),
    ("chunk records at byte", |i| {
        i.put("\u{e9}", 0x60, &(1u32 << 30).to_le_bytes());
        i.put("\u{e9}", 0x40, &(1u64 << 42).to_le_bytes());
    }),
    ("length of the link target of inode 4", |i| i.put("link", 0x66, &[0])),
    ("length of the link target of inode 4", |i| i.put("link", 0x66, &[7])),
    ("length of the link target of inode 2", |i| i.put("-", 0x66, &[1])),
    ("target of inode 4", |i| i.put("link", 128 + 8, &[0])),
    ("child index of inode 1 has the value 1", |i| i.put("", 0x5c, &[1])),
    ("child index of inode 3 has the value 2", |i| i.put("dir", 0x5c, &[2])),
    ("child index of inode 3 has the value 0", |i| i.put("dir", 0x5c, &[0])),
    ("child count of inode 1", |i| i.put("", 0x60, &[0xff; 4])),
    ("child count of inode 3", |i| i.put("dir", 0x5c, &[0xff; 4])),
    ("inode 12 is in directory", |i| {
        i.put("dir/empty", 0x5c, &[12]);
        i.put("dir/empty", 0x60, &[1]);
        i.put("dir", 0x5c, &[10]);
        i.put("dir/deep", 0x5c, &[12]);
    }),
    ("xattr table at byte", |i| i.put("dir", 128 + 8, &[0xff; 8])),
    ("pair size is more", |i| i.put("dir", 128 + 16, &[0xff; 4])),
    ("name without an end", |i| i.put("dir", 128 + 16, &[4, 0, 0, 0])),
    ("name size is not 1 to 255", |i| i.put("dir", 128 + 20, &[0])),
    ("pair size does not fit", |i| i.put("dir", 128 + 8, &[2, 0, 0, 0, 0, 0, 0, 0])),
    ("blob of chunk 1 of inode 9", |i| i.put_chunk("\u{e9}", 1, 0x20, &[1])),
    ("flags of chunk 0 of inode 9", |i| i.put_chunk("\u{e9}", 0, 0x24, &[8])),
    ("offset in the file of chunk 1 of inode 9", |i| i.put_chunk("\u{e9}", 1, 0x40, &[1])),
    ("length of chunk 1 of inode 9", |i| i.put_chunk("\u{e9}", 1, 0x2c, &[1])),
    ("index of chunk 1 of inode 9", |i| i.put_chunk("\u{e9}", 1, 0x48, &[99])),
    ("stored length of chunk 1 of inode 9 has the value 0", |i| i.put_chunk("\u{e9}", 1, 0x28, &[0; 4])),
    ("stored offset of chunk 1 of inode 9", |i| i.put_chunk("\u{e9}", 1, 0x32, &[1])),
    ("stored length of chunk 1 of inode 9", |i| i.put_chunk("\u{e9}", 1, 0x24, &[0])),
    ("plain offset of chunk 1 of inode 9", |i| i.put_chunk("\u{e9}", 1, 0x3a, &[1])),
    ("plain offset of chunk 1 of inode 9", |i| i.put_chunk("\u{e9}", 1, 0x38, &[0xff; 8])),
    ("another record tells otherwise", |i| i.put_chunk("same", 0, 3, &[0x77])),
];

#[test]
fn every_damage_is_refused_by_the_name_of_its_field() {
    assert_eq!(refusal(&image()), None, "undamaged");
    let mut wrong = Vec::new();
    for (number, (says, damage)) in DAMAGES.iter().enumerate() {
        let mut image = image();
        damage(&mut image);
        match refusal(&image) {
            Some(text) if text.contains(says) => {}
            other => wrong.push(format!("{number} should say {says:?}: {other:?}")),
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn a_small_image_does_not_become_a_large_one() {
    // A hundred directories with one path each, all of which are the same large file.
    let mut root = tree([("a", Item::File(noise(1, 400_000)))]);
    for number in 0..100 {
        root.insert(format!("d{number:02}").into_bytes(), Item::Dir(tree([("x", Item::Fifo)])));
    }
    let mut image = Writer::default().image(&root);
    let row = u32::try_from(image.at[2] / 8).unwrap().to_le_bytes();
    for number in 0..100 {
        let path = format!("d{number:02}/x");
        image.set(8192 + 4 * (image.numbers[path.as_bytes()] as usize - 1), &row);
    }
    let text = refusal(&image).unwrap();
    assert!(text.contains("inodes up to it take more than the"), "{text}");
    let report = v5::check(&Bootstrap::parse(&image.bytes).unwrap());
    assert!(report.findings.iter().any(|finding| finding.code == Code::Tree), "{:?}", report.findings);
}

#[test]
fn a_blob_longer_than_an_address_space_is_refused() {
    for extended in [true, false] {
        let mut image = Writer { extended, ..Writer::default() }.image(&everything());
        if extended {
            image.set(image.extended_at + 8, &(1u64 << 44).to_le_bytes());
        } else {
            image.put_chunk("\u{e9}", 1, 0x38, &((1u64 << 44) - 4096).to_le_bytes());
        }
        let text = refusal(&image).unwrap();
        assert!(text.contains("16 TiB") || text.contains("another record tells otherwise"), "{text}");
    }
}

#[test]
fn directories_that_share_their_children_are_looked_at_once() {
    const DIRECTORIES: u32 = 2000;
    let name = |number: u32| format!("d{number:04}").into_bytes();
    let root = (0..DIRECTORIES).map(|number| (name(number), Item::Dir(tree([])))).collect();
    let mut image = Writer::default().image(&root);
    for number in 0..DIRECTORIES - 1 {
        let (path, own) = (String::from_utf8(name(number)).unwrap(), number + 2);
        image.put(&path, 0x5c, &(own + 1).to_le_bytes());
        image.put(&path, 0x60, &(DIRECTORIES + 1 - own).to_le_bytes());
    }
    let report = v5::check(&Bootstrap::parse(&image.bytes).unwrap());
    assert!((1..u64::from(3 * DIRECTORIES)).contains(&report.errors), "{}", report.errors);
    assert!(refusal(&image).unwrap().contains("and in another one before"));
}

#[test]
fn chunks_of_a_foreign_gzip_layer_are_not_converted() {
    let image = Writer { compression: Algorithm::Gzip, ..Writer::default() }.image(&everything());
    let image = Image::parse(lift(&Bootstrap::parse(&image.bytes).unwrap()).unwrap()).unwrap();
    let out = tempfile::tempdir().unwrap();
    let spec = ConvertSpec { name: "an image".as_ref(), image: &image, out_dir: out.path() };
    let error = convert(&spec).unwrap_err();
    assert!(Chain(&error).to_string().contains("gzip members"), "{error:?}");
    assert!(!out.path().join("bootstrap").exists());
}

#[test]
fn compressed_chunks_of_an_image_without_compression_are_refused() {
    let mut image = Writer { compression: Algorithm::None, ..Writer::default() }.image(&everything());
    image.put_chunk("\u{e9}", 1, 0x24, &[1]);
    let text = refusal(&image).unwrap();
    assert!(text.contains("flags of chunk 1 of inode 9") && text.contains("without compression"), "{text}");
}

#[test]
fn a_check_finds_what_lifting_passes_over() {
    let damages: [(Code, Damage); 7] = [
        (Code::InodeDigest, |i| i.put("null", 0, &[1])),
        (Code::InodeParent, |i| i.put("null", 0x20, &[3])),
        (Code::LinkCount, |i| i.put("null", 0x58, &[2])),
        (Code::LinkCount, |i| i.put("dir", 0x58, &[2])),
        (Code::UnusedInodes, |i| i.put("dir/empty", 0x3c, &0o040_755u32.to_le_bytes())),
        (Code::UnusedBlob, |_| ()),
        (Code::Prefetch, |_| ()),
    ];
    for (number, (code, damage)) in damages.into_iter().enumerate() {
        let mut writer = Writer::default();
        let mut root = everything();
        match code {
            Code::Prefetch => writer.prefetch = vec![99],
            Code::UnusedBlob => {
                writer.image(&everything());
                root.retain(|name, _| matches!(&name[..], b"null" | b"link"));
            }
            _ => {}
        }
        let mut image = writer.image(&root);
        damage(&mut image);
        if code == Code::UnusedInodes {
            // The last two paths of the deepest directory.
            image.put("dir/deep", 0x60, &[1]);
        }
        let report = v5::check(&Bootstrap::parse(&image.bytes).unwrap());
        let found: Vec<_> = report.findings.iter().map(|finding| finding.code).collect();
        assert!(found.contains(&code), "{number}: {code} is not in {found:?}");
    }
}

#[test]
fn whatever_is_changed_is_lifted_or_refused_and_what_is_lifted_opens() {
    let sound = image();
    let mut random = Random::new(5);
    let (mut lifted, mut refused) = (0, 0);
    for _ in 0..3000 {
        let mut bytes = sound.bytes.clone();
        for _ in 0..=random.below(3) {
            // Not among the 8 KiB that mean little.
            let at = match random.below(8) {
                0 => random.below(80),
                _ => 8192 + random.below(bytes.len() as u64 - 8192),
            };
            bytes[usize::try_from(at).unwrap()] ^= 1 << random.below(8);
        }
        let Ok(image) = Bootstrap::parse(&bytes) else {
            refused += 1;
            continue;
        };
        let _ = v5::check(&image);
        match lift(&image) {
            Ok(bytes) => {
                let image = rafsd::image::Image::parse(bytes).expect("what was lifted opens");
                assert!(image.walk().all(|entry| entry.is_ok()));
                lifted += 1;
            }
            Err(_) => refused += 1,
        }
    }
    assert!(lifted > 500 && refused > 500, "{lifted} lifted, {refused} refused");
}
