//! Extended attributes of an archive, in the namespaces that EROFS has.

use crate::tree::{Namespace, Xattr};

/// The attribute as EROFS stores it, or none for one that is left out.
///
/// Left out are namespaces that Linux or EROFS does not have (archives made on macOS are full of `com.apple.*`), and
/// overlayfs's own attributes: in the guest this tree is a layer of an overlay, and an image must not steer that.
pub(super) fn xattr(name: &[u8], value: &[u8]) -> Result<Option<Xattr>, &'static str> {
    const PREFIXES: [(&[u8], Namespace); 3] =
        [(b"user.", Namespace::User), (b"trusted.", Namespace::Trusted), (b"security.", Namespace::Security)];
    let (namespace, name) = match name {
        b"system.posix_acl_access" => (Namespace::PosixAclAccess, &b""[..]),
        b"system.posix_acl_default" => (Namespace::PosixAclDefault, &b""[..]),
        _ => match PREFIXES.iter().find_map(|(prefix, space)| Some((*space, name.strip_prefix(*prefix)?))) {
            Some(found) => found,
            None => return Ok(None),
        },
    };
    if matches!(namespace, Namespace::User | Namespace::Trusted) && name.starts_with(b"overlay.") {
        return Ok(None);
    }
    let acl = matches!(namespace, Namespace::PosixAclAccess | Namespace::PosixAclDefault);
    if (name.is_empty() && !acl) || name.contains(&0) {
        return Err("an extended attribute has no valid name");
    }
    if name.len() > 255 {
        return Err("an extended attribute's name is longer than 255 bytes");
    }
    if value.len() > usize::from(u16::MAX) {
        return Err("an extended attribute's value is longer than 65535 bytes");
    }
    Ok(Some(Xattr { namespace, name: name.to_vec(), value: value.to_vec() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_namespaces_are_kept() {
        for (name, namespace, short) in [
            ("user.a", Namespace::User, "a"),
            ("security.capability", Namespace::Security, "capability"),
            ("trusted.x.y", Namespace::Trusted, "x.y"),
            ("system.posix_acl_access", Namespace::PosixAclAccess, ""),
            ("system.posix_acl_default", Namespace::PosixAclDefault, ""),
        ] {
            let expected = Xattr { namespace, name: short.into(), value: b"v".to_vec() };
            assert_eq!(xattr(name.as_bytes(), b"v"), Ok(Some(expected)), "{name}");
        }
    }

    #[test]
    fn foreign_and_overlay_attributes_are_left_out() {
        for name in ["com.apple.x", "lustre.x", "trusted.overlay.opaque", "user.overlay.redirect", "system.other"] {
            assert_eq!(xattr(name.as_bytes(), b"v"), Ok(None), "{name}");
        }
    }

    #[test]
    fn impossible_attributes_are_refused() {
        assert!(xattr(b"user.", b"").is_err());
        assert!(xattr(b"user.a\0b", b"").is_err());
        assert!(xattr(format!("user.{}", "n".repeat(256)).as_bytes(), b"").is_err());
        assert!(xattr(b"user.a", &[0; 65536]).is_err());
    }
}
