//! What is done with the bytes: cache, prefetch, files.

use super::super::Raw;
use super::table::Table;
use super::{ImportError, Imported, is_absolute};

/// The names of the keys of prefetch in one version.
pub(super) struct PrefetchKeys {
    threads: &'static str,
    batch: &'static str,
    rate: &'static str,
}

pub(super) const PREFETCH_1: PrefetchKeys =
    PrefetchKeys { threads: "threads_count", batch: "merging_size", rate: "bandwidth_rate" };

pub(super) const PREFETCH_2: PrefetchKeys =
    PrefetchKeys { threads: "threads", batch: "batch_size", rate: "bandwidth_limit" };

impl Imported {
    pub(super) fn cache_of_1(&mut self, cache: &mut Table) -> Result<(), ImportError> {
        let mut config = cache.table("config")?;
        self.cache(cache, &mut config)?;
        self.unknown(config);
        Ok(())
    }

    pub(super) fn cache_of_2(&mut self, cache: &mut Table) -> Result<(), ImportError> {
        let (mut files, mut kernel) = (cache.table("filecache")?, cache.table("fscache")?);
        let is_kernel = cache.is("type", "fscache");
        let (used, other) = if is_kernel { (&mut kernel, files) } else { (&mut files, kernel) };
        let outcome = self.cache(cache, used);
        for key in other.rest() {
            self.remark(key, "nydusd does not look at it: another kind of cache is chosen");
        }
        outcome
    }

    fn cache(&mut self, cache: &mut Table, config: &mut Table) -> Result<(), ImportError> {
        let key = cache.full("type");
        match cache.text("type")?.as_deref() {
            Some("blobcache" | "filecache") => self.cache_dir(config)?,
            Some("fscache") => {
                self.set(&key, "backend", Raw::Items(vec!["cachefiles".to_owned()]));
                self.dropped(
                    config,
                    "work_dir",
                    "what the kernel caches is kept in `cachefiles` below the directory of the setting cache",
                );
            }
            None | Some("dummycache") => {
                self.dropped(config, "work_dir", "nydusd does not look at it: it has no cache");
                self.remark(&key, "there is always a cache here; the setting cache says where, cache_limit how much");
            }
            Some(_) => return Err(ImportError::Cache { key }),
        }
        self.dropped(cache, "compressed", "what is in the cache is not compressed, as the kernel reads it from there");
        // Always on.
        cache.drop("validate");
        for key in ["enable_encryption", "enable_convergent_encryption", "encryption_key"] {
            self.dropped(config, key, "the cache is not encrypted; put it on an encrypted disk");
            self.dropped(
                cache,
                key,
                "nydusd does not look for it here; the cache is not encrypted; put it on an encrypted disk",
            );
        }
        self.dropped(
            config,
            "disable_indexed_map",
            "what is present is always kept in one form, which survives crashes",
        );
        Ok(())
    }

    fn cache_dir(&mut self, config: &mut Table) -> Result<(), ImportError> {
        let Some(dir) = config.text("work_dir")? else { return Ok(()) };
        let key = config.full("work_dir");
        if is_absolute(&dir) {
            self.set(&key, "cache", Raw::Text(dir));
            self.remark(key, "became the setting cache; what nydusd has put there is neither used nor removed");
        } else {
            self.remark(key, "not taken: the setting cache must be an absolute path");
        }
        Ok(())
    }

    /// What concerns files, at the root in version 1 and in `rafs` in version 2.
    pub(super) fn files_of(&mut self, table: &mut Table, ahead: &str, validate: &str) -> Result<(), ImportError> {
        match table.text("mode")?.as_deref() {
            None | Some("direct") => {}
            Some("cached") => self.remark(table.full("mode"), "metadata is read by the kernel, which caches it"),
            Some(_) => return Err(ImportError::Kind { key: table.full("mode"), wanted: "direct or cached" }),
        }
        if table.flag(validate)? == Some(false) {
            self.remark(
                table.full(validate),
                "every chunk is checked before anybody reads it, which cannot be turned off",
            );
        }
        if table.flag("enable_xattr")? == Some(false) {
            self.remark(table.full("enable_xattr"), "extended attributes are always shown");
        }
        self.dropped(
            table,
            "iostats_files",
            "nothing is counted by file; `rafsd status` and the metrics count by device and image",
        );
        self.dropped(table, "access_pattern", "`rafsd trace` records what was read first");
        self.dropped(
            table,
            "latest_read_files",
            "`rafsd trace` records what was read first, and nothing what was read last",
        );
        if let Some(bytes) = table.number(ahead)? {
            let key = table.full(ahead);
            self.set(&key, "readahead_first", bytes_of(bytes));
            if self.settings.store.readahead_first > self.settings.store.readahead_most {
                let first = self.settings.store.readahead_first;
                self.set(&key, "readahead_most", bytes_of(first));
            }
            self.remark(
                key,
                "became readahead_first: more than what is missing is fetched for readers that walk forward only",
            );
        }
        Ok(())
    }

    /// A table of prefetch. `all` is whether everything is meant where nothing is said.
    pub(super) fn prefetch(&mut self, table: &mut Table, keys: &PrefetchKeys, all: bool) -> Result<(), ImportError> {
        let is_on = table.flag("enable")?.unwrap_or_default();
        let is_all = table.flag("prefetch_all")?.unwrap_or(all);
        self.prefetch = Some(match (is_on, is_all) {
            (false, _) => "none",
            (true, true) => "all",
            (true, false) => "hints",
        });
        let (threads, batch, rate) = (table.number(keys.threads)?, table.number(keys.batch)?, table.number(keys.rate)?);
        if let Some(threads) = threads {
            self.set(&table.full(keys.threads), "prefetch_fetches", Raw::Text(threads.to_string()));
        }
        if let Some(bytes) = batch {
            self.set(&table.full(keys.batch), "prefetch_window", bytes_of(bytes));
        }
        if let Some(bytes) = rate.filter(|bytes| *bytes > 0) {
            self.set(&table.full(keys.rate), "prefetch_rate", bytes_of(bytes));
        }
        self.dropped(table, "stream_prefetch", "where most of a blob is wanted it is read in one piece anyway");
        Ok(())
    }
}

fn bytes_of(bytes: u64) -> Raw {
    Raw::Text(bytes.to_string())
}
