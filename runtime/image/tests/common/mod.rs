//! A real registry on loopback, and small images to put into it.

#![allow(dead_code, clippy::unwrap_used, missing_docs)]

pub mod filled;
pub mod scripted;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nacelle_image::{Digest, ImageStore};
use serde_json::{Value, json};
use tempfile::TempDir;

/// bcrypt of "secret".
const HTPASSWD: &str = "user:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";

/// Debian's docker-registry with a storage of its own; ends with the handle.
pub struct Registry {
    process: Child,
    pub directory: TempDir,
    /// `127.0.0.1:PORT`
    pub address: String,
    protected: bool,
}

/// TLS for a registry: certificate and key files.
pub struct Tls {
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Clients must show a certificate of this authority.
    pub clients: Option<PathBuf>,
}

impl Registry {
    pub fn start() -> Self {
        Self::start_with(false, None)
    }

    /// One that wants `user` and `secret`.
    pub fn start_protected() -> Self {
        Self::start_with(true, None)
    }

    pub fn start_with(protected: bool, tls: Option<&Tls>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for _ in 0..5 {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let address = format!("127.0.0.1:{port}");
            let storage = directory.path().join("storage");
            fs::create_dir_all(&storage).unwrap();
            let mut config = json!({
                "version": "0.1",
                "log": {"level": "info", "accesslog": {"disabled": false}},
                "storage": {"filesystem": {"rootdirectory": storage}, "delete": {"enabled": true}},
                "http": {"addr": address, "secret": "test"},
            });
            if protected {
                let htpasswd = directory.path().join("htpasswd");
                fs::write(&htpasswd, HTPASSWD).unwrap();
                config["auth"] = json!({"htpasswd": {"realm": "test", "path": htpasswd}});
            }
            if let Some(tls) = tls {
                config["http"]["tls"] = json!({"certificate": tls.certificate, "key": tls.key});
                if let Some(clients) = &tls.clients {
                    config["http"]["tls"]["clientcas"] = json!([clients]);
                }
            }
            // JSON is YAML.
            let path = directory.path().join("config.yml");
            fs::write(&path, config.to_string()).unwrap();
            let log = File::create(directory.path().join("log")).unwrap();
            let mut process = Command::new(program("docker-registry"))
                .arg("serve")
                .arg(&path)
                .stdout(log.try_clone().unwrap())
                .stderr(log)
                .stdin(Stdio::null())
                .spawn()
                .unwrap();
            let deadline = Instant::now() + Duration::from_secs(60);
            while Instant::now() < deadline && process.try_wait().unwrap().is_none() {
                if TcpStream::connect(&address).is_ok() {
                    return Self { process, directory, address, protected };
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            let _ = process.kill();
            let _ = process.wait();
        }
        panic!("docker-registry does not start: {}", fs::read_to_string(directory.path().join("log")).unwrap());
    }

    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// Copies the image `tag` of an OCI layout into the registry as `name`, with further options for skopeo.
    pub fn push(&self, layout: &Layout, tag: &str, name: &str, options: &[&str]) {
        let mut command = Command::new(program("skopeo"));
        command.args(["copy", "--insecure-policy", "--dest-tls-verify=false"]).args(options);
        // Otherwise skopeo compresses what is not.
        if !options.contains(&"--format") {
            command.arg("--preserve-digests");
        }
        if self.protected {
            command.args(["--dest-creds", "user:secret"]);
        }
        let source = format!("oci:{}:{tag}", layout.directory.path().display());
        let output = command.arg(source).arg(format!("docker://{}", self.reference(name))).output().unwrap();
        assert!(output.status.success(), "skopeo: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// How often a path was asked for, as the registry itself logged it.
    pub fn requests(&self, part: &str) -> usize {
        let log = fs::read_to_string(self.directory.path().join("log")).unwrap();
        let part = format!("GET {part}");
        log.lines()
            .filter(|line| line.contains(&part) && line.contains("nacelle/"))
            .filter(|line| line.contains("HTTP/1.1\""))
            .count()
    }

    /// The file in which the registry keeps a blob.
    pub fn blob(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        let blobs = self.directory.path().join("storage/docker/registry/v2/blobs/sha256");
        blobs.join(&hex[..2]).join(&hex).join("data")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A program that the tests stand on.
pub fn program(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let cache = std::env::var_os("NACELLE_CACHE").map(PathBuf::from).or_else(|| {
        let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        Some(base.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?.join("nacelle"))
    });
    places.extend(cache.map(|cache| cache.join(name).join("usr/bin")));
    let found = places.into_iter().map(|place| place.join(name)).find(|path| path.exists());
    found.unwrap_or_else(|| panic!("{name} is missing: apt-get install docker-registry skopeo erofs-utils"))
}

pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// How a layer is compressed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    None,
    Gzip,
    Zstd,
}

/// An OCI image layout on the disk.
pub struct Layout {
    pub directory: TempDir,
    manifests: Vec<Value>,
}

/// An image in a layout.
#[derive(Clone)]
pub struct Pushed {
    pub manifest: Digest,
    pub config: Digest,
    pub layers: Vec<Digest>,
}

impl Default for Layout {
    fn default() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("blobs/sha256")).unwrap();
        fs::write(directory.path().join("oci-layout"), json!({"imageLayoutVersion": "1.0.0"}).to_string()).unwrap();
        Self { directory, manifests: Vec::new() }
    }
}

impl Layout {
    fn blob(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        fs::write(self.directory.path().join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        digest
    }

    fn write_index(&self) {
        let index = json!({"schemaVersion": 2, "manifests": self.manifests});
        fs::write(self.directory.path().join("index.json"), index.to_string()).unwrap();
    }

    /// Adds an image of these archives, for this architecture.
    pub fn image(&mut self, tag: &str, architecture: &str, layers: &[(Vec<u8>, Compression)]) -> Pushed {
        let mut descriptors = Vec::new();
        let mut diff_ids = Vec::new();
        let mut digests = Vec::new();
        for (archive, compression) in layers {
            let (bytes, suffix) = match compression {
                Compression::None => (archive.clone(), ""),
                Compression::Gzip => {
                    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                    encoder.write_all(archive).unwrap();
                    (encoder.finish().unwrap(), "+gzip")
                }
                Compression::Zstd => (zstd::encode_all(&archive[..], 1).unwrap(), "+zstd"),
            };
            let digest = self.blob(&bytes);
            digests.push(digest);
            diff_ids.push(Digest::of(archive));
            let media_type = format!("application/vnd.oci.image.layer.v1.tar{suffix}");
            descriptors.push(json!({"mediaType": media_type, "digest": digest, "size": bytes.len()}));
        }
        let config = json!({
            "architecture": architecture,
            "os": "linux",
            "config": {"Env": ["A=b"], "Cmd": ["/bin/sh"], "User": "7:8", "Labels": {"tag": tag}},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": [],
        })
        .to_string();
        let config_digest = self.blob(config.as_bytes());
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest, "size": config.len(),
            },
            "layers": descriptors,
        })
        .to_string();
        let digest = self.blob(manifest.as_bytes());
        self.manifests.push(json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest,
            "size": manifest.len(),
            "platform": {"os": "linux", "architecture": architecture},
            "annotations": {"org.opencontainers.image.ref.name": tag},
        }));
        self.write_index();
        Pushed { manifest: digest, config: config_digest, layers: digests }
    }

    /// Adds an index of all images so far.
    pub fn index(&mut self, tag: &str) -> Digest {
        let mut entries = self.manifests.clone();
        for entry in &mut entries {
            entry.as_object_mut().unwrap().remove("annotations");
        }
        let media_type = "application/vnd.oci.image.index.v1+json";
        let index = json!({"schemaVersion": 2, "mediaType": media_type, "manifests": entries}).to_string();
        let digest = self.blob(index.as_bytes());
        self.manifests.push(json!({
            "mediaType": media_type, "digest": digest, "size": index.len(),
            "annotations": {"org.opencontainers.image.ref.name": tag},
        }));
        self.write_index();
        digest
    }
}

/// An archive of files with this content.
pub fn files(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = header(tar::EntryType::Regular, content.len() as u64);
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        builder.append(&header, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

pub fn header(kind: tar::EntryType, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o644);
    header.set_mtime(1_600_000_000);
    header.set_device_major(0).unwrap();
    header.set_device_minor(0).unwrap();
    header
}

/// Content that does not compress, the same for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = std::iter::repeat_with(&mut next).take(length.div_ceil(8)).flatten().collect();
    bytes.truncate(length);
    bytes
}

/// The disk that a guest would get.
pub fn disk(image: &nacelle_image::Image) -> Vec<u8> {
    let mut disk = Vec::new();
    for mut file in image.open_rootfs().unwrap() {
        file.read_to_end(&mut disk).unwrap();
        assert_eq!(disk.len() % 4096, 0);
    }
    disk
}

/// Names of everything below a directory of the store.
pub fn listing(root: &Path, directory: &str) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(root.join(directory))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A store in a directory of its own.
pub fn store() -> (TempDir, ImageStore) {
    let directory = tempfile::tempdir().unwrap();
    let store = ImageStore::open(directory.path()).unwrap();
    (directory, store)
}
