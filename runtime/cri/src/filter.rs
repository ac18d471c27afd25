//! What the list calls are asked to leave out.

use std::collections::{BTreeMap, HashMap};

use tonic::Status;

use crate::status::invalid;

/// Whether `labels` has all that `selector` wants.
pub fn labels_match(labels: &BTreeMap<String, String>, selector: &HashMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// Whether an id fits a wanted one, which may be truncated or empty for any.
pub fn id_matches(id: &str, wanted: &str) -> bool {
    id.starts_with(wanted)
}

/// The state that a filter wants, if it wants one: a number that must be one of its states.
pub fn state<S: TryFrom<i32>>(wanted: Option<i32>) -> Result<Option<S>, Status> {
    let state =
        |number| S::try_from(number).map_err(|_| invalid("filter.state.state", format!("{number} is no state")));
    wanted.map(state).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_selected_label_must_be_there_with_its_value() {
        let labels = BTreeMap::from([("app".to_owned(), "web".to_owned()), ("tier".to_owned(), "1".to_owned())]);
        let selector = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        assert!(labels_match(&labels, &selector(&[])));
        assert!(labels_match(&labels, &selector(&[("app", "web")])));
        assert!(!labels_match(&labels, &selector(&[("app", "web"), ("tier", "2")])));
        assert!(!labels_match(&labels, &selector(&[("zone", "")])));
    }
}
