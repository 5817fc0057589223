//! How two ranks prove to each other that they know the secret of a formation without saying it: whoever listens on the
//! wire learns nothing with which to take a rank's place, now or later.
//!
//! The secret is the nonce of the rank that is connected to. Both sides sign what both have drawn for this connection alone
//! (HMAC-SHA256), each under its own label, so that no answer can be sent back as a question.

use ring::{
    digest, hmac,
    rand::{SecureRandom, SystemRandom},
};

use super::super::CollectiveError;
use super::io;

pub(super) const NONCE_BYTES: usize = 16;
pub(super) const PROOF_BYTES: usize = digest::SHA256_OUTPUT_LEN;

/// Random bytes: a secret that only the ranks of one formation know, or what one side of a connection draws.
pub(super) type Nonce = [u8; NONCE_BYTES];

/// Who proves.
#[derive(Clone, Copy)]
pub(super) enum Side {
    /// The rank that connects.
    Guest,
    /// The rank that is connected to.
    Host,
}

impl Side {
    fn proof_label(self) -> &'static [u8] {
        match self {
            Self::Guest => b"phalanx collective guest",
            Self::Host => b"phalanx collective host",
        }
    }

    fn key_label(self) -> &'static [u8] {
        match self {
            Self::Guest => b"phalanx sealed by guest",
            Self::Host => b"phalanx sealed by host",
        }
    }
}

/// Draws from the system's randomness.
pub(super) fn random() -> Result<Nonce, CollectiveError> {
    let mut bytes = Nonce::default();
    let drawn = SystemRandom::new().fill(&mut bytes);
    drawn.map_err(|_| io("draw a secret", "the system gives no random bytes"))?;
    Ok(bytes)
}

/// Eight bytes that say nothing about what was digested.
pub(super) fn digest(bytes: &[u8]) -> u64 {
    let digest = digest::digest(&digest::SHA256, bytes);
    digest.as_ref().first_chunk().map_or(0, |head| u64::from_le_bytes(*head))
}

/// Proves knowledge of `secret` for the connection that `hello` and `challenge` belong to.
pub(super) fn prove(side: Side, secret: &Nonce, hello: &[u8], challenge: &Nonce) -> [u8; PROOF_BYTES] {
    sign(side.proof_label(), secret, hello, challenge)
}

/// What the key of all that `sender` sends on this connection is made of.
pub(super) fn derive(sender: Side, secret: &Nonce, hello: &[u8], challenge: &Nonce) -> [u8; PROOF_BYTES] {
    sign(sender.key_label(), secret, hello, challenge)
}

/// Whether `proof` is what [`prove`] gives, in constant time.
pub(super) fn is_proof(side: Side, secret: &Nonce, hello: &[u8], challenge: &Nonce, proof: &[u8]) -> bool {
    hmac::verify(&key(secret), &message(side.proof_label(), hello, challenge), proof).is_ok()
}

fn sign(label: &[u8], secret: &Nonce, hello: &[u8], challenge: &Nonce) -> [u8; PROOF_BYTES] {
    let tag = hmac::sign(&key(secret), &message(label, hello, challenge));
    let mut signature = [0; PROOF_BYTES];
    signature.copy_from_slice(tag.as_ref());
    signature
}

fn key(secret: &Nonce) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, secret)
}

fn message(label: &[u8], hello: &[u8], challenge: &Nonce) -> Vec<u8> {
    // All parts but the label have fixed lengths, and no label begins with another.
    [label, hello, challenge].concat()
}
