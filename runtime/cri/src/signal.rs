//! Signals: the CRI numbers them by the alphabet, Linux does not.

use nacelle_proto::runtime::v1::Signal as S;

/// The signals with names; of several names for one number the usual one comes first.
const NAMED: &[(S, u32)] = &[
    (S::Sighup, 1),
    (S::Sigint, 2),
    (S::Sigquit, 3),
    (S::Sigill, 4),
    (S::Sigtrap, 5),
    (S::Sigabrt, 6),
    (S::Sigiot, 6),
    (S::Sigbus, 7),
    (S::Sigfpe, 8),
    (S::Sigkill, 9),
    (S::Sigusr1, 10),
    (S::Sigsegv, 11),
    (S::Sigusr2, 12),
    (S::Sigpipe, 13),
    (S::Sigalrm, 14),
    (S::Sigterm, 15),
    (S::Sigstkflt, 16),
    (S::Sigchld, 17),
    (S::Sigcld, 17),
    (S::Sigcont, 18),
    (S::Sigstop, 19),
    (S::Sigtstp, 20),
    (S::Sigttin, 21),
    (S::Sigttou, 22),
    (S::Sigurg, 23),
    (S::Sigxcpu, 24),
    (S::Sigxfsz, 25),
    (S::Sigvtalrm, 26),
    (S::Sigprof, 27),
    (S::Sigwinch, 28),
    (S::Sigio, 29),
    (S::Sigpoll, 29),
    (S::Sigpwr, 30),
    (S::Sigsys, 31),
];
/// The first real-time signal, as the C library counts them. In both numberings they
/// follow each other.
const FIRST_REALTIME: u32 = 34;

/// The Linux number of a CRI signal; 0 for the runtime's choice.
pub fn number(signal: S) -> u32 {
    match NAMED.iter().find(|(named, _)| *named == signal) {
        Some((_, number)) => *number,
        None if signal == S::RuntimeDefault => 0,
        None => u32::try_from(signal as i32 - S::Sigrtmin as i32).map_or(0, |offset| FIRST_REALTIME + offset),
    }
}

/// The CRI's signal of a Linux number.
pub fn named(number: u32) -> S {
    if let Some((signal, _)) = NAMED.iter().find(|(_, known)| *known == number) {
        return *signal;
    }
    let offset = number.checked_sub(FIRST_REALTIME).and_then(|offset| i32::try_from(offset).ok());
    offset.and_then(|offset| S::try_from(S::Sigrtmin as i32 + offset).ok()).unwrap_or(S::RuntimeDefault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn realtime_signals_have_their_linux_numbers() {
        for (signal, expected) in
            [(S::Sigrtmin, 34), (S::Sigrtminplus15, 49), (S::Sigrtmaxminus14, 50), (S::Sigrtmax, 64)]
        {
            assert_eq!((number(signal), named(expected)), (expected, signal));
        }
    }

    #[test]
    fn every_number_has_one_name_and_gets_it_back() {
        for expected in (1..=31).chain(34..=64) {
            assert_eq!(number(named(expected)), expected);
        }
        assert_eq!((number(S::RuntimeDefault), named(0), named(65)), (0, S::RuntimeDefault, S::RuntimeDefault));
    }
}
