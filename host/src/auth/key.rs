//! The node's key: its address and its signatures.
//!
//! secp256k1 with Ethereum's conventions. The private key enters through [`NodeKey::from_hex`]. It is never printed, not
//! even in the error about an invalid key.

use std::fmt;

use base16ct::lower::encode_string as hex;
use k256::ecdsa::SigningKey;
use sha3::{Digest, Keccak256};

/// Why a text is not a private key. States the expected form and never quotes the text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Too short or too long.
    #[error("private key has {0} characters, expected 64 hex digits, with or without a leading 0x")]
    Length(usize),
    /// Something that is not a hex digit.
    #[error("private key has a character that is not a hex digit, expected 64 of 0-9 a-f")]
    Digit,
    /// Zero, or beyond the order of the curve.
    #[error("private key is not a valid secp256k1 scalar, expected a number between 1 and the order of the curve")]
    Scalar,
}

/// A private key with its address.
#[derive(Clone)]
pub struct NodeKey {
    signing: SigningKey,
    address: String,
}

impl NodeKey {
    /// Reads 64 hex digits, upper or lower case, with an optional leading `0x`.
    pub fn from_hex(text: &str) -> Result<Self, KeyError> {
        let digits = text.strip_prefix("0x").unwrap_or(text);
        if digits.len() != 64 {
            return Err(KeyError::Length(text.chars().count()));
        }
        let mut bytes = [0_u8; 32];
        base16ct::mixed::decode(digits, &mut bytes).map_err(|_| KeyError::Digit)?;
        let signing = SigningKey::from_slice(&bytes).map_err(|_| KeyError::Scalar)?;
        let point = signing.verifying_key().to_sec1_point(false);
        let hash = Keccak256::digest(&point.as_bytes()[1..]);
        Ok(Self { signing, address: format!("0x{}", hex(&hash[12..])) })
    }

    /// Generates a key and its hex form, for the dev server.
    #[must_use]
    pub fn generate() -> (Self, String) {
        loop {
            let text = hex(&rand::random::<[u8; 32]>());
            // One number in 2^128 is not a key.
            if let Ok(key) = Self::from_hex(&text) {
                return (key, text);
            }
        }
    }

    /// The address: `0x` and 40 lower case hex digits.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The uncompressed point: 130 lower case hex digits that begin with `04`, without `0x`.
    #[must_use]
    pub fn public_key(&self) -> String {
        hex(self.signing.verifying_key().to_sec1_point(false).as_bytes())
    }

    /// Signs `message` as `personal_sign` does (EIP-191, posemesh.md section 2.3): `0x` and 130 hex digits
    /// of r, s and v, where v is 27 or 28.
    #[must_use]
    pub fn personal_sign(&self, message: &str) -> String {
        format!("0x{}", self.sign(&personal_digest(message), 27))
    }

    /// Signs `message` for a registration with a URL (posemesh.md section 2.9): no prefix before the message,
    /// 130 hex digits without `0x`, and v is 0 or 1.
    #[must_use]
    pub fn bare_sign(&self, message: &str) -> String {
        self.sign(&Keccak256::digest(message).into(), 0)
    }

    fn sign(&self, digest: &[u8; 32], v_offset: u8) -> String {
        let (signature, recovery) = self.signing.sign_prehash_recoverable(digest);
        let mut bytes = signature.to_bytes().to_vec();
        bytes.push(v_offset + recovery.to_byte());
        hex(&bytes)
    }
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeKey({})", self.address)
    }
}

/// The digest that `personal_sign` signs. Its length field counts bytes, not characters.
fn personal_digest(message: &str) -> [u8; 32] {
    let mut hash = Keccak256::new();
    hash.update(format!("\x19Ethereum Signed Message:\n{}", message.len()));
    hash.update(message);
    hash.finalize().into()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::auth::siwe::tests::vector_message;

    pub(in crate::auth) fn vector_key() -> NodeKey {
        NodeKey::from_hex(&"01".repeat(32)).expect("a valid scalar")
    }

    #[test]
    fn key_and_address_follow_the_vectors() {
        let key = vector_key();
        assert_eq!(
            key.public_key(),
            "041b84c5567b126440995d3ed5aaba0565d71e1834604819ff9c17f5e9d5dd078f70beaf8f588b541507fed6a642c5ab42dfdf8120a7f639de5122d47a69a8e8d1"
        );
        assert_eq!(key.address(), "0x1a642f0e3c3af545e7acbd38b07251b3990914f1");
        assert_eq!(format!("{key:?}"), "NodeKey(0x1a642f0e3c3af545e7acbd38b07251b3990914f1)");
    }

    #[test]
    fn digests_and_signatures_follow_the_vectors() {
        let (a, b, c, d) = (vector_message("a"), vector_message("b"), vector_message("c"), vector_message("d"));
        assert_eq!((a.len(), c.len()), (217, 218));
        assert_eq!(hex(&personal_digest(&a)), "9b39307376a2280ea0bc780d99945584f8ad9538392fe3ffe383b4a39926460a");
        assert_eq!(hex(&personal_digest(&c)), "21c42b181845e1e77888a177237255458b06960b609107bfe8b77bdcb7f2df94");
        let key = vector_key();
        assert_eq!(
            key.personal_sign(&a),
            "0xe120dcd33dfbb8a75ed1925c75637a6dcd01a0786bb067fe7233bc386c85f440538daa78208e58c887a1002279bff0b5fdf10de64dae10e163be955f5fd6288c1b"
        );
        assert_eq!(
            key.personal_sign(&b),
            "0x94c91a4886c119cf3f207e60d114a4e973191409c6f1da08805acf5205161aa94c0ee4ed3c88079c637ba83fd307c92acebf92da82d8fad21a9ce3432f0e39141c"
        );
        assert_eq!(
            key.personal_sign(&c),
            "0x89e6022386c3c26d278ec9a74096171fbb6583d43e62dedacd10f16e5cb64e394c76b87a087d5320b830262e5d3eff84c9b702a34b78897a1166efa411b481521c"
        );
        assert_eq!(
            key.personal_sign(&d),
            "0x54d5f9ff5fa0581ee232841a87992d642583edb2236b465329a12a980f061732221ffcadccdf430f5ecba3181db77d2155763f83f2624397b1c64a21c29bf6e51c"
        );
    }

    #[test]
    fn signatures_over_a_url_follow_the_vectors() {
        let timestamp = "2025-03-04T05:06:07.000000008Z";
        for (url, digest, signature) in [
            (
                "https://node.lab.test",
                "c317a204af4f21efc232dcb0e014a1c86e34e2eddf1f401d6cf75c1fe09b2e91",
                "0248b8a359d7701d3fe00fb61b9125f5b6276f1d0f63c4e4ab7b1c26721fa7f83dd92385a7a2b22a1f499bf5884b232083d5979123eb82ffa83b52ecd6c5e7ea00",
            ),
            (
                "https://node.lab.test/",
                "4305764fa1cfe0cf275683ba5517b0e9cc6b709ebf25e8fcdbc6b7a060c3245c",
                "289a39063a6680a0a7ea351952e380ae5c2ed9a2bd271f409a131e1523e13c6d368f98b5235f638fab2a1850ce15b398db7b96599cf5b02ccab1d300745503c501",
            ),
        ] {
            let message = format!("{url}{timestamp}");
            assert_eq!(hex(&Keccak256::digest(&message)), digest);
            assert_eq!(vector_key().bare_sign(&message), signature);
        }
    }

    #[test]
    fn every_spelling_gives_the_same_key() {
        let plain = "ab".repeat(32);
        for text in [plain.clone(), format!("0x{plain}"), plain.to_uppercase(), format!("0x{}", plain.to_uppercase())] {
            assert_eq!(
                NodeKey::from_hex(&text).map(|key| key.address),
                NodeKey::from_hex(&plain).map(|key| key.address)
            );
        }
    }

    #[test]
    fn invalid_key_is_never_quoted() {
        let refusal = |text: &str| NodeKey::from_hex(text).map(|_| ()).expect_err("no key");
        assert_eq!(refusal(""), KeyError::Length(0));
        assert_eq!(refusal(&"c0ffee".repeat(10)), KeyError::Length(60));
        assert_eq!(refusal(&format!("0X{}", "01".repeat(32))), KeyError::Length(66));
        assert_eq!(refusal(&format!("{}zz", "01".repeat(31))), KeyError::Digit);
        assert_eq!(refusal(&format!("{}é", "01".repeat(31))), KeyError::Digit);
        assert_eq!(refusal(&"00".repeat(32)), KeyError::Scalar);
        assert_eq!(refusal(&"ff".repeat(32)), KeyError::Scalar);
        for text in ["c0ffee".repeat(10), format!("{}zz", "c0".repeat(31)), "ff".repeat(32)] {
            let error = refusal(&text).to_string();
            assert!(!error.contains("c0") && !error.contains("ffff") && error.contains("expected"), "{error}");
        }
    }
}
