//! Which host a bucket is at, whose limits hold for it.

use object_store::aws::AmazonS3ConfigKey;
use object_store::azure::AzureConfigKey;
use object_store::gcp::GoogleConfigKey;
use reqwest::Url;

use super::super::OpenError;
use super::place::{BadPlace, Cloud, Place};

impl Place {
    /// Where the cloud is asked, without the bucket.
    pub(super) fn address(&self) -> Result<Url, OpenError> {
        if let Some(endpoint) = &self.endpoint {
            return Ok(endpoint.clone());
        }
        let usual = match self.cloud {
            Cloud::S3 | Cloud::Oss => {
                let builder = self.s3()?;
                let region = || builder.get_config_value(&AmazonS3ConfigKey::Region);
                let usual =
                    || format!("https://s3.{}.amazonaws.com", region().unwrap_or_else(|| "us-east-1".to_owned()));
                builder.get_config_value(&AmazonS3ConfigKey::Endpoint).unwrap_or_else(usual)
            }
            Cloud::Google => {
                let base = self.google()?.get_config_value(&GoogleConfigKey::BaseUrl);
                base.unwrap_or_else(|| "https://storage.googleapis.com".to_owned())
            }
            Cloud::Azure => {
                let builder = self.azure()?;
                let account = || builder.get_config_value(&AzureConfigKey::AccountName).unwrap_or_default();
                let usual = || format!("https://{}.blob.core.windows.net", account());
                builder.get_config_value(&AzureConfigKey::Endpoint).unwrap_or_else(usual)
            }
        };
        Url::parse(&usual).map_err(|_| BadPlace::Builder(self.to_string()).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_is_at_the_host_of_its_endpoint_or_of_its_cloud() {
        for (spec, host) in [
            ("s3://b/p?region=eu-central-1&endpoint=http://store.lan:9000", "store.lan"),
            ("oss://b/p?endpoint=oss-cn-hangzhou.aliyuncs.com", "oss-cn-hangzhou.aliyuncs.com"),
            ("s3://b/p?region=eu-central-1", "s3.eu-central-1.amazonaws.com"),
            ("s3://b/p?region=eu-central-1&path_style=false", "s3.eu-central-1.amazonaws.com"),
            ("gs://b/p", "storage.googleapis.com"),
            ("az://c/p?account=acme", "acme.blob.core.windows.net"),
        ] {
            let address = Place::parse(spec).unwrap().address().unwrap();
            assert_eq!(address.host_str(), Some(host), "{spec}");
        }
    }
}
