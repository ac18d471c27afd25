//! Names of pods and containers, which become names of files, control groups and namespaces:
//! what is no id names nothing.

use crate::{Error, Result};

/// Hexadecimal digits of a sandbox's or container's id.
const DIGITS: usize = 64;
/// What the working directory of a template that is being made is called, before its digits.
const TEMPLATE: &str = "template-";
const TEMPLATE_DIGITS: usize = 16;

/// Whether `text` is the id of a sandbox or container: 64 lower-case hexadecimal digits.
pub fn is_id(text: &str) -> bool {
    digits(text, DIGITS)
}

/// Whether `text` is what a template is called while it is made.
pub fn is_template(text: &str) -> bool {
    text.strip_prefix(TEMPLATE).is_some_and(|rest| digits(rest, TEMPLATE_DIGITS))
}

fn digits(text: &str, count: usize) -> bool {
    text.len() == count && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// A new id, which nobody else has.
pub fn new() -> Result<String> {
    random_hex::<{ DIGITS / 2 }>()
}

/// A name for a template that is being made.
pub fn new_template() -> Result<String> {
    Ok(format!("{TEMPLATE}{}", random_hex::<{ TEMPLATE_DIGITS / 2 }>()?))
}

/// Hexadecimal digits of `N` random bytes.
pub fn random_hex<const N: usize>() -> Result<String> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        filled += rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| Error::Internal(format!("no random numbers: {e}")))?;
    }
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_sixty_four_digits_or_none() {
        let id = new().unwrap();
        assert!(is_id(&id) && !is_template(&id));
        assert!(is_template(&new_template().unwrap()));
        for other in
            ["", "..", "../../etc", &id[1..], &format!("{id}0"), &id.replace(&id[..1], "G"), &format!("/{}", &id[1..])]
        {
            assert!(!is_id(other), "{other}");
            assert!(!is_template(other), "{other}");
        }
        assert!(!is_template("template-../../../etc/x"));
    }
}
