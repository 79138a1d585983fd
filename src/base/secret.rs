//! Text that is never shown.

use std::fmt;

/// A password, a token or a signed address. It can be compared and handed on, and it has no form in
/// which it could get into a message: only [`Secret::expose`] gives the text, so that whoever does it
/// can be found.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Secret(String);

impl Secret {
    /// Hides `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, for the place it was made for and nothing else.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether there is nothing to hide.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_it_is_shown() {
        let secret = Secret::new("hunter2");
        assert_eq!(format!("{secret:?} {secret:#?} {:?}", Some(&secret)), "Secret(..) Secret(..) Some(Secret(..))");
        assert_eq!(secret.expose(), "hunter2");
    }
}
