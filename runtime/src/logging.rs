//! Messages on standard error, one line each.

use std::io::IsTerminal;

use anyhow::Context;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

/// Starts logging. `RUST_LOG` wins over `default`.
pub fn start(default: &str) -> anyhow::Result<()> {
    let (source, filter) = match std::env::var("RUST_LOG") {
        Ok(filter) => ("RUST_LOG", filter),
        Err(_) => ("log", default.to_owned()),
    };
    let filter = parsed(&filter).with_context(|| format!("{source} = {filter:?} is no filter of messages"))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    Ok(())
}

/// A filter: levels, for everything and by target.
fn parsed(filter: &str) -> Result<EnvFilter, ParseError> {
    EnvFilter::try_new(filter)
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn levels_are_set_by_target() {
        let filter = parsed("info,nacelle::cri::exec=warn,nacelle_sandbox=debug").unwrap();
        tracing::subscriber::with_default(tracing_subscriber::fmt().with_env_filter(filter).finish(), || {
            assert!(tracing::enabled!(target: "nacelle::cri", Level::INFO));
            assert!(!tracing::enabled!(target: "nacelle::cri", Level::DEBUG));
            assert!(!tracing::enabled!(target: "nacelle::cri::exec", Level::INFO));
            assert!(tracing::enabled!(target: "nacelle::cri::exec", Level::WARN));
            assert!(tracing::enabled!(target: "nacelle_sandbox::agent", Level::DEBUG));
        });
        assert!(parsed("info,nacelle::cri=loud").is_err());
    }
}
