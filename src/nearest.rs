//! The nearest right word for a typo. Every place that refuses an unknown name uses it.

/// `known`, the nearest to `word` first.
pub fn by_distance<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let mut known: Vec<_> = known.into_iter().map(|name| (similarity(word, name), name)).collect();
    known.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    known.into_iter().map(|(_, name)| name).collect()
}

/// The one of `known` that `word` was probably meant to be.
pub fn guess<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let first = by_distance(word, known).into_iter().next()?;
    (similarity(word, first) > 0.75).then_some(first)
}

/// `; did you mean ...? Known are ...`, to be appended to what says that `word` is unknown.
pub fn hint<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let known = by_distance(word, known);
    let list = known.join("`, `");
    match guess(word, known.iter().copied()) {
        Some(guess) => format!("; did you mean `{guess}`? Known are `{list}`"),
        None if list.is_empty() => "; none is known".into(),
        None => format!("; known are `{list}`"),
    }
}

fn similarity(a: &str, b: &str) -> f64 {
    strsim::jaro_winkler(&a.to_lowercase(), &b.to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_comes_first_and_only_a_near_one_is_guessed() {
        let known = ["hardware", "slow", "vm"];
        assert_eq!(hint("slwo", known), "; did you mean `slow`? Known are `slow`, `hardware`, `vm`");
        assert_eq!(guess("VM", known), Some("vm"));
        assert_eq!(guess("xyzzy", known), None);
        assert_eq!(hint("x", []), "; none is known");
    }
}
