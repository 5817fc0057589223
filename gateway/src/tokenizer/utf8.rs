//! Bytes that arrive in pieces, given out as whole characters.

/// Decodes UTF-8 that arrives in arbitrary pieces without ever splitting a character.
///
/// Bytes that may still become a character are held back. U+FFFD stands only for bytes that no continuation can make
/// valid: a wrong sequence once the byte that proves it wrong is there, a cut one when the text ends. All the text given
/// out is what `String::from_utf8_lossy` makes of all the bytes.
#[derive(Debug, Default, Clone)]
pub struct Utf8Stream {
    /// At most the three bytes of an incomplete character between calls.
    held: Vec<u8>,
}

impl Utf8Stream {
    /// Takes the next bytes and returns the characters that are complete with them.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        if self.held.is_empty()
            && let Ok(text) = std::str::from_utf8(bytes)
        {
            return text.to_owned();
        }
        self.held.extend_from_slice(bytes);
        let (text, used) = complete_characters(&self.held);
        self.held.drain(..used);
        text
    }

    /// Ends the text: what is still held back can no longer become a character.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.held).into_owned();
        self.held.clear();
        text
    }

    /// Tells whether bytes of an incomplete character wait for more.
    pub fn is_waiting(&self) -> bool {
        !self.held.is_empty()
    }
}

/// The text of the complete characters of `bytes`, and how many bytes they take.
fn complete_characters(bytes: &[u8]) -> (String, usize) {
    let mut text = String::with_capacity(bytes.len());
    let mut used = 0;
    loop {
        let rest = &bytes[used..];
        let error = match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                return (text, bytes.len());
            }
            Err(error) => error,
        };
        text.push_str(&String::from_utf8_lossy(&rest[..error.valid_up_to()]));
        used += error.valid_up_to();
        match error.error_len() {
            Some(wrong) => {
                text.push('\u{FFFD}');
                used += wrong;
            }
            None => return (text, used),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_in_pieces_appears_when_it_is_whole() {
        let mut stream = Utf8Stream::default();
        assert_eq!(stream.push(b"a\xF0\x9F"), "a");
        assert!(stream.is_waiting());
        assert_eq!(stream.push(b"\x92"), "");
        assert_eq!(stream.push(b"\x96b"), "💖b");
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn wrong_bytes_become_one_replacement_each_as_soon_as_they_are_known_wrong() {
        let mut stream = Utf8Stream::default();
        assert_eq!(stream.push(b"\xE2\x82"), "");
        assert_eq!(stream.push(b"X\xFF"), "\u{FFFD}X\u{FFFD}");
        assert_eq!(stream.push(b"\xE2"), "");
        assert_eq!(stream.finish(), "\u{FFFD}");
        assert_eq!(stream.push(b"next"), "next");
    }
}
