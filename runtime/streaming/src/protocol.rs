//! The names of the protocols, and what each means.

use crate::outcome::Wording;

/// What a version of exec and attach has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Remote {
    /// How the end is told.
    pub wording: Wording,
    /// Whether the client's terminal tells its size.
    pub resizes: bool,
}

/// How exec and attach go over WebSocket messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Channels {
    /// How the end is told.
    pub wording: Wording,
    /// Whether messages are text: a digit for the channel, and base64.
    pub base64: bool,
    /// Whether the client can end its input alone.
    pub half_close: bool,
}

/// The protocol of port forwarding.
const PORT_FORWARD: &str = "portforward.k8s.io";
/// The same in a WebSocket, SPDY frames and all.
const PORT_FORWARD_TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";

/// Exec and attach over SPDY, by the first name offered that is known.
pub fn remote<'a>(offered: &[&'a str]) -> Option<(&'a str, Remote)> {
    offered.iter().find_map(|name| {
        let (wording, resizes) = match *name {
            "v4.channel.k8s.io" => (Wording::Status, true),
            "v3.channel.k8s.io" => (Wording::Text, true),
            "v2.channel.k8s.io" | "channel.k8s.io" => (Wording::Text, false),
            _ => return None,
        };
        Some((*name, Remote { wording, resizes }))
    })
}

/// Exec and attach over WebSocket. A client that offers nothing speaks the oldest.
pub fn channels<'a>(offered: &[&'a str]) -> Option<(&'a str, Channels)> {
    let oldest = Channels { wording: Wording::Text, base64: false, half_close: false };
    if offered.is_empty() {
        return Some(("", oldest));
    }
    offered.iter().find_map(|name| {
        let channels = match *name {
            "v5.channel.k8s.io" => Channels { wording: Wording::Status, half_close: true, ..oldest },
            "v4.channel.k8s.io" => Channels { wording: Wording::Status, ..oldest },
            "v4.base64.channel.k8s.io" => Channels { wording: Wording::Status, base64: true, ..oldest },
            "base64.channel.k8s.io" => Channels { base64: true, ..oldest },
            "channel.k8s.io" => oldest,
            _ => return None,
        };
        Some((*name, channels))
    })
}

/// Port forwarding, over SPDY or tunnelled.
pub fn port_forward<'a>(offered: &[&'a str], tunnelled: bool) -> Option<&'a str> {
    let name = if tunnelled { PORT_FORWARD_TUNNEL } else { PORT_FORWARD };
    offered.iter().find(|offer| **offer == name).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clients_first_choice_that_is_known_wins() {
        let (name, remote) = remote(&["v9.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io"]).unwrap();
        assert_eq!((name, remote.resizes), ("v4.channel.k8s.io", true));
        assert!(super::remote(&["v5.channel.k8s.io"]).is_none(), "SPDY ends there");
        let (name, channels) = channels(&["v5.channel.k8s.io", "v4.channel.k8s.io"]).unwrap();
        assert_eq!((name, channels.half_close), ("v5.channel.k8s.io", true));
        assert!(super::channels(&[]).is_some());
        assert_eq!(port_forward(&["portforward.k8s.io"], true), None);
        assert_eq!(port_forward(&["SPDY/3.1+portforward.k8s.io"], true), Some(PORT_FORWARD_TUNNEL));
    }
}
