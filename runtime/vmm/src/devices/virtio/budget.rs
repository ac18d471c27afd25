//! How much a device does before others get their turn.

/// How often a device may still look for a chain before others get their turn.
///
/// It is charged for every look, whatever comes of it. What it is spent on is the guest's to choose: chains that hold
/// nothing, or an index that goes up and down, must not keep a thread that serves others as well.
#[derive(Debug)]
pub struct Budget(usize);

impl Budget {
    /// For this many looks.
    #[must_use]
    pub fn new(looks: usize) -> Self {
        Self(looks)
    }

    /// Of a thread that serves nobody else.
    #[must_use]
    pub fn unlimited() -> Self {
        Self(usize::MAX)
    }

    /// Whether it is. There may be more to serve then.
    #[must_use]
    pub fn is_spent(&self) -> bool {
        self.0 == 0
    }

    /// Takes one look from it; false if there is none left.
    pub fn charge(&mut self) -> bool {
        let left = self.0.checked_sub(1);
        self.0 = left.unwrap_or(0);
        left.is_some()
    }
}

/// How far a queue has been served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Served {
    /// It is empty, and the driver notifies the device of the next chain.
    All,
    /// The budget is spent: the device has to go on by itself.
    Part,
}
