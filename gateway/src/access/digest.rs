//! Keys as the gateway keeps them: their SHA-256. The key itself is nowhere after it was read.

use std::fmt;

use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConstantTimeEq};
use uuid::Uuid;

/// Longest key, in bytes.
const MAX_KEY: usize = 512;

/// The SHA-256 of a key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

/// A text that cannot be a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a key is 1 to {MAX_KEY} printable ASCII characters without spaces or commas")]
pub struct NotAKey;

impl Digest {
    /// The digest of a key that an operator gives.
    ///
    /// # Errors
    /// When no client could send such a key.
    pub fn of_key(key: &str) -> Result<Self, NotAKey> {
        let plain = key.bytes().all(|byte| byte.is_ascii_graphic() && byte != b',');
        if key.is_empty() || key.len() > MAX_KEY || !plain { Err(NotAKey) } else { Ok(Self::of(key.as_bytes())) }
    }

    /// The digest of whatever a client sent.
    pub(super) fn of(key: &[u8]) -> Self {
        Self(Sha256::digest(key).into())
    }

    /// Reads 64 hexadecimal digits.
    pub(super) fn from_hex(text: &str) -> Option<Self> {
        let digits = text.bytes().map(|byte| char::from(byte).to_digit(16)).collect::<Option<Vec<_>>>()?;
        let bytes: Vec<u8> =
            digits.chunks_exact(2).filter_map(|pair| u8::try_from(pair[0] * 16 + pair[1]).ok()).collect();
        if digits.len() == 64 { bytes.try_into().ok().map(Self) } else { None }
    }

    /// Whether two are equal, in a time that does not depend on where they differ.
    pub(super) fn matches(&self, other: &Self) -> Choice {
        self.0.ct_eq(&other.0)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Configurations are printed; a short key could be found from its whole digest.
impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Digest(…)")
    }
}

/// A key that nobody has had before, with 244 random bits.
pub fn new_key() -> String {
    format!("sk-{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple())
}

/// A cache salt that no other tenant can have, whatever it asks for.
pub(crate) fn salt_of(tenant: &str, asked: &str) -> String {
    // Names hold no '/', so two different pairs never make one text.
    Digest::of(format!("{tenant}/{asked}").as_bytes()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_what_sha256sum_prints() {
        let digest = Digest::of_key("sk-test").unwrap();
        // echo -n sk-test | sha256sum
        assert_eq!(digest.to_string(), SK_TEST);
        assert_eq!(Digest::from_hex(&SK_TEST.to_uppercase()), Some(digest));
        assert_eq!(Digest::from_hex(&SK_TEST[1..]), None);
        assert_eq!(Digest::from_hex(&SK_TEST.replace('a', "g")), None);
        assert!(!format!("{digest:?}").contains(&SK_TEST[..8]));
    }

    #[test]
    fn only_what_a_header_can_carry_is_a_key() {
        for text in ["", "two words", "a,b", "schl\u{fc}ssel", "tab\t", &"k".repeat(513)] {
            assert_eq!(Digest::of_key(text), Err(NotAKey), "{text:?}");
        }
        let key = new_key();
        assert!(key.len() == 67 && key != new_key() && Digest::of_key(&key).is_ok(), "{key}");
    }

    #[test]
    fn salts_differ_between_tenants_and_stay_within_one() {
        assert_eq!(salt_of("a", "s"), salt_of("a", "s"));
        assert_ne!(salt_of("a", "s"), salt_of("b", "s"));
        assert_ne!(salt_of("a", ""), salt_of("b", ""));
        assert_eq!(salt_of("a", &"s".repeat(256)).len(), 64);
    }

    const SK_TEST: &str = "f3abf2a6cc4f00987743db5f544ba345b4899ae31f326d8ee9c4816de153c9e0";
}
