# shellcheck shell=bash
# What the commands of hack/ share. Source it after `set -euo pipefail`.
#
# Every line a command prints on its own behalf goes to stderr and starts with the command's name; stdout belongs
# to what the command runs.

NACELLE_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# Where cargo and the guest image's build put their results.
# shellcheck disable=SC2034
NACELLE_TARGET="${CARGO_TARGET_DIR:-$NACELLE_ROOT/target}"
NACELLE_COMMAND="${NACELLE_COMMAND:-$(basename "$0")}"

# say TEXT...: one line of progress.
say() {
    printf '%s: %s\n' "$NACELLE_COMMAND" "$*" >&2
}

# fail WHAT [REMEDY...]: ends the command with status 1. Each further argument is a line of its own.
fail() {
    printf '%s: error: %s\n' "$NACELLE_COMMAND" "$1" >&2
    shift
    local line
    for line in "$@"; do
        printf '%s:   %s\n' "$NACELLE_COMMAND" "$line" >&2
    done
    exit 1
}

# need_root: ends the command unless it runs as root.
need_root() {
    [[ $EUID -eq 0 ]] || fail "this needs root" "run: sudo -E $0"
}

# cache_dir: prints the directory for results that are expensive to make, and makes it.
cache_dir() {
    local dir="${NACELLE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/nacelle}"
    mkdir -p "$dir" || fail "cannot make the cache directory $dir" "set NACELLE_CACHE to a directory that can be written"
    printf '%s\n' "$dir"
}

# hash_of PATH-OR-TEXT...: 16 hex digits that change when the content of a file, or a text, changes.
hash_of() {
    local item
    for item in "$@"; do
        if [[ -f $item ]]; then
            sha256sum <"$item"
        else
            printf '%s\n' "$item" | sha256sum
        fi
    done | sha256sum | cut -c1-16
}

# scaled SECONDS: a time limit, multiplied by NACELLE_TIMEOUT_SCALE (default 1) for slow machines.
scaled() {
    awk -v seconds="$1" -v scale="${NACELLE_TIMEOUT_SCALE:-1}" 'BEGIN { printf "%d\n", seconds * scale + 0.5 }'
}

# apt_need PACKAGE...: installs the packages that are missing. The package lists are fetched only if the packages
# cannot be installed from those that are there.
apt_need() {
    local package missing=() log
    for package in "$@"; do
        [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
    done
    [[ ${#missing[@]} -gt 0 ]] || return 0
    command -v apt-get >/dev/null || fail "these packages are needed: ${missing[*]}" \
        "this is no Debian system; install what they contain and try again"
    need_root
    say "installing ${missing[*]}"
    log=$(mktemp)
    if ! _apt_install "${missing[@]}" >"$log" 2>&1; then
        apt-get -q -o DPkg::Lock::Timeout=600 update >>"$log" 2>&1 || true
        if ! _apt_install "${missing[@]}" >>"$log" 2>&1; then
            tail -n 20 "$log" >&2
            rm -f "$log"
            fail "cannot install ${missing[*]}" "the end of apt-get's output is above; check /etc/apt/sources.list and the network"
        fi
    fi
    rm -f "$log"
}

_apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get -y -q -o DPkg::Lock::Timeout=600 install --no-install-recommends "$@"
}

# hardware_virtualisation: whether guests run on this machine itself. A /dev/kvm without the processor's help is emulated
# in software and cannot run Linux. NACELLE_VMHOST_EMULATE, if set, says no.
hardware_virtualisation() {
    [[ -z ${NACELLE_VMHOST_EMULATE:-} && -w /dev/kvm ]] && grep -qE '^flags\s*:.*\s(vmx|svm)(\s|$)' /proc/cpuinfo
}

# run_shown WHAT LOG EXPECTED COMMAND...: runs COMMAND with its output in the file LOG, and shows that it lives: a
# percentage when about EXPECTED lines of output are known to come (0: unknown), and the seconds so far. On failure
# prints the end of the log and returns COMMAND's status.
run_shown() {
    local what="$1" log="$2" expected="$3" started=$SECONDS shown=$SECONDS pid status=0 every=15 progress
    shift 3
    [[ -t 2 ]] && every=1
    "$@" >"$log" 2>&1 &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.2
        if ((SECONDS - shown >= every)); then
            shown=$SECONDS
            progress=""
            if ((expected > 0)); then
                progress=$(($(wc -l <"$log") * 100 / expected))
                ((progress > 99)) && progress=99
                progress="$progress %, "
            fi
            if [[ -t 2 ]]; then
                printf '\r\033[K%s: %s (%s%d s)' "$NACELLE_COMMAND" "$what" "$progress" $((SECONDS - started)) >&2
            else
                say "$what ($progress$((SECONDS - started)) s)"
            fi
        fi
    done
    wait "$pid" || status=$?
    [[ -t 2 ]] && printf '\r\033[K' >&2
    if ((status != 0)); then
        tail -n 30 "$log" >&2
        say "$what: failed with status $status; the whole output is in $log"
    else
        say "$what: done in $((SECONDS - started)) s"
    fi
    return "$status"
}
