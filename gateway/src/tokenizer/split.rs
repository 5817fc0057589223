//! Cuts text into the words that byte-pair encoding works on, by the pattern that `tokenizer.json` names.

use regex_automata::{Input, PatternID, meta};

/// How gpt-oss's pattern, GPT-2's and their kin end: whitespace up to, but not including, the last space before a word.
/// It is the only look-around in them.
const WHITESPACE_TAIL: &str = r"|\s+(?!\S)|\s+";

/// Runs a split pattern over text.
#[derive(Debug)]
pub(super) enum Splitter {
    /// The pattern ends in [`WHITESPACE_TAIL`] and is otherwise regular: an automaton runs it, with the tail as `\s+` of
    /// its own, and [`cut_whitespace`] does what the look-ahead says.
    Automaton(meta::Regex),
    /// Any other pattern runs in a backtracking engine, about a tenth as fast.
    Backtracking(Box<fancy_regex::Regex>),
}

impl Splitter {
    pub(super) fn new(pattern: &str) -> Result<Self, Box<fancy_regex::Error>> {
        if let Some(regex) = pattern.strip_suffix(WHITESPACE_TAIL).and_then(automaton) {
            return Ok(Self::Automaton(regex));
        }
        Ok(Self::Backtracking(Box::new(fancy_regex::Regex::new(pattern)?)))
    }

    /// Calls `word` with each match and each stretch between matches, in order; together they are the text.
    pub(super) fn split<'t>(&self, text: &'t str, word: impl FnMut(&'t str)) {
        let mut cutter = Cutter { text, done: 0, word };
        match self {
            Self::Automaton(regex) => run_automaton(regex, &mut cutter),
            Self::Backtracking(regex) => {
                // An engine that gives up (its backtracking limit) leaves the rest as one word: slower to merge, but whole.
                regex.find_iter(text).map_while(Result::ok).for_each(|found| cutter.cut(found.start(), found.end()));
            }
        }
        cutter.cut(text.len(), text.len());
    }
}

/// Compiles the part before the tail, and the tail as a second pattern, if both mean the same in either engine.
fn automaton(body: &str) -> Option<meta::Regex> {
    // The backtracking engine reads a quantifier followed by `+` as possessive, this one as a repetition of a repetition.
    let possessive = ["++", "*+", "?+", "}+"].iter().any(|quantifier| body.contains(quantifier));
    // A flag without a group of its own would reach into the tail.
    if possessive || sets_flags_for_the_rest(body) {
        return None;
    }
    // Look-around, back references and atomic groups are errors here, which is the wanted answer.
    meta::Regex::new_many(&[body, r"\s+"]).ok()
}

fn sets_flags_for_the_rest(body: &str) -> bool {
    body.split("(?").skip(1).any(|rest| {
        let after = rest.trim_start_matches(|c: char| c.is_ascii_alphabetic() || c == '-');
        after.starts_with(')')
    })
}

fn run_automaton<'t>(regex: &meta::Regex, cutter: &mut Cutter<'t, impl FnMut(&'t str)>) {
    let text = cutter.text;
    let mut input = Input::new(text);
    while let Some(found) = regex.search(&input) {
        let mut end = found.end();
        if found.pattern() == PatternID::must(1) {
            end = cut_whitespace(text, found.start(), end);
        }
        cutter.cut(found.start(), end);
        let start = if found.is_empty() { after_one_character(text, end) } else { end };
        if start > text.len() {
            return;
        }
        input.set_start(start);
    }
}

/// Where `\s+(?!\S)|\s+` ends on the run of whitespace `start..end`: one character before a word that follows, unless
/// that would leave nothing.
fn cut_whitespace(text: &str, start: usize, end: usize) -> usize {
    if end == text.len() {
        return end;
    }
    let last = text[start..end].chars().next_back().map_or(0, char::len_utf8);
    if end - last > start { end - last } else { end }
}

fn after_one_character(text: &str, at: usize) -> usize {
    at + text[at..].chars().next().map_or(1, char::len_utf8)
}

/// Gives out matches and what lies between them.
struct Cutter<'t, F> {
    text: &'t str,
    done: usize,
    word: F,
}

impl<'t, F: FnMut(&'t str)> Cutter<'t, F> {
    fn cut(&mut self, start: usize, end: usize) {
        for (from, to) in [(self.done, start), (start, end)] {
            if from < to {
                (self.word)(&self.text[from..to]);
            }
        }
        self.done = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const O200K: &str = concat!(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    );

    fn words<'t>(splitter: &Splitter, text: &'t str) -> Vec<&'t str> {
        let mut words = Vec::new();
        splitter.split(text, |word| words.push(word));
        words
    }

    #[test]
    fn the_last_space_of_a_run_belongs_to_the_word_after_it() {
        let splitter = Splitter::new(O200K).unwrap();
        assert!(matches!(splitter, Splitter::Automaton(_)));
        assert_eq!(
            words(&splitter, "a   b \u{3000}\u{3000}1  "),
            ["a", "  ", " b", " \u{3000}", "\u{3000}", "1", "  "]
        );
        assert_eq!(words(&splitter, " \n \n  x"), [" \n \n", " ", " x"]);
        assert_eq!(words(&splitter, ""), Vec::<&str>::new());
    }

    #[test]
    fn patterns_that_mean_something_else_to_the_automaton_run_in_the_backtracking_engine() {
        for body in [r"\p{L}++", r"[^\r\n\p{L}]?+\p{L}+", r"(?>a|ab)", r"x(?=y)", r"(?U)a+", r"(a)\1", r"a{2}+"] {
            let splitter = Splitter::new(&format!("{body}{WHITESPACE_TAIL}")).unwrap();
            assert!(matches!(splitter, Splitter::Backtracking(_)), "{body}");
        }
        assert!(Splitter::new("(").is_err());
    }

    #[test]
    fn both_engines_cut_alike() {
        let automaton = Splitter::new(O200K).unwrap();
        let backtracking = Splitter::Backtracking(Box::new(fancy_regex::Regex::new(O200K).unwrap()));
        let alphabet = [
            " ",
            " ",
            "\n",
            "\r",
            "\t",
            "\u{3000}",
            "a",
            "B",
            "'s",
            "'",
            "é",
            "e\u{301}",
            "안",
            "7",
            "½",
            ".",
            "/",
            "👩\u{200d}",
            "\0",
        ];
        let mut state = 0x9E37_79B9_7F4A_7C15_u64;
        for _ in 0..4000 {
            let mut text = String::new();
            for _ in 0..(state % 23) {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                text.push_str(alphabet[(state >> 33) as usize % alphabet.len()]);
            }
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            assert_eq!(words(&automaton, &text), words(&backtracking, &text), "{text:?}");
        }
    }

    #[test]
    fn empty_matches_neither_stop_the_search_nor_yield_words() {
        let splitter = Splitter::new(&format!("x*{WHITESPACE_TAIL}")).unwrap();
        assert_eq!(words(&splitter, "axxb").concat(), "axxb");
        assert!(words(&splitter, "axxb").contains(&"xx"));
    }
}
