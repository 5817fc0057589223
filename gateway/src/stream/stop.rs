//! Stop strings: text is held back while it may still become one.

/// Cuts a text before the first stop string in it.
#[derive(Debug, Default)]
pub(super) struct StopStrings {
    stops: Vec<String>,
    /// A suffix of the text so far that begins a stop string.
    held: String,
    found: bool,
}

impl StopStrings {
    pub(super) fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new(), found: false }
    }

    /// Takes more text and returns what can no longer be part of a stop string.
    pub(super) fn push(&mut self, text: String) -> String {
        if self.found {
            return String::new();
        }
        if self.stops.is_empty() {
            return text;
        }
        self.held.push_str(&text);
        if let Some(start) = self.first_match() {
            self.found = true;
            self.held.truncate(start);
            return std::mem::take(&mut self.held);
        }
        let rest = self.held.split_off(self.held.len() - self.longest_begun());
        std::mem::replace(&mut self.held, rest)
    }

    /// Returns what is held back: the text is over.
    pub(super) fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    pub(super) fn has_matched(&self) -> bool {
        self.found
    }

    /// Where the match begins that is complete first; of several that end together, the longest. Text that arrives
    /// letter by letter gives the same one.
    fn first_match(&self) -> Option<usize> {
        let ends = self.stops.iter().filter_map(|stop| self.held.find(stop).map(|start| (start + stop.len(), start)));
        ends.min().map(|(_, start)| start)
    }

    /// Length of the longest suffix that begins a stop string, in bytes.
    fn longest_begun(&self) -> usize {
        let begun = |stop: &String| {
            let most = self.held.len().min(stop.len() - 1);
            let begins = |len: &usize| stop.is_char_boundary(*len) && self.held.ends_with(&stop[..*len]);
            (1..=most).rev().find(begins).unwrap_or(0)
        };
        self.stops.iter().map(begun).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cut(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut strings = StopStrings::new(stops.iter().map(|&stop| stop.to_owned()).collect());
        let mut text: String = pieces.iter().map(|&piece| strings.push(piece.to_owned())).collect();
        text.push_str(&strings.flush());
        (text, strings.has_matched())
    }

    #[test]
    fn a_stop_string_over_several_pieces_is_cut() {
        assert_eq!(cut(&["END"], &["one E", "N", "D two"]), ("one ".into(), true));
        assert_eq!(cut(&["END"], &["one E", "N", "d"]), ("one ENd".into(), false));
        assert_eq!(cut(&["aab"], &["aa", "ab!"]), ("a".into(), true));
        assert_eq!(cut(&["서울"], &["답은 서", "울"]), ("답은 ".into(), true));
    }

    #[test]
    fn text_comes_out_as_soon_as_it_cannot_match() {
        let mut strings = StopStrings::new(vec!["\n\n".into()]);
        assert_eq!(strings.push("a\n".into()), "a");
        assert_eq!(strings.push("b".into()), "\nb");
    }

    proptest! {
        #[test]
        fn any_grouping_gives_the_same_text(
            text in "[abc한]{0,24}",
            stops in proptest::collection::vec("[abc한]{1,4}", 0..4),
            cuts in proptest::collection::vec(any::<bool>(), 24),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let mut pieces = vec![String::new()];
            for (character, cut) in text.chars().zip(cuts) {
                if cut {
                    pieces.push(String::new());
                }
                pieces.last_mut().unwrap().push(character);
            }
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let whole = cut(&stops, &[&text]);
            prop_assert_eq!(&cut(&stops, &pieces), &whole);
            prop_assert!(text.starts_with(&whole.0));
            prop_assert!(stops.iter().all(|stop| !whole.0.contains(stop)));
        }
    }
}
