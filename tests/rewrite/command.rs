use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::fixture::{Fixture, files_below, text};

fn rafsd(dir: &Path, args: &[&str], input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rafsd"));
    command.current_dir(dir).args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn json(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn optimize_reads_lists_from_standard_input_in_both_forms() {
    let fixture = Fixture::new();
    fixture.image("source", &[("a", &text(1, 200_000)), ("b", &text(2, 1000))]);
    let dir = fixture.dir.path();
    let optimize = |input: &str, out| {
        rafsd(dir, &["optimize", "source.image/bootstrap", "--paths", "-", "-o", out, "--json"], input)
    };

    let lines = json(&optimize("/b\n/a:0+1\n", "lines"));
    let document = json(&optimize(
        "{\"version\":\"v1\",\"files\":[{\"path\":\"/b\"},{\"path\":\"/a\",\"ranges\":[[0,1]]}]}",
        "document",
    ));

    assert_eq!((&lines["blob"]["id"], &lines["blob"]["chunks"]), (&document["blob"]["id"], &2.into()));
    assert_eq!(files_below(&fixture.path("lines")), files_below(&fixture.path("document")));
    for bad in ["", "\n", "relative\n", "/absent\n"] {
        let failed = optimize(bad, "bad");
        assert_eq!((failed.status.code(), files_below(&fixture.path("bad")).len()), (Some(1), 0), "{bad:?}");
    }
    assert_eq!(rafsd(dir, &["optimize", "source.image/bootstrap"], "").status.code(), Some(2));
}

#[test]
fn compact_says_when_there_is_nothing_to_do_and_succeeds() {
    let fixture = Fixture::new();
    fixture.image("source", &[("a", &text(1, 200_000))]);

    let done = rafsd(fixture.dir.path(), &["compact", "source.image/bootstrap", "-o", "out"], "");

    assert!(done.status.success());
    assert!(String::from_utf8(done.stdout).unwrap().starts_with("nothing to do: "));
    assert_eq!(files_below(&fixture.path("out")), ["bootstrap"]);
    let wrong = rafsd(fixture.dir.path(), &["compact", "source.image/bootstrap", "-o", "x", "--min-used", "101%"], "");
    assert_eq!(wrong.status.code(), Some(2));
}

#[test]
fn chunkdict_makes_what_build_takes() {
    let fixture = Fixture::new();
    fixture.image("one", &[("a", &text(1, 200_000))]);
    fixture.image("two", &[("b", &text(1, 200_000)), ("c", b"c")]);
    let dir = fixture.dir.path();

    let made = ["chunkdict", "one.image/bootstrap", "two.image/bootstrap", "-o", "dict.boot", "--json"];
    assert_eq!(json(&rafsd(dir, &made, ""))["chunks"], 4);

    let build = ["build", "two", "-o", "new", "--chunk-size", "64KiB", "--chunk-dict", "dict.boot", "--json"];
    assert_eq!(json(&rafsd(dir, &build, ""))["deduplicated_bytes"], 200_000);
    assert_eq!(rafsd(dir, &["chunkdict", "one.image/bootstrap", "-o", "none.boot"], "").status.code(), Some(1));
    assert!(!fixture.path("none.boot").exists());
}
