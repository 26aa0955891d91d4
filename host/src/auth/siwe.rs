//! Sign-in with Ethereum: the challenge of DDS, and the message built from it (posemesh.md sections 2.1 and 2.2).

use serde::Deserialize;

use super::audience::Audience;

/// The answer to a nonce request (posemesh.md section 2.1).
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Challenge {
    nonce: String,
    domain: String,
    uri: String,
    version: String,
    chain_id: i64,
    issued_at: String,
}

impl Challenge {
    /// Builds the text to sign (posemesh.md section 2.2). Refuses a field that would add lines to the message: the node
    /// would otherwise sign any text that the service injects. Refuses a message for another service ([`Audience`]).
    pub(super) fn message(&self, address: &str, audience: &Audience) -> Result<String, Unsignable> {
        let fields = [
            ("nonce", &self.nonce),
            ("domain", &self.domain),
            ("uri", &self.uri),
            ("version", &self.version),
            ("issuedAt", &self.issued_at),
        ];
        for (name, value) in fields {
            if value.is_empty() {
                return Err(Unsignable::Malformed(format!("field {name} is empty, expected text to sign")));
            }
            if value.chars().any(|c| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}')) {
                let reason = format!("field {name} holds a control character, which is not signed");
                return Err(Unsignable::Malformed(reason));
            }
        }
        audience.check(&self.domain, &self.uri).map_err(Unsignable::Foreign)?;
        Ok(format!(
            "{domain} wants you to sign in with your Ethereum account:\n{address}\n\nURI: {uri}\nVersion: {version}\n\
             Chain ID: {chain}\nNonce: {nonce}\nIssued At: {issued}",
            domain = self.domain,
            uri = self.uri,
            version = self.version,
            chain = self.chain_id,
            nonce = self.nonce,
            issued = self.issued_at,
        ))
    }
}

/// Why a challenge is not signed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unsignable {
    /// A field is empty or would add lines to the message.
    Malformed(String),
    /// It would sign the node in to another service.
    Foreign(String),
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    fn challenge() -> Challenge {
        Challenge {
            nonce: "k3Yp9QwZ7t".into(),
            domain: "dds.test.local".into(),
            uri: "https://dds.test.local/login".into(),
            version: "1".into(),
            chain_id: 8453,
            issued_at: "2025-03-04T05:06:07Z".into(),
        }
    }

    /// The messages of posemesh.md section 2.3, by the letters of their inputs.
    pub(in crate::auth) fn vector_message(inputs: &str) -> String {
        let mut fields = challenge();
        match inputs {
            "b" => fields.nonce.push('7'),
            "c" => fields.domain = "dés.test.local".into(),
            _ => {}
        }
        let mut text =
            fields.message("0x1a642f0e3c3af545e7acbd38b07251b3990914f1", &Audience::Any).expect("plain fields");
        if inputs == "d" {
            text.push_str("\nResources:\n- urn:a\n- urn:b");
        }
        text
    }

    #[test]
    fn fields_with_line_breaks_are_refused() {
        let spoil: [fn(&mut Challenge, &str); 5] = [
            |c, text| c.nonce = text.into(),
            |c, text| c.domain = text.into(),
            |c, text| c.uri = text.into(),
            |c, text| c.version = text.into(),
            |c, text| c.issued_at = text.into(),
        ];
        for spoil in spoil {
            for text in ["", "a\nURI: https://elsewhere", "a\r", "\u{0}", "a\u{85}b", "a\u{2028}b"] {
                let mut fields = challenge();
                spoil(&mut fields, text);
                let Err(Unsignable::Malformed(refused)) = fields.message("0x00", &Audience::Any) else {
                    panic!("{text:?} must not be signed");
                };
                assert!(!refused.contains('\n') && !refused.contains("elsewhere"), "{refused}");
            }
        }
    }

    #[test]
    fn challenge_fields_have_strict_types() {
        let good = json!({"nonce":"n","domain":"d","uri":"u","version":"1","chainId":1,"issuedAt":"t","more":0});
        assert!(serde_json::from_value::<Challenge>(good.clone()).is_ok());
        for (field, value) in [("version", json!(1)), ("chainId", json!("1")), ("nonce", json!(null))] {
            let mut bad = good.clone();
            bad[field] = value;
            assert!(serde_json::from_value::<Challenge>(bad).is_err(), "{field}");
        }
    }
}
