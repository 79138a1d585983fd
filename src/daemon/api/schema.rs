//! `docs/api.schema.json` holds every type of the interface; this keeps it true.

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Value, json};

use super::observe::{Activity, LogRules};
use super::{
    BlobRequest, BlobfsRequest, CacheReport, CredentialsReport, CredentialsRequest, CredentialsTarget, Failure,
    GcReport, GcRequest, ImageReport, ImageUsage, Info, MountRequest, PinRequest, PrefetchReport, PrefetchRequest,
    PrefetchTarget, PullReport, PullRequest, RegisterRequest, ResolveReport, ResolveRequest, TraceReport, TraceRequest,
    TraceResult, UnmountRequest, Unmounted, UnregisterRequest, UpgradeRequest, samples,
};

/// The schema of all types, each below `$defs`.
fn schema() -> Value {
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    request::<MountRequest>(&mut generator);
    request::<BlobfsRequest>(&mut generator);
    request::<UnmountRequest>(&mut generator);
    request::<RegisterRequest>(&mut generator);
    request::<UnregisterRequest>(&mut generator);
    request::<PrefetchRequest>(&mut generator);
    request::<PrefetchTarget>(&mut generator);
    request::<ResolveRequest>(&mut generator);
    request::<PullRequest>(&mut generator);
    request::<CredentialsRequest>(&mut generator);
    request::<CredentialsTarget>(&mut generator);
    request::<TraceRequest>(&mut generator);
    request::<UpgradeRequest>(&mut generator);
    request::<GcRequest>(&mut generator);
    request::<BlobRequest>(&mut generator);
    request::<PinRequest>(&mut generator);
    // What may be left out of a request is always in an answer.
    let mut answers = SchemaSettings::draft2020_12().for_serialize().into_generator();
    request::<LogRules>(&mut answers);
    request::<ImageReport>(&mut answers);
    request::<Info>(&mut answers);
    request::<Activity>(&mut answers);
    request::<Unmounted>(&mut answers);
    request::<PrefetchReport>(&mut answers);
    request::<ResolveReport>(&mut answers);
    request::<PullReport>(&mut answers);
    request::<CredentialsReport>(&mut answers);
    request::<TraceReport>(&mut answers);
    request::<TraceResult>(&mut answers);
    request::<CacheReport>(&mut answers);
    request::<ImageUsage>(&mut answers);
    request::<GcReport>(&mut answers);
    request::<Failure>(&mut answers);
    let mut definitions = generator.take_definitions(true);
    definitions.append(&mut answers.take_definitions(true));
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "rafsd control socket, v1",
        "description": "Each type of docs/CONTROL.md is one of $defs.",
        "$defs": definitions,
    })
}

fn request<T: JsonSchema>(generator: &mut SchemaGenerator) {
    // Wanted for what it leaves behind in the generator.
    let _ = generator.subschema_for::<T>();
}

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/api.schema.json");

#[test]
fn the_documented_schema_is_that_of_the_types() {
    let schema = serde_json::to_string_pretty(&schema()).unwrap() + "\n";
    if std::env::var_os("RAFSD_WRITE_GOLDEN").is_some() {
        std::fs::write(PATH, schema).unwrap();
        return;
    }
    let documented = std::fs::read_to_string(PATH).unwrap_or_default();
    assert!(documented == schema, "docs/api.schema.json is outdated; RAFSD_WRITE_GOLDEN=1 writes it anew");
}

/// Whether `value` is one of the type, by the schema.
fn is_valid(name: &str, value: &Value) -> bool {
    let (mut schemas, mut compiler) = (boon::Schemas::new(), boon::Compiler::new());
    compiler.add_resource("api.json", schema()).unwrap();
    let index = compiler.compile(&format!("api.json#/$defs/{name}"), &mut schemas).unwrap();
    schemas.validate(value, index).is_ok()
}

#[test]
fn answers_validate_and_others_do_not() {
    let image = serde_json::to_value(samples::image()).unwrap();
    let info = serde_json::to_value(samples::info()).unwrap();
    let activity = serde_json::to_value(samples::activity()).unwrap();
    for (name, value) in [("ImageReport", &image), ("Info", &info), ("Activity", &activity)] {
        assert!(is_valid(name, value), "{name}: {value}");
        for field in value.as_object().unwrap().keys() {
            let mut wrong = value.clone();
            wrong[field] = json!({"neither": "this"});
            assert!(!is_valid(name, &wrong), "{name}.{field} may be anything");
        }
    }
}

#[test]
fn requests_need_no_more_than_is_documented() {
    assert!(is_valid("MountRequest", &json!({"image": {"bootstrap": "/b", "blobs": "/c"}, "dir": "/mnt"})));
    for image in [
        json!({"reference": "docker://r.example/app:1"}),
        json!({"reference": "r.example/app", "platform": "linux/arm64", "offline": true}),
        json!({"bootstrap": "/b", "blobs": ["/one", "https://two.example/x"]}),
    ] {
        assert!(is_valid("MountRequest", &json!({"image": image, "dir": "/mnt"})), "{image}");
        assert!(is_valid("PullRequest", &json!({"image": image})), "{image}");
        assert!(is_valid("ResolveRequest", &json!({"image": image})), "{image}");
    }
    assert!(is_valid("UnmountRequest", &json!({"dir": "/mnt"})));
    assert!(is_valid("RegisterRequest", &json!({"image": {"bootstrap": "/b", "blobs": "/c"}, "id": "x"})));
    assert!(is_valid("LogRules", &json!({"level": "debug"})));
    for order in [json!(true), json!("hints"), json!({"files": [{"path": "/a", "ranges": [[0, 4096]]}]})] {
        assert!(is_valid("PrefetchRequest", &json!({"target": {"dir": "/mnt"}, "order": order})), "{order}");
    }
    assert!(!is_valid("PrefetchRequest", &json!({"target": {"dir": "/mnt"}, "order": "most"})));
    assert!(is_valid("TraceRequest", &json!({"target": {"image": "4708"}})));
    for login in [json!({"password": {"user": "u", "password": "p"}}), json!({"registry_token": "t"})] {
        assert!(is_valid("CredentialsRequest", &json!({"registry": "r.example", "login": login})), "{login}");
    }
    assert!(!is_valid("CredentialsRequest", &json!({"registry": "r.example"})));
    assert!(is_valid("CredentialsTarget", &json!({"registry": "r.example", "repository": "team"})));
    assert!(is_valid("UpgradeRequest", &json!({"program": "/usr/bin/rafsd"})));
    assert!(!is_valid("MountRequest", &json!({"dir": "/mnt"})));
    assert!(!is_valid("UnmountRequest", &json!({"dir": "/mnt", "force": true})));
}
