use std::fmt::{self, Display, Write};

/// Shows something in one line that a terminal obeys nothing of: control characters are written out, as `\n` or
/// `\u{1b}`. Names of files and words of servers may hold any.
#[derive(Debug)]
pub struct Plain<T>(pub T);

impl<T: Display> Display for Plain<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Written(f), "{}", self.0)
    }
}

/// Passes on what is written with control characters written out.
struct Written<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl Write for Written<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some((at, control)) = rest.char_indices().find(|(_, c)| c.is_control()) {
            self.0.write_str(&rest[..at])?;
            write!(self.0, "{}", control.escape_default())?;
            rest = &rest[at + control.len_utf8()..];
        }
        self.0.write_str(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_written_out_and_everything_else_is_as_it_was() {
        for (given, shown) in [
            ("", ""),
            ("/mnt/ä b\\n", "/mnt/ä b\\n"),
            ("\n", "\\n"),
            ("a\r\n\tb", "a\\r\\n\\tb"),
            ("\u{1b}]0;x\u{7}\u{7f}\u{9b}31mü", "\\u{1b}]0;x\\u{7}\\u{7f}\\u{9b}31mü"),
        ] {
            assert_eq!(Plain(given).to_string(), shown);
            assert_eq!(Plain(format_args!("<{given}>")).to_string(), format!("<{shown}>"));
        }
    }
}
