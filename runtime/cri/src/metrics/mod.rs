//! Metrics of pods and containers, by the names and labels that cAdvisor gave them, which
//! dashboards and alerts know.
//!
//! [`families`] has every metric with its description and where its values come from, in one
//! place: what is described is what is reported.
//!
//! The interface carries whole numbers: seconds are rounded down.

mod families;

use nacelle_proto::runtime::v1 as cri;
use nacelle_sandbox::{ContainerStats, GroupUsage, SandboxStats};

use families::{FAMILIES, Family, Value};

/// Labels that every metric has.
const LABELS: [&str; 6] = ["container", "id", "image", "name", "namespace", "pod"];

/// What a metric is of: a container, or a pod as a whole.
struct Subject<'a> {
    pod: &'a SandboxStats,
    /// None for the pod as a whole.
    container: Option<&'a ContainerStats>,
    group: &'a GroupUsage,
}

/// Every metric there may be.
pub fn descriptors() -> Vec<cri::MetricDescriptor> {
    let labels = |family: &Family| LABELS.iter().chain(family.labels).map(ToString::to_string).collect();
    FAMILIES
        .iter()
        .map(|family| cri::MetricDescriptor {
            name: family.name.into(),
            help: family.help.into(),
            label_keys: labels(family),
        })
        .collect()
}

/// A pod's metrics and its containers'.
pub fn metrics(pod: &SandboxStats) -> cri::PodSandboxMetrics {
    let none = GroupUsage::default();
    let containers = pod.containers.iter().map(|container| {
        let group = container.usage.group.as_ref().unwrap_or(&none);
        let subject = Subject { pod, container: Some(container), group };
        cri::ContainerMetrics { container_id: container.status.id.clone(), metrics: subject.metrics() }
    });
    cri::PodSandboxMetrics {
        pod_sandbox_id: pod.status.id.clone(),
        metrics: Subject { pod, container: None, group: &pod.host }.metrics(),
        container_metrics: containers.collect(),
    }
}

impl Subject<'_> {
    fn metrics(&self) -> Vec<cri::Metric> {
        let of =
            |family: &'static Family| (family.values)(self).into_iter().map(move |value| self.metric(family, value));
        FAMILIES.iter().flat_map(of).collect()
    }

    fn metric(&self, family: &Family, value: Value) -> cri::Metric {
        cri::Metric {
            name: family.name.into(),
            timestamp: self.pod.at,
            metric_type: family.kind.into(),
            label_values: self.labels().into_iter().chain(value.labels).collect(),
            value: Some(cri::UInt64Value { value: value.value }),
        }
    }

    /// In the order of [`LABELS`]. A pod as a whole has no container's name, no image.
    fn labels(&self) -> [String; 6] {
        let (pod, namespace) = (self.pod.status.config.name.clone(), self.pod.status.config.namespace.clone());
        match self.container {
            Some(ContainerStats { status, .. }) => {
                let image = status.config.user_specified_image.as_str();
                let image = if image.is_empty() { &status.config.image } else { image };
                [status.config.name.clone(), status.id.clone(), image.to_owned(), status.id.clone(), namespace, pod]
            }
            None => [String::new(), self.pod.status.id.clone(), String::new(), String::new(), namespace, pod],
        }
    }
}

#[cfg(test)]
mod tests;
