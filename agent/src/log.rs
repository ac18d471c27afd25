//! Last words. The agent prints nothing in normal operation: each character on the
//! serial console costs an exit of the virtual machine.

use std::fs::OpenOptions;
use std::io::Write;
use std::panic;

/// Puts a line into the kernel's log, at a level that reaches the console.
pub fn last_words(message: &str) {
    let line = format!("<2>nacelle-agent: {}\n", message.replace('\n', " "));
    let logged = OpenOptions::new().write(true).open("/dev/kmsg").and_then(|mut log| log.write_all(line.as_bytes()));
    if logged.is_err() {
        // Before /dev is there, the kernel may have given us the console itself.
        eprint!("{line}");
    }
}

/// Makes a panic of PID 1 leave its reason on the console before the kernel follows.
pub fn install_panic_hook() {
    panic::set_hook(Box::new(|panic| last_words(&panic.to_string())));
}
