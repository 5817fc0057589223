//! Keeps what ranks send each other over a network secret and whole: AES-128-GCM with keys that follow from the formation's
//! secret and from what both ends have drawn for their connection, one for each direction.
//!
//! The secret itself is only as safe as the way by which the coordinator hands it out, which is what `--tls` is for.

use ring::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce as Number, UnboundKey};

use super::super::CollectiveError;
use super::io;
use super::secret::{self, Nonce, Side};

/// What sealing adds to a piece.
pub(super) const TAG_BYTES: usize = 16;
const KEY_BYTES: usize = 16;

/// Both directions of one connection.
pub(super) struct Session {
    outgoing: Direction,
    incoming: Direction,
}

struct Direction {
    key: LessSafeKey,
    /// Pieces so far. A number is used once in the life of a key.
    pieces: u64,
}

impl Session {
    /// The session of the end that is `own`, on the connection that `hello` and `challenge` belong to.
    pub(super) fn new(own: Side, secret: &Nonce, hello: &[u8], challenge: &Nonce) -> Result<Self, CollectiveError> {
        let direction = |sender: Side| Direction::new(&secret::derive(sender, secret, hello, challenge));
        let other = if matches!(own, Side::Guest) { Side::Host } else { Side::Guest };
        Ok(Self { outgoing: direction(own)?, incoming: direction(other)? })
    }

    /// Seals `piece` in place; answers with its tag.
    pub(super) fn seal(&mut self, piece: &mut [u8]) -> Result<[u8; TAG_BYTES], CollectiveError> {
        let number = self.outgoing.next();
        let sealed = self.outgoing.key.seal_in_place_separate_tag(number, Aad::empty(), piece);
        let tag = sealed.map_err(|_| io("seal what goes to another rank", "it is too long"))?;
        tag.as_ref().try_into().map_err(|_| io("seal what goes to another rank", "the tag has another length"))
    }

    /// Opens in place a piece that is followed by its tag. Whether it is the next one that the other end has sealed.
    #[must_use]
    pub(super) fn open(&mut self, piece: &mut [u8]) -> bool {
        let number = self.incoming.next();
        self.incoming.key.open_in_place(number, Aad::empty(), piece).is_ok()
    }
}

impl Direction {
    fn new(material: &[u8]) -> Result<Self, CollectiveError> {
        let key = material.get(..KEY_BYTES).and_then(|bytes| UnboundKey::new(&AES_128_GCM, bytes).ok());
        let key = key.ok_or_else(|| io("make a key of the collective", "it has the wrong length"))?;
        Ok(Self { key: LessSafeKey::new(key), pieces: 0 })
    }

    fn next(&mut self) -> Number {
        let mut number = [0; 12];
        number[..8].copy_from_slice(&self.pieces.to_le_bytes());
        self.pieces += 1;
        Number::assume_unique_for_key(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_opens_once_in_its_turn_and_unchanged() {
        let end = |own| Session::new(own, &[1; 16], b"hello", &[2; 16]).unwrap();
        let (mut guest, mut host) = (end(Side::Guest), end(Side::Host));
        let mut pieces: Vec<Vec<u8>> = (0..4)
            .map(|index| {
                let mut piece = vec![index; 5];
                let tag = guest.seal(&mut piece).unwrap();
                assert_ne!(piece, [index; 5]);
                piece.extend(tag);
                piece
            })
            .collect();
        let again = pieces[0].clone();
        assert!(host.open(&mut pieces[0]) && pieces[0][..5] == [0; 5]);
        assert!(!host.open(&mut again.clone()), "the same one a second time");
        assert!(!host.open(&mut pieces[1]), "one that is late");
        pieces[3][0] ^= 1;
        assert!(!host.open(&mut pieces[3]), "one that was changed on its way");
        let mut reflected = again;
        assert!(!end(Side::Guest).open(&mut reflected), "one's own");
    }
}
