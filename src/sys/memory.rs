//! How much memory this process may use.

use std::fs;
use std::path::{Path, PathBuf};

/// The least limit of all memory control groups that this process is in, in bytes; `None` if there
/// is no limit, or none that can be seen from here.
pub fn limit() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    limit_in(Path::new("/sys/fs/cgroup"), &groups)
}

/// The same for a process whose `/proc/PID/cgroup` is `groups`, with control groups mounted at `root`.
fn limit_in(root: &Path, groups: &str) -> Option<u64> {
    let limits = groups.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
        let least = |hierarchy: &str, file: &str| least_upwards(&root.join(hierarchy), path, file);
        if controllers.is_empty() {
            // Version 2 alone, or beside version 1.
            least("", "memory.max").or_else(|| least("unified", "memory.max"))
        } else if controllers.split(',').any(|name| name == "memory") {
            least("memory", "memory.limit_in_bytes")
        } else {
            None
        }
    });
    limits.min()
}

/// The least number in the files `file` from `root/path` up to `root`: a group is bound by its parents.
fn least_upwards(root: &Path, path: &str, file: &str) -> Option<u64> {
    let own: PathBuf = root.join(path);
    let dirs = own.ancestors().take_while(|dir| dir.starts_with(root));
    // "max" is no number, and version 1 says "no limit" by one near 2^63.
    let limit = |dir: &Path| fs::read_to_string(dir.join(file)).ok()?.trim().parse::<u64>().ok();
    dirs.filter_map(limit).filter(|&bytes| bytes < 1 << 62).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_limit_on_the_way_up_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let file = root.path().join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        write("a/memory.max", "max\n");
        write("a/b/memory.max", "4096000\n");
        write("a/b/c/memory.max", "8192000\n");
        write("memory/x/y/memory.limit_in_bytes", "33554432\n");
        write("memory/x/memory.limit_in_bytes", "9223372036854771712\n");
        write("unified/u/memory.max", "77\n");
        let check = |groups: &str, expected| assert_eq!(limit_in(root.path(), groups), expected, "{groups}");

        check("0::/a/b/c\n", Some(4_096_000));
        check("0::/a\n", None);
        check("3:cpu:/\n7:memory:/x/y\n", Some(33_554_432));
        check("7:memory:/x\n", None);
        check("7:memory,cpu:/x/y\n0::/u\n", Some(77));
        check("0::/elsewhere\nnonsense\n::\n", None);
        check("", None);
    }
}
