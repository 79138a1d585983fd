//! The word that somebody probably meant.

/// The one of `known` that looks most like `word`, if one does. `-` counts as `_`, and case does not.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_ascii_lowercase().replace('-', "_");
    let likeness = |known: &str| strsim::jaro_winkler(known, &word);
    let best = known.into_iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)))?;
    // Below this, other words than the one that was meant come up.
    (likeness(best) > 0.8).then_some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_understood_and_other_words_are_not() {
        let known = ["deadline", "prefetch_window", "host"];
        assert_eq!(nearest("dedline", known), Some("deadline"));
        assert_eq!(nearest("Prefetch-Window", known), Some("prefetch_window"));
        assert_eq!(nearest("nonsense", known), None);
        assert_eq!(nearest("x", []), None);
    }
}
