//! The byte-level alphabet: `tokenizer.json` writes every byte as one printable character.
//!
//! Source: GPT-2's `bytes_to_unicode`. Printable bytes stand for themselves; the others follow from U+0100 on, in order.

/// One more than the highest character of the alphabet: 256 plus the 68 bytes that are not printable.
const ALPHABET_END: usize = 256 + 68;

/// What a character outside the alphabet maps to in [`BYTE_OF`].
const NO_BYTE: u16 = u16::MAX;

static BYTE_OF: [u16; ALPHABET_END] = byte_of_character();

const fn byte_of_character() -> [u16; ALPHABET_END] {
    let mut table = [NO_BYTE; ALPHABET_END];
    let mut byte = 0;
    let mut next = 256;
    while byte < 256 {
        let printable = matches!(byte as u8, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        if printable {
            table[byte] = byte as u16;
        } else {
            table[next] = byte as u16;
            next += 1;
        }
        byte += 1;
    }
    table
}

/// Appends the bytes that `text` stands for, or gives the first character that stands for none.
pub(super) fn decode_into(text: &str, out: &mut Vec<u8>) -> Result<(), char> {
    for character in text.chars() {
        match BYTE_OF.get(character as usize).copied().and_then(|byte| u8::try_from(byte).ok()) {
            Some(byte) => out.push(byte),
            None => return Err(character),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(text: &str) -> Result<Vec<u8>, char> {
        let mut out = Vec::new();
        decode_into(text, &mut out).map(|()| out)
    }

    #[test]
    fn printable_characters_stand_for_themselves_and_others_follow_from_256() {
        assert_eq!(decoded("aZ!ÿ"), Ok(vec![b'a', b'Z', b'!', 0xFF]));
        assert_eq!(decoded("Ġ"), Ok(vec![b' ']));
        assert_eq!(decoded("ĊĀ"), Ok(vec![b'\n', 0]));
        assert_eq!(decoded("\u{143}"), Ok(vec![0xAD]), "the soft hyphen is the last of the 68");
    }

    #[test]
    fn characters_outside_the_alphabet_are_reported() {
        assert_eq!(decoded("a b"), Err(' '));
        assert_eq!(decoded("안"), Err('안'));
        assert_eq!(decoded("\u{144}"), Err('\u{144}'));
    }
}
