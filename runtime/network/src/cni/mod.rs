//! The runtime's side of the Container Network Interface, version 0.3.1 to 1.1.0.
//!
//! `discovery` finds the configurations, `list` reads one, `plugin` runs one program,
//! `chain` runs those of a list in order, `result` reads what they made.

mod chain;
mod discovery;
mod list;
mod plugin;
mod result;

pub use chain::{Attachment, Chain, Check, Valid};
pub use discovery::load;
pub use list::{NetworkList, Version};
pub use plugin::Plugins;
pub use result::{AddResult, ResultInterface, ResultIp};

#[cfg(test)]
mod tests;
