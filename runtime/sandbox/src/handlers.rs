//! What pods of a RuntimeClass handler run in: how its guests are made, and what a pod may say of its own.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::model::SandboxConfig;
use crate::{Error, GuestConfig, GuestSize, ManagerConfig, Result};

/// What the annotations begin with by which a pod says how its guest is.
const PREFIX: &str = "guest.nacelle/";

/// A handler whose pods are guests.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GuestHandler {
    /// How its guests are made.
    pub guest: GuestConfig,
    /// What of it a pod's annotations may change.
    pub annotations: Vec<GuestSetting>,
}

/// What a guest is before it is anybody's: pods of one kind are clones of one.
#[derive(Debug, Clone, PartialEq)]
pub struct GuestKind {
    /// How it is made.
    pub guest: GuestConfig,
    /// How large it is.
    pub size: GuestSize,
}

impl GuestKind {
    /// Of pods of which nothing is known but that they are made like this.
    pub fn without_limits(guest: &GuestConfig) -> Self {
        Self { guest: guest.clone(), size: GuestSize::without_limits(guest) }
    }
}

/// What a pod may say of its guest, by an annotation `guest.nacelle/NAME`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestSetting {
    /// [`GuestConfig::memory_mib`], up to [`GuestConfig::max_memory_mib`].
    MemoryMib,
    /// [`GuestConfig::vcpus`], up to [`GuestConfig::max_vcpus`].
    Vcpus,
}

impl GuestSetting {
    const ALL: [Self; 2] = [Self::MemoryMib, Self::Vcpus];

    fn name(self) -> &'static str {
        match self {
            Self::MemoryMib => "memory_mib",
            Self::Vcpus => "vcpus",
        }
    }

    fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|setting| setting.name() == name)
    }
}

impl ManagerConfig {
    /// How the guest of a pod is made: as its handler's are, and as its annotations say where the handler lets them. A
    /// handler that is not configured any more has what all have in common.
    ///
    /// # Errors
    /// An annotation that the handler does not allow, that is unknown, or whose value is none.
    pub fn guest_of(&self, pod: &SandboxConfig) -> Result<GuestConfig> {
        let handler = self.handlers.get(&pod.handler);
        let mut guest = handler.map_or(&self.guest, |handler| &handler.guest).clone();
        let allowed = handler.map_or(&[][..], |handler| &handler.annotations);
        apply(&mut guest, allowed, pod)?;
        Ok(guest)
    }

    /// How guests are made that there may be: those of each handler, as long as no annotation says otherwise.
    pub fn guests(&self) -> impl Iterator<Item = &GuestConfig> {
        let handlers = self.handlers.values().map(|handler| &handler.guest);
        handlers.chain(self.handlers.is_empty().then_some(&self.guest))
    }
}

fn apply(guest: &mut GuestConfig, allowed: &[GuestSetting], pod: &SandboxConfig) -> Result<()> {
    for (key, value) in asked(&pod.annotations) {
        let refused = |why: String| Error::Invalid(format!("config.annotations: {PREFIX}{key}: {why}"));
        let names = || match allowed.iter().map(|setting| setting.name()).collect::<Vec<_>>().join(", ") {
            names if names.is_empty() => "none of a guest's".to_owned(),
            names => names,
        };
        let setting = GuestSetting::of(key).filter(|setting| allowed.contains(setting)).ok_or_else(|| {
            let handler = &pod.handler;
            refused(format!("the handler {handler:?} allows {}: see handlers.{handler}.annotations", names()))
        })?;
        match setting {
            GuestSetting::MemoryMib => guest.memory_mib = number(value, GuestConfig::MEMORY_MIB).map_err(refused)?,
            GuestSetting::Vcpus => {
                let most = guest.max_vcpus.min(*GuestConfig::VCPUS.end());
                guest.vcpus = number(value, *GuestConfig::VCPUS.start()..=most).map_err(refused)?;
            }
        }
    }
    Ok(())
}

/// What annotations say of the guest, by its name.
fn asked(annotations: &BTreeMap<String, String>) -> impl Iterator<Item = (&str, &str)> {
    annotations.iter().filter_map(|(key, value)| Some((key.strip_prefix(PREFIX)?, value.as_str())))
}

fn number<T>(value: &str, range: std::ops::RangeInclusive<T>) -> Result<T, String>
where
    T: std::str::FromStr + PartialOrd + std::fmt::Display,
{
    let number = value.parse().ok().filter(|number| range.contains(number));
    number.ok_or_else(|| format!("{value:?} is no number from {} to {}", range.start(), range.end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply_to(allowed: &[GuestSetting], annotations: &[(&str, &str)]) -> Result<(u64, u8)> {
        let mut guest = GuestConfig { max_vcpus: 4, ..GuestConfig::default() };
        let annotations = annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let pod = SandboxConfig { handler: "large".into(), annotations, ..SandboxConfig::default() };
        apply(&mut guest, allowed, &pod)?;
        Ok((guest.memory_mib, guest.vcpus))
    }

    #[test]
    fn a_pod_says_of_its_guest_what_its_handler_lets_it() {
        let said = [("guest.nacelle/memory_mib", "1024"), ("guest.nacelle/vcpus", "4"), ("other/memory_mib", "x")];
        assert_eq!(apply_to(&GuestSetting::ALL, &said).unwrap(), (1024, 4));
        assert_eq!(apply_to(&[], &[("note", "kept")]).unwrap(), (256, 1));
    }

    #[test]
    fn what_a_pod_may_not_say_is_refused_by_its_annotation() {
        let refused = |allowed: &[GuestSetting], key: &str, value: &str| {
            let error = apply_to(allowed, &[(key, value)]).unwrap_err();
            assert!(matches!(error, Error::Invalid(_)), "{error:?}");
            let error = error.to_string();
            assert!(error.contains(key) && error.contains("config.annotations"), "{error}");
            error
        };
        let error = refused(&[], "guest.nacelle/vcpus", "2");
        assert!(error.contains("handlers.large.annotations") && error.contains("none"), "{error}");
        let error = refused(&[GuestSetting::Vcpus], "guest.nacelle/memory_mib", "512");
        assert!(error.contains("allows vcpus"), "{error}");
        refused(&GuestSetting::ALL, "guest.nacelle/kernel", "/bin/sh");
        for (key, value) in [("vcpus", "5"), ("vcpus", "0"), ("vcpus", "two"), ("memory_mib", "63"), ("memory_mib", "")]
        {
            refused(&GuestSetting::ALL, &format!("guest.nacelle/{key}"), value);
        }
    }
}
