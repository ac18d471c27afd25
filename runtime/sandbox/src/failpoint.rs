//! Places where a test has the daemon fail, stop or end: each step that changes something on the host, the record or
//! the guest. They are there with the feature `failpoints` only, which no release has.

/// Names a step. What happens there, if anything, the variable `FAILPOINTS` says; an error is the enclosing function's.
macro_rules! step {
    ($name:literal) => {
        #[cfg(feature = "failpoints")]
        crate::failpoint::reached($name)?;
    };
}
pub(crate) use step;

#[cfg(feature = "failpoints")]
pub use with::{reached, setup};

#[cfg(feature = "failpoints")]
mod with {
    use rustix::io::Errno;
    use rustix::process::{Signal, getpid, kill_process};

    use crate::{Error, Result};

    /// Reads `FAILPOINTS`, by the syntax of the crate `fail`, for as long as the process lives.
    pub fn setup() {
        std::mem::forget(fail::FailScenario::setup());
    }

    /// The step of this name is reached.
    ///
    /// # Errors
    /// The one that the test wants here.
    pub fn reached(name: &'static str) -> Result<()> {
        tracing::debug!(target: "nacelle::failpoint", step = name, "reached");
        fail::fail_point!(name, |what| act(name, what.as_deref().unwrap_or_default()));
        Ok(())
    }

    fn act(name: &'static str, what: &str) -> Result<()> {
        let errno = match what {
            "kill" | "stop" => {
                let signal = if what == "kill" { Signal::KILL } else { Signal::STOP };
                let _ = kill_process(getpid(), signal);
                return Ok(());
            }
            "ENOSPC" => Errno::NOSPC,
            "EMFILE" => Errno::MFILE,
            _ => Errno::IO,
        };
        tracing::warn!(target: "nacelle::failpoint", step = name, what, "fails here");
        Err(Error::io("pass the step", name)(errno.into()))
    }
}
