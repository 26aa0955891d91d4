//! Sign-in messages and their signatures, as a server checks them (posemesh.md sections 2.2 and 2.3).
//!
//! The parser accepts the differences between nodes and strict EIP-4361. Addresses may be lower case. One empty line
//! is accepted where the standard requires two. The signature always covers the text as received.

pub(super) use base16ct::lower::encode_string as hex;
use k256::ecdsa::{RecoveryId, Signature, VerifyingKey};
use sha3::{Digest, Keccak256};

/// The content of a message.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) domain: String,
    /// Lower case.
    pub(super) address: String,
    pub(super) nonce: String,
}

const OPENING: &str = " wants you to sign in with your Ethereum account:";

/// Parses a message. The error is one clause that names the missing field.
pub(super) fn parse(text: &str) -> Result<Message, String> {
    let mut lines = text.split('\n').map(|line| line.strip_suffix('\r').unwrap_or(line));
    let domain = lines
        .next()
        .and_then(|line| line.strip_suffix(OPENING))
        .ok_or_else(|| format!("the first line of the message does not end in {OPENING:?}"))?;
    let address = lines.next().unwrap_or_default();
    let address =
        address_of(address).ok_or("the second line of the message is not an address (0x and 40 hex digits)")?;
    // A statement and further fields may be anywhere in between. The nonce binds the message to this sign-in.
    let nonce = lines
        .find_map(|line| line.strip_prefix("Nonce: "))
        .filter(|nonce| !nonce.is_empty())
        .ok_or("the message has no line that begins with \"Nonce: \"")?;
    Ok(Message { domain: domain.to_owned(), address, nonce: nonce.to_owned() })
}

/// `text` in lower case if it is an address.
pub(super) fn address_of(text: &str) -> Option<String> {
    let digits = text.strip_prefix("0x")?;
    let is_address = digits.len() == 40 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    is_address.then(|| text.to_ascii_lowercase())
}

/// The address (lower case) whose key signed `message` with `signature`.
pub(super) fn signer(message: &str, signature: &str) -> Result<String, String> {
    let expected = "the signature is not 0x and 130 hex digits";
    let bytes = signature
        .strip_prefix("0x")
        .and_then(|hex| base16ct::mixed::decode_vec(hex).ok())
        .filter(|bytes| bytes.len() == 65)
        .ok_or(expected)?;
    Ok(address(&recover(&digest(message), &bytes, expected)?))
}

/// The address of `public_key` (130 hex digits without `0x`), if its key signed `url` followed by `timestamp`. Both
/// are used as received (posemesh.md section 2.9).
pub(super) fn url_signer(url: &str, timestamp: &str, signature: &str, public_key: &str) -> Result<String, String> {
    let expected = "the signature is not 130 hex digits without 0x";
    let bytes = base16ct::mixed::decode_vec(signature).ok().filter(|bytes| bytes.len() == 65).ok_or(expected)?;
    let key = recover(&Keccak256::digest(format!("{url}{timestamp}")).into(), &bytes, expected)?;
    if hex(key.to_sec1_point(false).as_bytes()) != public_key.to_ascii_lowercase() {
        return Err("the signature over url and timestamp is of another key than public_key".to_owned());
    }
    Ok(address(&key))
}

fn recover(digest: &[u8; 32], bytes: &[u8], expected: &str) -> Result<VerifyingKey, String> {
    // Wallets write 27 or 28. Some libraries write the recovery id without the offset.
    let v = match bytes[64] {
        v @ (0 | 1) => v,
        v @ (27 | 28) => v - 27,
        v => return Err(format!("the last byte of the signature is {v}, expected 27 or 28")),
    };
    let recovery = RecoveryId::from_byte(v).ok_or(expected)?;
    let signature = Signature::from_slice(&bytes[..64]).map_err(|_| "the signature's numbers are out of range")?;
    Ok(VerifyingKey::recover_from_prehash(digest, &signature, recovery).map_err(|_| "the signature fits no key")?)
}

/// Keccak-256 of the message with the prefix of EIP-191.
pub(super) fn digest(message: &str) -> [u8; 32] {
    let mut hash = Keccak256::new();
    hash.update(b"\x19Ethereum Signed Message:\n");
    hash.update(message.len().to_string().as_bytes());
    hash.update(message.as_bytes());
    hash.finalize().into()
}

/// The address of a key, lower case.
pub(super) fn address(key: &VerifyingKey) -> String {
    let point = key.to_sec1_point(false);
    let hash = Keccak256::digest(&point.as_bytes()[1..]);
    format!("0x{}", hex(&hash[12..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The inputs of the contract's test vectors.
    fn message(domain: &str, nonce: &str, resources: &str) -> String {
        format!(
            "{domain} wants you to sign in with your Ethereum account:\n0x1a642f0e3c3af545e7acbd38b07251b3990914f1\n\n\
             URI: https://dds.test.local/login\nVersion: 1\nChain ID: 8453\nNonce: {nonce}\n\
             Issued At: 2025-03-04T05:06:07Z{resources}"
        )
    }

    #[track_caller]
    fn check(message: &str, signature: &str) {
        assert_eq!(signer(message, signature).as_deref(), Ok("0x1a642f0e3c3af545e7acbd38b07251b3990914f1"));
    }

    #[test]
    fn contract_signatures_recover_contract_address() {
        check(
            &message("dds.test.local", "k3Yp9QwZ7t", ""),
            "0xe120dcd33dfbb8a75ed1925c75637a6dcd01a0786bb067fe7233bc386c85f440538daa78208e58c887a1002279bff0b5fdf10de64dae10e163be955f5fd6288c1b",
        );
        check(
            &message("dds.test.local", "k3Yp9QwZ7t7", ""),
            "0x94c91a4886c119cf3f207e60d114a4e973191409c6f1da08805acf5205161aa94c0ee4ed3c88079c637ba83fd307c92acebf92da82d8fad21a9ce3432f0e39141c",
        );
        check(
            &message("dés.test.local", "k3Yp9QwZ7t", ""),
            "0x89e6022386c3c26d278ec9a74096171fbb6583d43e62dedacd10f16e5cb64e394c76b87a087d5320b830262e5d3eff84c9b702a34b78897a1166efa411b481521c",
        );
        check(
            &message("dds.test.local", "k3Yp9QwZ7t", "\nResources:\n- urn:a\n- urn:b"),
            "0x54d5f9ff5fa0581ee232841a87992d642583edb2236b465329a12a980f061732221ffcadccdf430f5ecba3181db77d2155763f83f2624397b1c64a21c29bf6e51c",
        );
    }

    #[test]
    fn contract_url_signatures_verify_with_contract_key() {
        let key = "041b84c5567b126440995d3ed5aaba0565d71e1834604819ff9c17f5e9d5dd078f70beaf8f588b541507fed6a642c5ab42dfdf8120a7f639de5122d47a69a8e8d1";
        let timestamp = "2025-03-04T05:06:07.000000008Z";
        let (plain, slash) = (
            "0248b8a359d7701d3fe00fb61b9125f5b6276f1d0f63c4e4ab7b1c26721fa7f83dd92385a7a2b22a1f499bf5884b232083d5979123eb82ffa83b52ecd6c5e7ea00",
            "289a39063a6680a0a7ea351952e380ae5c2ed9a2bd271f409a131e1523e13c6d368f98b5235f638fab2a1850ce15b398db7b96599cf5b02ccab1d300745503c501",
        );
        let signer = |url: &str, signature: &str| url_signer(url, timestamp, signature, key);
        let address = Ok("0x1a642f0e3c3af545e7acbd38b07251b3990914f1".to_owned());
        assert_eq!(signer("https://node.lab.test", plain), address);
        assert_eq!(signer("https://node.lab.test/", slash), address);
        assert!(signer("https://node.lab.test", slash).expect_err("other bytes").contains("another key"));
        assert!(signer("https://node.lab.test", &format!("0x{plain}")).expect_err("a prefix").contains("without 0x"));
    }

    #[test]
    fn message_with_one_or_two_empty_lines_parses() {
        let one = message("plane.test", "abc", "");
        let expected = Message {
            domain: "plane.test".to_owned(),
            address: "0x1a642f0e3c3af545e7acbd38b07251b3990914f1".to_owned(),
            nonce: "abc".to_owned(),
        };
        assert_eq!(parse(&one), Ok(expected));
        let two = parse(&one.replacen("\n\n", "\n\n\n", 1)).expect("the standard's form");
        assert_eq!(two.nonce, "abc");
        let checksummed = one.replace("0x1a642f0e3c3af5", "0x1A642F0E3C3AF5");
        assert_eq!(parse(&checksummed).expect("mixed case").address, two.address);
    }

    #[test]
    fn siwe_errors_name_the_invalid_part() {
        assert!(parse("hello").expect_err("no opening").contains("first line"));
        let text = message("plane.test", "abc", "");
        assert!(parse(&text.replace("0x1a", "0x")).expect_err("short").contains("second line"));
        assert!(parse(&text.replace("Nonce: abc", "Nonce: ")).expect_err("empty").contains("Nonce"));
        assert!(signer(&text, "0x00").expect_err("short").contains("130 hex digits"));
        assert!(signer(&text, &format!("0x{}1d", "11".repeat(64))).expect_err("v").contains("29"));
        assert!(signer(&text, &format!("0x{}1b", "00".repeat(64))).expect_err("zero").contains("out of range"));
    }
}
