//! Configuration of the streaming server.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::bail;
use nacelle_streaming::{Options, Timeouts, TlsFiles};
use serde::{Deserialize, Serialize};

use crate::config::toml;

/// Where exec, attach and port forwarding are served.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StreamingConfig {
    /// Address to listen on.
    pub address: IpAddr,
    /// Port; 0 for any that is free.
    pub port: u16,
    /// Certificate of the server in PEM; empty for plain HTTP.
    pub tls_certificate: PathBuf,
    /// Its private key in PEM.
    pub tls_key: PathBuf,
    /// Certificate of whoever signs clients' certificates; empty if clients need none.
    pub tls_client_ca: PathBuf,
    /// Seconds a client may take for its request and for opening its streams.
    pub handshake_seconds: u64,
    /// Seconds without anything moving after which a connection is closed.
    pub idle_seconds: u64,
}

impl Default for StreamingConfig {
    fn default() -> Self {
        Self {
            address: Ipv4Addr::LOCALHOST.into(),
            port: 0,
            tls_certificate: PathBuf::new(),
            tls_key: PathBuf::new(),
            tls_client_ca: PathBuf::new(),
            handshake_seconds: 30,
            idle_seconds: 4 * 3600,
        }
    }
}

impl StreamingConfig {
    /// Refuses what makes no sense.
    pub fn validate(&self) -> anyhow::Result<()> {
        let files = [
            ("tls_certificate", &self.tls_certificate),
            ("tls_key", &self.tls_key),
            ("tls_client_ca", &self.tls_client_ca),
        ];
        let given = |path: &PathBuf| !path.as_os_str().is_empty();
        if let Some((key, path)) = files.iter().find(|(_, path)| given(path) && !path.is_absolute()) {
            bail!("streaming.{key} = {path:?} must be an absolute path");
        }
        if given(&self.tls_certificate) != given(&self.tls_key) {
            bail!("streaming.tls_certificate and streaming.tls_key belong together: set both or none");
        }
        if given(&self.tls_client_ca) && !given(&self.tls_key) {
            bail!("streaming.tls_client_ca needs streaming.tls_certificate and streaming.tls_key");
        }
        for (key, value, most) in
            [("handshake_seconds", self.handshake_seconds, 3600), ("idle_seconds", self.idle_seconds, 7 * 24 * 3600)]
        {
            if !(1..=most).contains(&value) {
                bail!("streaming.{key} = {value} must be 1 to {most}");
            }
        }
        // Whoever guesses a token within its minute gets into a container.
        if !self.address.is_loopback() && !given(&self.tls_client_ca) {
            bail!(
                "streaming.address = {} is not a loopback address: set streaming.tls_client_ca, so that only known \
                 clients can connect, or use 127.0.0.1",
                self.address
            );
        }
        Ok(())
    }

    /// What the server needs of it.
    pub fn options(&self, timeout_scale: f64) -> Options {
        let seconds = |seconds| Duration::from_secs(seconds).mul_f64(timeout_scale);
        let given = |path: &PathBuf| (!path.as_os_str().is_empty()).then(|| path.clone());
        Options {
            address: (self.address, self.port).into(),
            tls: given(&self.tls_certificate).map(|certificate| TlsFiles {
                certificate,
                key: self.tls_key.clone(),
                client_ca: given(&self.tls_client_ca),
            }),
            timeouts: Timeouts { handshake: seconds(self.handshake_seconds), idle: seconds(self.idle_seconds) },
        }
    }

    /// Its keys with comments, for the configuration file.
    pub fn describe(&self, key: &mut impl FnMut(&str, &str, String)) {
        let comment =
            "Address on which exec, attach and port-forward are served; beyond loopback only with client certificates.";
        key(comment, "streaming.address", toml(self.address));
        key("Its port; 0 for any that is free.", "streaming.port", toml(self.port));
        let comment = "Certificate and private key of that server in PEM; empty for plain HTTP.";
        key(comment, "streaming.tls_certificate", toml(&self.tls_certificate));
        key("", "streaming.tls_key", toml(&self.tls_key));
        let comment = "Certificate of whoever signs its clients' certificates in PEM; empty if they need none.";
        key(comment, "streaming.tls_client_ca", toml(&self.tls_client_ca));
        let comment = "Seconds a client may take for its request and for opening its streams.";
        key(comment, "streaming.handshake_seconds", toml(self.handshake_seconds));
        let comment = "Seconds without anything moving after which a connection is closed.";
        key(comment, "streaming.idle_seconds", toml(self.idle_seconds));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_leave_the_door_open_is_refused() {
        StreamingConfig::default().validate().unwrap();
        let address = Ipv4Addr::UNSPECIFIED.into();
        let open = StreamingConfig { address, ..StreamingConfig::default() };
        assert!(open.validate().unwrap_err().to_string().contains("tls_client_ca"));
        let [certificate, key, ca] = ["/c", "/k", "/ca"].map(PathBuf::from);
        let half = StreamingConfig { tls_certificate: certificate.clone(), ..StreamingConfig::default() };
        assert!(half.validate().unwrap_err().to_string().contains("tls_key"));
        let closed = StreamingConfig {
            address,
            tls_certificate: certificate,
            tls_key: key,
            tls_client_ca: ca,
            ..StreamingConfig::default()
        };
        closed.validate().unwrap();
    }
}
