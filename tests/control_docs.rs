//! `docs/CONTROL.md` names every request that the control socket takes.

use std::path::Path;

/// Every method and path in the routers of `text`.
fn requests(text: &str) -> Vec<String> {
    let routes = text.split(".route(\"").skip(1);
    let route = |route: &str| {
        let (path, handlers) = route.split_once('"').expect("a path ends");
        // What follows the call is another one, or the end of the chain.
        let handlers = handlers.split_once("\n").map_or(handlers, |(line, _)| line);
        let methods = ["get", "post", "put", "delete", "patch"];
        let has = |method: &&&str| handlers.contains(&format!("{method}("));
        // What is put into a path is written in capitals there.
        let parts = path.split('/').map(|part| match part.strip_prefix('{').and_then(|part| part.strip_suffix('}')) {
            Some(name) => name.to_uppercase(),
            None => part.to_owned(),
        });
        let path = parts.collect::<Vec<_>>().join("/");
        let named: Vec<_> = methods.iter().filter(has).map(|m| format!("{} {path}", m.to_uppercase())).collect();
        assert!(!named.is_empty(), "{path}: no method in {handlers:?}");
        named
    };
    routes.flat_map(route).collect()
}

#[test]
fn every_request_is_documented() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = std::fs::read_to_string(top.join("docs/CONTROL.md")).expect("docs/CONTROL.md");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(top.join("src/daemon/control")).expect("the control socket") {
        let text = std::fs::read_to_string(entry.expect("an entry").path()).expect("a source file");
        found.extend(requests(&text));
    }

    assert!(found.contains(&"PUT /v1/log".to_owned()) && found.len() >= 10, "{found:?}");
    let missing: Vec<_> = found.iter().filter(|request| !docs.contains(&format!("`{request}`"))).collect();
    assert_eq!(missing, Vec::<&String>::new(), "docs/CONTROL.md says nothing of these");
}

#[test]
fn routes_are_found_with_all_their_methods() {
    let text = "Router::new()\n    .route(\"/a\", get(x).put(y))\n    .route(\"/b/{id}\", delete(z));";
    assert_eq!(requests(text), ["GET /a", "PUT /a", "DELETE /b/ID"]);
}
