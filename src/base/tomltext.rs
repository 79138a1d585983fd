//! Text as TOML has it, and TOML as JSON.

use std::fmt::Write;

use toml::de::DeValue;

/// A basic string, with its quotes.
pub fn toml_string(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            '\r' => quoted.push_str("\\r"),
            c if c.is_control() => write!(quoted, "\\u{:04x}", u32::from(c)).expect("a string takes it"),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// A list of strings.
pub fn toml_strings<T: AsRef<str>>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<_> = items.into_iter().map(|item| toml_string(item.as_ref())).collect();
    format!("[{}]", items.join(", "))
}

/// What TOML says, as JSON. Dates have no form there and become nothing.
pub fn toml_json(value: &DeValue<'_>) -> serde_json::Value {
    match value {
        DeValue::String(text) => text.as_ref().into(),
        DeValue::Integer(number) => {
            let (digits, radix) = (number.as_str(), number.radix());
            let signed = i64::from_str_radix(digits, radix).map(Into::into);
            signed.or_else(|_| u64::from_str_radix(digits, radix).map(Into::into)).unwrap_or_default()
        }
        DeValue::Float(number) => number.as_str().parse::<f64>().ok().into(),
        DeValue::Boolean(on) => (*on).into(),
        DeValue::Array(items) => items.iter().map(|item| toml_json(item.get_ref())).collect(),
        DeValue::Table(table) => {
            table.iter().map(|(key, value)| (key.get_ref().to_string(), toml_json(value.get_ref()))).collect()
        }
        DeValue::Datetime(_) => serde_json::Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_as_the_same_text() {
        let read = |written: &str| {
            let text = format!("key = {written}");
            let table = toml::de::DeTable::parse(&text).unwrap();
            let value = table.get_ref().get("key").unwrap().get_ref().clone();
            match value {
                toml::de::DeValue::Array(items) => {
                    items.iter().map(|item| item.get_ref().as_str().unwrap().to_owned()).collect()
                }
                other => vec![other.as_str().unwrap().to_owned()],
            }
        };
        for text in ["", "plain", "a \"b\" \\ c", "\u{0}\u{1}\n\r\t\u{7f}\u{85}", "äß\u{1f600}"] {
            assert_eq!(read(&toml_string(text)), [text], "{text:?}");
        }
        assert_eq!(read(&toml_strings(["a", "\""])), ["a", "\""]);
    }
}
