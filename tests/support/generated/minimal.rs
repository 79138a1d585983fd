//! From a long list that fails to a short one.

/// Leaves out whatever can be left out so that `fails` still holds, larger pieces first. The same
/// list gives the same result.
pub fn minimal<T: Clone>(mut items: Vec<T>, fails: impl Fn(&[T]) -> bool) -> Vec<T> {
    let mut piece = items.len().div_ceil(2).max(1);
    loop {
        let (mut at, mut shorter) = (0, false);
        while at < items.len() {
            let mut fewer = items.clone();
            fewer.drain(at..(at + piece).min(items.len()));
            if fails(&fewer) {
                items = fewer;
                shorter = true;
            } else {
                at += piece;
            }
        }
        match piece {
            1 if !shorter => return items,
            1 => {}
            _ => piece = piece.div_ceil(2),
        }
    }
}
