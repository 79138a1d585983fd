//! Lists that would become much more memory than they have bytes.

use rafsd::tools::hotlist::{HotListError, parse};

use super::allocations::peak_of;

#[test]
fn a_list_of_very_many_items_is_refused_before_they_are_made() {
    let items = 6 << 20;
    let document = format!(r#"{{"version":"v1","files":[{}{{}}]}}"#, "{},".repeat(items));
    let line = format!(r#"{{"path":"/a","ranges":[{}[0,1]]}}"#, "[0,1],".repeat(items));
    for list in [document, line] {
        let (parsed, peak) = peak_of(|| parse(list.as_bytes()));

        assert!(matches!(parsed, Err(HotListError::TooMany)));
        assert!(peak < 1 << 20, "{peak} bytes of memory for {}", list.len());
    }
}
