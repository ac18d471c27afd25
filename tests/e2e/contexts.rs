//! Pods in which containers run with a security context of the test's.

use nacelle_proto::runtime::v1 as cri;
use nacelle_tests::client::{Client, container_config, pod_config};
use tempfile::TempDir;

pub(crate) type Context = cri::LinuxContainerSecurityContext;

pub(crate) struct Pod {
    pub(crate) client: Client,
    id: String,
    _logs: TempDir,
}

impl Pod {
    /// One with the change to what pods of tests have.
    pub(crate) async fn run(change: impl FnOnce(&mut cri::PodSandboxConfig)) -> Self {
        let client = Client::node().await;
        client.pull("busybox").await.unwrap();
        let logs = tempfile::tempdir().unwrap();
        let mut config = pod_config(logs.path());
        change(&mut config);
        let id = client.run_pod_as(config).await.unwrap();
        Self { client, id, _logs: logs }
    }

    /// A running container with this security context, or why there is none.
    pub(crate) async fn container(&self, context: Context, command: &[&str]) -> Result<String, tonic::Status> {
        let mut config = container_config("busybox", command);
        let linux = config.linux.as_mut().unwrap();
        let namespaces = context.namespace_options.clone().or(linux.security_context.take().unwrap().namespace_options);
        linux.security_context = Some(Context { namespace_options: namespaces, ..context });
        let id = self.client.create_as(&self.id, config).await?;
        self.client.start(&id).await?;
        Ok(id)
    }

    /// The same, of one that sleeps.
    pub(crate) async fn sleeper(&self, context: Context) -> Result<String, tonic::Status> {
        self.container(context, &["sleep", "1000"]).await
    }

    pub(crate) async fn remove(self) {
        self.client.remove_pod(&self.id).await.unwrap();
    }
}

/// The security context of a pod of tests.
pub(crate) fn of_pod(config: &mut cri::PodSandboxConfig) -> &mut cri::LinuxSandboxSecurityContext {
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap()
}
