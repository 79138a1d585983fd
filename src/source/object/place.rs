//! Specs of buckets: which one, where, and with whose credentials.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::{ObjectStore, RetryConfig};
use reqwest::Url;

use super::super::OpenError;
use super::transport::Transport;
use crate::base::Secret;
use crate::net::{self, ClientOptions};

/// Longest file of credentials, in bytes.
const MAX_FILE: u64 = 64 << 10;

/// Whose bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cloud {
    S3,
    /// Alibaba's, by its S3 interface.
    Oss,
    Google,
    Azure,
}

/// A spec, taken apart. Nothing in it is secret: credentials are named, not held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) cloud: Cloud,
    bucket: String,
    pub(super) prefix: String,
    region: Option<String>,
    pub(super) endpoint: Option<Url>,
    account: Option<String>,
    pub(super) credentials: Option<PathBuf>,
    profile: Option<String>,
    path_style: bool,
    instance: bool,
    anonymous: bool,
}

/// What is wrong with a spec or with the credentials that it names.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BadPlace {
    #[error("{0} needs the name of a bucket behind ://")]
    NoBucket(&'static str),
    #[error("{0} has no query {1:?}; it has {2}")]
    UnknownQuery(&'static str, String, String),
    #[error("{key} must be {wanted}")]
    Value { key: &'static str, wanted: &'static str },
    #[error("{0} needs the query {1}")]
    Missing(&'static str, &'static str),
    #[error("the prefix {0:?} cannot begin the name of an object")]
    Prefix(String),
    #[error("cannot use the credentials in {}: {detail}", file.display())]
    Credentials { file: PathBuf, detail: String },
    /// The library's reason is not repeated: it may quote what it was given.
    #[error("the credentials or settings of {0} in the environment cannot be used")]
    Builder(String),
}

impl Cloud {
    fn scheme(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Oss => "oss",
            Self::Google => "gs",
            Self::Azure => "az",
        }
    }

    fn queries(self) -> &'static [&'static str] {
        match self {
            Self::S3 | Self::Oss => {
                &["region", "endpoint", "credentials", "profile", "path_style", "instance_credentials", "anonymous"]
            }
            Self::Google => &["endpoint", "credentials", "instance_credentials", "anonymous"],
            Self::Azure => &["account", "endpoint", "credentials", "instance_credentials", "anonymous"],
        }
    }
}

impl Place {
    pub(super) fn parse(spec: &str) -> Result<Self, BadPlace> {
        let (scheme, rest) = spec.split_once("://").unwrap_or_default();
        let cloud = match scheme.to_ascii_lowercase().as_str() {
            "oss" => Cloud::Oss,
            "gs" => Cloud::Google,
            "az" => Cloud::Azure,
            _ => Cloud::S3,
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        // What clouds allow in names, all of them together: the library makes addresses of it without looking.
        let is_name = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._$".contains(&byte));
        if bucket.is_empty() || !is_name(bucket) {
            return Err(BadPlace::NoBucket(cloud.scheme()));
        }
        if object_store::path::Path::parse(format!("{prefix}0")).is_err() {
            return Err(BadPlace::Prefix(prefix.to_owned()));
        }
        let mut place = Self {
            cloud,
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
            region: None,
            endpoint: None,
            account: None,
            credentials: None,
            profile: None,
            path_style: cloud == Cloud::S3,
            instance: false,
            anonymous: false,
        };
        let pairs = Url::parse(&format!("q:?{query}"))
            .map_err(|_| BadPlace::Value { key: "the query", wanted: "KEY=VALUE" })?;
        for (key, value) in pairs.query_pairs() {
            place.set(&key, &value)?;
        }
        if !place.region.as_deref().is_none_or(is_name) {
            return Err(BadPlace::Value { key: "region", wanted: "a name" });
        }
        place.look_at_endpoint()?;
        match cloud {
            Cloud::Oss if place.endpoint.is_none() => Err(BadPlace::Missing("oss", "endpoint")),
            Cloud::Azure if place.account.is_none() && place.endpoint.is_none() => {
                Err(BadPlace::Missing("az", "account"))
            }
            _ => Ok(place),
        }
    }

    /// The bucket must be able to stand in front of the endpoint's host, if that is where it goes.
    fn look_at_endpoint(&self) -> Result<(), BadPlace> {
        let is_in_host = !self.path_style && matches!(self.cloud, Cloud::S3 | Cloud::Oss);
        let Some(endpoint) = self.endpoint.as_ref().filter(|_| is_in_host) else { return Ok(()) };
        let is_address = endpoint.domain().is_none();
        if is_address || Url::parse(&self.bucket_url(endpoint)).is_err() {
            let wanted = "the name of a host that the bucket's can stand before, or path_style=true";
            return Err(BadPlace::Value { key: "endpoint", wanted });
        }
        Ok(())
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), BadPlace> {
        let queries = self.cloud.queries();
        let Some(key) = queries.iter().find(|known| **known == key).copied() else {
            return Err(BadPlace::UnknownQuery(self.cloud.scheme(), key.to_owned(), queries.join(", ")));
        };
        let wrong = |wanted| BadPlace::Value { key, wanted };
        if value.is_empty() {
            return Err(wrong("something"));
        }
        let switch = || match value {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => Err(wrong("true or false")),
        };
        match key {
            "region" => self.region = Some(value.to_owned()),
            "endpoint" => {
                self.endpoint = Some(
                    endpoint(value).ok_or_else(|| wrong("a host or the URL of one, without user, path and query"))?,
                )
            }
            "account" => self.account = Some(value.to_owned()),
            "credentials" => {
                let path = PathBuf::from(value);
                self.credentials = Some(if path.is_absolute() { path } else { return Err(wrong("an absolute path")) });
            }
            "profile" => self.profile = Some(value.to_owned()),
            "path_style" => self.path_style = switch()?,
            "instance_credentials" => self.instance = switch()?,
            // The last one of the table above.
            _ => self.anonymous = switch()?,
        }
        Ok(())
    }

    /// A client for the bucket, with the credentials as they are now.
    pub(super) fn open(&self, options: &ClientOptions) -> Result<Arc<dyn ObjectStore>, OpenError> {
        let base = self.endpoint.clone().or_else(|| Url::parse("https://cloud.invalid").ok());
        let base = base.ok_or_else(|| OpenError::Url { detail: "no endpoint".into() })?;
        let transport = Transport { client: net::client(options, &base)?, metadata: self.instance };
        let opened: Result<Arc<dyn ObjectStore>, _> = match self.cloud {
            Cloud::S3 | Cloud::Oss => {
                self.s3()?.with_http_connector(transport).with_retry(never()).build().map(|store| Arc::new(store) as _)
            }
            Cloud::Google => self
                .google()?
                .with_http_connector(transport)
                .with_retry(never())
                .build()
                .map(|store| Arc::new(store) as _),
            Cloud::Azure => self
                .azure()?
                .with_http_connector(transport)
                .with_retry(never())
                .build()
                .map(|store| Arc::new(store) as _),
        };
        opened.map_err(|_| BadPlace::Builder(self.to_string()).into())
    }

    fn is_plain_http(&self) -> bool {
        self.endpoint.as_ref().is_some_and(|endpoint| endpoint.scheme() == "http")
    }

    pub(super) fn s3(&self) -> Result<AmazonS3Builder, BadPlace> {
        let mut builder = match (&self.credentials, self.cloud) {
            (Some(_), _) => AmazonS3Builder::new(),
            (None, Cloud::Oss) => from_oss_env(AmazonS3Builder::new()),
            (None, _) => AmazonS3Builder::from_env(),
        };
        builder = builder.with_bucket_name(&self.bucket).with_virtual_hosted_style_request(!self.path_style);
        if let Some(region) = self.region.clone().or_else(|| self.region_of_oss()) {
            builder = builder.with_region(region);
        }
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(self.bucket_url(endpoint)).with_allow_http(self.is_plain_http());
        }
        for Pair { line, key, value } in self.pairs()? {
            let key = AmazonS3ConfigKey::from_str(&key).map_err(|_| self.unknown(line))?;
            builder = builder.with_config(key, value.expose());
        }
        let has = |key| builder.get_config_value(&key).is_some();
        let found = has(AmazonS3ConfigKey::AccessKeyId)
            || has(AmazonS3ConfigKey::WebIdentityTokenFile)
            || has(AmazonS3ConfigKey::ContainerCredentialsFullUri);
        Ok(if self.anonymous || !found && !self.instance { builder.with_skip_signature(true) } else { builder })
    }

    /// The library wants the bucket in the endpoint where it is a part of the host's name.
    fn bucket_url(&self, endpoint: &Url) -> String {
        let text = endpoint.as_str().trim_end_matches('/');
        match text.split_once("://") {
            Some((scheme, host)) if !self.path_style => format!("{scheme}://{}.{host}", self.bucket),
            _ => text.to_owned(),
        }
    }

    /// `oss-cn-hangzhou` of `oss-cn-hangzhou.aliyuncs.com`.
    fn region_of_oss(&self) -> Option<String> {
        let host = self.endpoint.as_ref().filter(|_| self.cloud == Cloud::Oss)?.host_str()?;
        let label = host.split('.').find(|label| label.starts_with("oss-"));
        Some(label.unwrap_or("oss").trim_end_matches("-internal").to_owned())
    }

    pub(super) fn google(&self) -> Result<GoogleCloudStorageBuilder, BadPlace> {
        let mut builder = match &self.credentials {
            Some(file) => {
                // The library reads it; here is only seen that there is one, for an error with its name.
                self.text(file)?;
                GoogleCloudStorageBuilder::new().with_service_account_path(file.to_string_lossy())
            }
            None => GoogleCloudStorageBuilder::from_env(),
        };
        builder = builder.with_bucket_name(&self.bucket);
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_base_url(endpoint.as_str().trim_end_matches('/'));
        }
        let found = [
            GoogleConfigKey::ServiceAccount,
            GoogleConfigKey::ServiceAccountKey,
            GoogleConfigKey::ApplicationCredentials,
        ];
        let found = found.iter().any(|key| builder.get_config_value(key).is_some());
        Ok(if self.anonymous || !found && !self.instance { builder.with_skip_signature(true) } else { builder })
    }

    pub(super) fn azure(&self) -> Result<MicrosoftAzureBuilder, BadPlace> {
        let mut builder = match &self.credentials {
            Some(_) => MicrosoftAzureBuilder::new(),
            None => MicrosoftAzureBuilder::from_env(),
        };
        builder = builder.with_container_name(&self.bucket);
        if let Some(account) = &self.account {
            builder = builder.with_account(account);
        }
        if let Some(endpoint) = &self.endpoint {
            let endpoint = endpoint.as_str().trim_end_matches('/').to_owned();
            builder = builder.with_endpoint(endpoint).with_allow_http(self.is_plain_http());
        }
        for Pair { line, key, value } in self.pairs()? {
            let key = AzureConfigKey::from_str(&key).map_err(|_| self.unknown(line))?;
            builder = builder.with_config(key, value.expose());
        }
        let found = [
            AzureConfigKey::AccessKey,
            AzureConfigKey::SasKey,
            AzureConfigKey::Token,
            AzureConfigKey::ClientSecret,
            AzureConfigKey::FederatedTokenFile,
        ];
        let found = found.iter().any(|key| builder.get_config_value(key).is_some());
        Ok(if self.anonymous || !found && !self.instance { builder.with_skip_signature(true) } else { builder })
    }

    fn unknown(&self, line: usize) -> BadPlace {
        self.unusable(format!("line {line} has a key that is not known"))
    }

    fn unusable(&self, detail: String) -> BadPlace {
        BadPlace::Credentials { file: self.credentials.clone().unwrap_or_default(), detail }
    }

    fn text(&self, file: &Path) -> Result<Secret, BadPlace> {
        let facts = fs::metadata(file).map_err(|error| self.unusable(error.to_string()))?;
        if !facts.is_file() || facts.len() > MAX_FILE {
            return Err(self.unusable("it is not a file of at most 64 KiB".into()));
        }
        fs::read_to_string(file).map(Secret::new).map_err(|error| self.unusable(error.to_string()))
    }

    /// The keys and values of the file of credentials, in the form of `~/.aws/credentials`: `KEY = VALUE` lines, those
    /// of the profile where there are profiles.
    fn pairs(&self) -> Result<Vec<Pair>, BadPlace> {
        let Some(file) = &self.credentials else { return Ok(Vec::new()) };
        let text = self.text(file)?;
        let pairs = pairs(text.expose(), self.profile.as_deref().unwrap_or("default"));
        let pairs = pairs.map_err(|line| self.unusable(format!("line {line} is not KEY = VALUE")))?;
        if pairs.is_empty() { Err(self.unusable("there are none for this profile".into())) } else { Ok(pairs) }
    }
}

/// A line of a file of credentials. The key is not told either: somebody may have written the secret alone, and
/// such a one may end with the sign.
#[derive(Debug)]
struct Pair {
    line: usize,
    key: String,
    value: Secret,
}

/// Reads `KEY = VALUE` lines. Fails with the number of the first line that is something else.
fn pairs(text: &str, profile: &str) -> Result<Vec<Pair>, usize> {
    let mut pairs = Vec::new();
    let mut wanted = true;
    for (number, line) in (1_usize..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            wanted = name.trim() == profile;
            continue;
        }
        let (key, value) = line.split_once('=').ok_or(number)?;
        if wanted {
            pairs.push(Pair { line: number, key: key.trim().to_ascii_lowercase(), value: Secret::new(value.trim()) });
        }
    }
    Ok(pairs)
}

/// Alibaba's own names for what is in the environment.
fn from_oss_env(mut builder: AmazonS3Builder) -> AmazonS3Builder {
    for (name, key) in [
        ("OSS_ACCESS_KEY_ID", AmazonS3ConfigKey::AccessKeyId),
        ("OSS_ACCESS_KEY_SECRET", AmazonS3ConfigKey::SecretAccessKey),
        ("OSS_SESSION_TOKEN", AmazonS3ConfigKey::Token),
    ] {
        if let Ok(value) = std::env::var(name) {
            builder = builder.with_config(key, value);
        }
    }
    builder
}

/// Repetition is the business of whoever asks.
fn never() -> RetryConfig {
    RetryConfig { max_retries: 0, ..RetryConfig::default() }
}

fn endpoint(text: &str) -> Option<Url> {
    let text = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let url = Url::parse(&text).ok()?;
    let plain =
        url.username().is_empty() && url.password().is_none() && url.query().is_none() && url.fragment().is_none();
    (plain && matches!(url.scheme(), "http" | "https") && url.has_host()).then_some(url)
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}/{}", self.cloud.scheme(), self.bucket, self.prefix)?;
        match (&self.endpoint, &self.account) {
            (Some(endpoint), _) => write!(f, "?endpoint={}", endpoint.as_str().trim_end_matches('/')),
            (None, Some(account)) => write!(f, "?account={account}"),
            (None, None) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_are_taken_apart_and_shown_without_what_is_private() {
        for (spec, shown) in [
            ("s3://b", "s3://b/"),
            ("S3://b/pre-fix?region=eu-central-1&credentials=/etc/key", "s3://b/pre-fix"),
            ("s3://b/a/b/?endpoint=http://127.0.0.1:9000/", "s3://b/a/b/?endpoint=http://127.0.0.1:9000"),
            (
                "oss://b/x?endpoint=oss-cn-hangzhou.aliyuncs.com",
                "oss://b/x?endpoint=https://oss-cn-hangzhou.aliyuncs.com",
            ),
            ("gs://b/x", "gs://b/x"),
            ("az://c/x?account=acme", "az://c/x?account=acme"),
        ] {
            assert_eq!(Place::parse(spec).unwrap().to_string(), shown, "{spec}");
        }
    }

    #[test]
    fn malformed_specs_say_what_is_wrong() {
        for (spec, told) in [
            ("s3://", "s3 needs the name of a bucket behind ://"),
            ("s3:///x", "s3 needs the name of a bucket behind ://"),
            ("s3://id:key@b/x", "s3 needs the name of a bucket behind ://"),
            ("s3://b c/p", "s3 needs the name of a bucket behind ://"),
            ("s3://b%zz/p?endpoint=http://h:1&path_style=false", "s3 needs the name of a bucket behind ://"),
            ("s3://b/p?region=a%20b", "region must be a name"),
            (
                "oss://b/p?endpoint=127.0.0.1:1",
                "endpoint must be the name of a host that the bucket's can stand before, or path_style=true",
            ),
            (
                "oss://b.c/p?endpoint=http://[::1]:1",
                "endpoint must be the name of a host that the bucket's can stand before, or path_style=true",
            ),
            ("s3://b/a//b", "the prefix \"a//b\" cannot begin the name of an object"),
            (
                "s3://b/?secret=x",
                "s3 has no query \"secret\"; it has region, endpoint, credentials, profile, path_style, instance_credentials, anonymous",
            ),
            (
                "s3://b/?endpoint=http://u:p@h",
                "endpoint must be a host or the URL of one, without user, path and query",
            ),
            ("s3://b/?anonymous=yes", "anonymous must be true or false"),
            ("s3://b/?credentials=key", "credentials must be an absolute path"),
            ("s3://b/?region=", "region must be something"),
            ("oss://b/", "oss needs the query endpoint"),
            ("az://b/", "az needs the query account"),
        ] {
            assert_eq!(Place::parse(spec).unwrap_err().to_string(), told, "{spec}");
        }
    }

    #[test]
    fn buckets_of_alibaba_are_a_part_of_the_hosts_name() {
        let place = Place::parse("oss://b/x?endpoint=oss-cn-hangzhou-internal.aliyuncs.com").unwrap();

        assert_eq!(
            place.bucket_url(place.endpoint.as_ref().unwrap()),
            "https://b.oss-cn-hangzhou-internal.aliyuncs.com"
        );
        assert_eq!(place.region_of_oss().as_deref(), Some("oss-cn-hangzhou"));
    }

    #[test]
    fn credentials_are_those_of_the_profile() {
        let text =
            "# ours\n[default]\naws_access_key_id = A\n[other]\nAWS_ACCESS_KEY_ID=B\naws_secret_access_key = s=c\n";
        let read = |profile| {
            pairs(text, profile)
                .unwrap()
                .into_iter()
                .map(|it| format!("{}={}", it.key, it.value.expose()))
                .collect::<Vec<_>>()
        };

        assert_eq!(read("default"), ["aws_access_key_id=A"]);
        assert_eq!(read("other"), ["aws_access_key_id=B", "aws_secret_access_key=s=c"]);
        assert_eq!(read("third"), Vec::<String>::new());
        assert_eq!(pairs("a = b\nnonsense\n", "default").unwrap_err(), 2);
    }
}
