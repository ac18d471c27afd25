//! The log of calls: a line for each when it is over, also when its caller went away.
//!
//! What changes something is logged as information under the target [`CALLS`], commands in
//! containers, of which probes make many, under [`COMMANDS`], and what only reads as details. No
//! line tells more of a request than whom it is about and the name of a program: neither
//! arguments, variables nor credentials; and what a client writes is cut.

use std::time::Instant;

use nacelle_proto::runtime::v1 as cri;
use nacelle_sandbox::Manager;
use tonic::{Code, Status};
use tracing::Level;

/// The target of calls.
pub const CALLS: &str = "nacelle::cri";
/// The target of commands in containers.
pub const COMMANDS: &str = "nacelle::cri::exec";

/// Most bytes of a word of a client's.
const WORD: usize = 256;
/// Most bytes of an error.
const ERROR: usize = 1024;

/// What a call does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It changes something.
    Change,
    /// It runs a command in a container and waits for it.
    Exec,
    /// It looks something up.
    Read,
}

/// Whom a call is about; what is not known, or does not fit, is not there.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Subject {
    /// The pod: its namespace and name.
    pub pod: Option<String>,
    /// Its id.
    pub sandbox: Option<String>,
    /// The id of a container.
    pub container: Option<String>,
    /// Its name in the pod.
    pub name: Option<String>,
    /// An image, as the caller names it.
    pub image: Option<String>,
    /// A program, without its arguments.
    pub program: Option<String>,
}

/// A request that says whom it is about.
pub trait Request {
    /// That, with what is known of it.
    fn subject(&self, _known: &Manager) -> Subject {
        Subject::default()
    }
}

/// A line of the log: written when it is dropped.
#[derive(Debug)]
pub struct Line {
    method: &'static str,
    kind: Kind,
    begun: Instant,
    /// None if the log does not want the line.
    pub subject: Option<Subject>,
    ended: Option<(Code, String)>,
}

impl Line {
    /// Begins the line of a call.
    pub fn begin(method: &'static str, kind: Kind, request: &impl Request, known: &Manager) -> Self {
        let wanted = match kind {
            Kind::Change => tracing::enabled!(target: CALLS, Level::INFO),
            Kind::Exec => tracing::enabled!(target: COMMANDS, Level::INFO),
            Kind::Read => tracing::enabled!(target: CALLS, Level::DEBUG),
        };
        let subject = wanted.then(|| request.subject(known));
        Self { method, kind, begun: Instant::now(), subject, ended: None }
    }

    /// How the call ended.
    pub fn end<T>(&mut self, result: &Result<T, Status>) {
        self.ended = Some(match result {
            Ok(_) => (Code::Ok, String::new()),
            Err(status) => (status.code(), cut(status.message(), ERROR)),
        });
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let Some(Subject { pod, sandbox, container, name, image, program }) = self.subject.take() else { return };
        let (code, error) = self.ended.take().unwrap_or((Code::Cancelled, "the caller went away".into()));
        let error = Some(error).filter(|error| !error.is_empty());
        let ms = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let method = camel(self.method);
        // Texts are written with their quotes, and with escapes for what ends a line.
        macro_rules! write {
            ($target:expr, $level:expr) => {
                tracing::event!(
                    target: $target,
                    $level,
                    pod,
                    sandbox,
                    container,
                    name,
                    image,
                    program,
                    ms,
                    ?code,
                    error,
                    "{method}"
                )
            };
        }
        match self.kind {
            Kind::Change => write!(CALLS, Level::INFO),
            Kind::Exec => write!(COMMANDS, Level::INFO),
            Kind::Read => write!(CALLS, Level::DEBUG),
        }
    }
}

/// The beginning of a text.
fn cut(text: &str, most: usize) -> String {
    match text.len() <= most {
        true => text.to_owned(),
        false => format!("{}…", text.get(..text.floor_char_boundary(most)).unwrap_or_default()),
    }
}

fn word(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| cut(text, WORD))
}

/// The name of a call as the CRI writes it.
fn camel(name: &str) -> String {
    let part = |part: &str| {
        let mut letters = part.chars();
        let first = letters.next().map(|letter| letter.to_ascii_uppercase());
        first.into_iter().chain(letters).collect::<String>()
    };
    name.split('_').map(part).collect()
}

impl Subject {
    fn pod(id: &str, known: &Manager) -> Self {
        match known.sandbox(id) {
            Ok(status) => Self { pod: full_name(&status.config), sandbox: Some(status.id), ..Self::default() },
            Err(_) => Self { sandbox: word(id), ..Self::default() },
        }
    }

    fn container(id: &str, known: &Manager) -> Self {
        match known.container(id) {
            Ok(status) => Self {
                container: Some(status.id),
                name: word(&status.config.name),
                ..Self::pod(&status.sandbox_id, known)
            },
            Err(_) => Self { container: word(id), ..Self::default() },
        }
    }

    fn image(image: Option<&cri::ImageSpec>) -> Self {
        Self { image: image.and_then(|image| word(&image.image)), ..Self::default() }
    }
}

fn full_name(config: &nacelle_sandbox::SandboxConfig) -> Option<String> {
    word(&format!("{}/{}", config.namespace, config.name))
}

impl Request for cri::RunPodSandboxRequest {
    fn subject(&self, _: &Manager) -> Subject {
        let metadata = self.config.as_ref().and_then(|config| config.metadata.as_ref());
        let pod = metadata.and_then(|metadata| word(&format!("{}/{}", metadata.namespace, metadata.name)));
        Subject { pod, ..Subject::default() }
    }
}

impl Request for cri::CreateContainerRequest {
    fn subject(&self, known: &Manager) -> Subject {
        let config = self.config.as_ref();
        let name = config.and_then(|config| config.metadata.as_ref()).and_then(|metadata| word(&metadata.name));
        let image = config.and_then(|config| config.image.as_ref()).and_then(|image| word(&image.image));
        Subject { name, image, ..Subject::pod(&self.pod_sandbox_id, known) }
    }
}

/// Requests about what a field names.
macro_rules! about {
    (pod: $($pod:ident)*) => {
        $(impl Request for cri::$pod {
            fn subject(&self, known: &Manager) -> Subject {
                Subject::pod(&self.pod_sandbox_id, known)
            }
        })*
    };
    (container: $($container:ident)*) => {
        $(impl Request for cri::$container {
            fn subject(&self, known: &Manager) -> Subject {
                Subject::container(&self.container_id, known)
            }
        })*
    };
    (command: $($command:ident)*) => {
        $(impl Request for cri::$command {
            fn subject(&self, known: &Manager) -> Subject {
                let program = self.cmd.first().and_then(|program| word(program));
                Subject { program, ..Subject::container(&self.container_id, known) }
            }
        })*
    };
    (image: $($image:ident)*) => {
        $(impl Request for cri::$image {
            fn subject(&self, _: &Manager) -> Subject {
                Subject::image(self.image.as_ref())
            }
        })*
    };
    (all: $($all:ident)*) => {
        $(impl Request for cri::$all {})*
    };
}

about! {
    pod: StopPodSandboxRequest RemovePodSandboxRequest PodSandboxStatusRequest UpdatePodSandboxResourcesRequest
        PortForwardRequest PodSandboxStatsRequest CheckpointPodRequest
}
about! {
    container: StartContainerRequest StopContainerRequest RemoveContainerRequest ContainerStatusRequest
        UpdateContainerResourcesRequest ReopenContainerLogRequest AttachRequest CheckpointContainerRequest
        ContainerStatsRequest
}
about! { command: ExecSyncRequest ExecRequest }
about! { image: PullImageRequest RemoveImageRequest ImageStatusRequest }
about! {
    all: VersionRequest StatusRequest RuntimeConfigRequest UpdateRuntimeConfigRequest ListPodSandboxRequest
        ListContainersRequest ListContainerStatsRequest ListPodSandboxStatsRequest ListMetricDescriptorsRequest
        ListPodSandboxMetricsRequest StreamPodSandboxesRequest StreamContainersRequest StreamContainerStatsRequest
        StreamPodSandboxStatsRequest StreamPodSandboxMetricsRequest GetEventsRequest ListImagesRequest
        StreamImagesRequest ImageFsInfoRequest RestorePodRequest
}

/// Implements a service by methods of the same names, messages in and messages out, with a line of
/// the log for each call. What a call makes is added to its line from its answer.
macro_rules! service {
    (
        impl $service:ident for $server:ty {
            streams { $($stream:ident = $piece:ty;)* }
            calls { $($kind:ident $call:ident($request:ty) -> $response:ty $({ $made:ident: $from:ident })?;)* }
        }
    ) => {
        #[tonic::async_trait]
        impl $service for $server {
            $(type $stream = $piece;)*
            $(
                async fn $call(
                    &self,
                    request: tonic::Request<$request>,
                ) -> Result<tonic::Response<$response>, tonic::Status> {
                    let request = request.into_inner();
                    let mut line = crate::calls::Line::begin(
                        stringify!($call),
                        crate::calls::Kind::$kind,
                        &request,
                        &self.manager,
                    );
                    // An inherent method comes before the trait's.
                    let result = <$server>::$call(self, request).await;
                    $(
                        if let (Some(subject), Ok(answer)) = (&mut line.subject, &result) {
                            subject.$made = Some(answer.$from.clone());
                        }
                    )?
                    line.end(&result);
                    result.map(tonic::Response::new)
                }
            )*
        }
    };
}
pub(crate) use service;

#[cfg(test)]
mod tests;
