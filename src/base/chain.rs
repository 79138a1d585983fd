use std::error::Error;
use std::fmt;

/// Prints an error with everything that caused it, from the outside in: `a: b: c`.
#[derive(Debug)]
pub struct Chain<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut next = Some(self.0);
        let mut first = true;
        while let Some(error) = next {
            if !first {
                f.write_str(": ")?;
            }
            fmt::Display::fmt(error, f)?;
            first = false;
            next = error.source();
        }
        Ok(())
    }
}
