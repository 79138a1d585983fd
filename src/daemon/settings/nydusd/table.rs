//! A table of nydusd's file, whose keys are taken one by one, so that what nobody has taken can be told at the end.
//!
//! Errors name keys and never values, which may be secrets.

use serde_json::{Map, Value};

use super::ImportError;

#[derive(Debug, Default)]
pub(super) struct Table {
    /// How it is called in the file, with a dot behind; empty for the root.
    name: String,
    fields: Map<String, Value>,
}

impl Table {
    /// # Errors
    /// The file is something else.
    pub(super) fn root(value: Value) -> Result<Self, ImportError> {
        match value {
            Value::Object(fields) => Ok(Self { name: String::new(), fields }),
            _ => Err(ImportError::Kind { key: "the file".to_owned(), wanted: "an object" }),
        }
    }

    /// The whole name of a key.
    pub(super) fn full(&self, key: &str) -> String {
        format!("{}{}", self.name, shown(key))
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.fields.contains_key(key)
    }

    /// Whether `key` is this very text; it stays.
    pub(super) fn is(&self, key: &str, text: &str) -> bool {
        self.fields.get(key).and_then(Value::as_str) == Some(text)
    }

    /// Whether `key` is this very number; it stays.
    pub(super) fn says(&self, key: &str, number: u64) -> bool {
        self.fields.get(key).and_then(Value::as_u64) == Some(number)
    }

    /// Whether `key` is a switch that is on; it stays.
    pub(super) fn is_on(&self, key: &str) -> bool {
        self.fields.get(key).and_then(Value::as_bool).unwrap_or_default()
    }

    fn take<T>(
        &mut self,
        key: &str,
        wanted: &'static str,
        read: impl FnOnce(Value) -> Option<T>,
    ) -> Result<Option<T>, ImportError> {
        match self.fields.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match read(value) {
                Some(value) => Ok(Some(value)),
                None => Err(ImportError::Kind { key: self.full(key), wanted }),
            },
        }
    }

    /// Text that is not empty: to nydusd that is the same as none.
    pub(super) fn text(&mut self, key: &str) -> Result<Option<String>, ImportError> {
        let found = self.take(key, "a string without control characters", plain)?;
        Ok(found.filter(|text| !text.is_empty()))
    }

    /// The same where there has to be some.
    pub(super) fn required(&mut self, key: &str) -> Result<String, ImportError> {
        self.text(key)?.ok_or_else(|| ImportError::Missing { key: self.full(key) })
    }

    pub(super) fn flag(&mut self, key: &str) -> Result<Option<bool>, ImportError> {
        self.take(key, "true or false", |value| value.as_bool())
    }

    pub(super) fn number(&mut self, key: &str) -> Result<Option<u64>, ImportError> {
        self.take(key, "a whole number that is not negative", |value| value.as_u64())
    }

    pub(super) fn texts(&mut self, key: &str) -> Result<Vec<String>, ImportError> {
        let read = |value| match value {
            Value::Array(items) => items.into_iter().map(plain).collect::<Option<Vec<_>>>(),
            _ => None,
        };
        Ok(self.take(key, "a list of strings without control characters", read)?.unwrap_or_default())
    }

    /// A table in it; an empty one if there is none.
    pub(super) fn table(&mut self, key: &str) -> Result<Self, ImportError> {
        let name = format!("{}.", self.full(key));
        Ok(self.optional(key)?.unwrap_or_else(|| Self { name, fields: Map::new() }))
    }

    /// A table in it.
    pub(super) fn optional(&mut self, key: &str) -> Result<Option<Self>, ImportError> {
        let name = format!("{}.", self.full(key));
        let read = |value| if let Value::Object(fields) = value { Some(Self { name, fields }) } else { None };
        self.take(key, "an object", read)
    }

    /// A list of tables in it that nydusd does not look at, so that anything may be there: each table, or the name of
    /// what is something else.
    pub(super) fn tables(&mut self, key: &str) -> Vec<Result<Self, String>> {
        let name = self.full(key);
        let table = |(at, value)| match value {
            Value::Object(fields) => Ok(Self { name: format!("{name}[{at}]."), fields }),
            _ => Err(format!("{name}[{at}]")),
        };
        match self.fields.remove(key) {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(items)) => items.into_iter().enumerate().map(table).collect(),
            Some(_) => vec![Err(name)],
        }
    }

    /// Whether there is something under `key`, which stays.
    pub(super) fn says_something(&self, key: &str) -> bool {
        self.fields.get(key).is_some_and(|value| !is_nothing(value))
    }

    /// Whether there was something under `key`, which is not looked at.
    pub(super) fn drop(&mut self, key: &str) -> bool {
        self.fields.remove(key).is_some_and(|value| !is_nothing(&value))
    }

    /// The names of what nobody has taken.
    pub(super) fn rest(self) -> Vec<String> {
        self.fields.keys().map(|key| self.full(key)).collect()
    }
}

/// Whether a value says no more than its absence.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

fn plain(value: Value) -> Option<String> {
    match value {
        // A line break could be written into a comment.
        Value::String(text) if !text.chars().any(char::is_control) => Some(text),
        _ => None,
    }
}

/// A key as it may be shown.
fn shown(key: &str) -> String {
    key.chars().filter(|c| !c.is_control()).take(64).collect()
}
