# shellcheck shell=bash
# File trees from Debian packages, without installing them. Sourced by tests/images/build.

# debs_of ARRAY PACKAGE...: downloads the packages and all they depend on, verified by apt, and puts their files' names
# into ARRAY, sorted.
debs_of() {
    local -n _files="$1"
    local state="$work/apt" archive log="$work/apt.log"
    shift
    archive="$(cache_dir)/debs"
    mkdir -p "$state/none/partial" "$archive/partial"
    # apt resolves dependencies against an empty system, not against this one.
    : >"$state/status"
    local apt=(apt-get -q -y -o "Dir::State::status=$state/status" -o Debug::NoLocking=1 -o APT::Sandbox::User=root
        -o APT::Install-Recommends=false)
    # Without it the larger package that does the same for existing systems would be chosen.
    set -- "$@" usr-is-merged
    # apt names only what it would have to download, so that it is asked with an empty archive.
    if ! "${apt[@]}" -o "Dir::Cache::archives=$state/none/" install --print-uris "$@" >"$state/uris" 2>"$log"; then
        apt-get -q -o DPkg::Lock::Timeout=600 update >"$log" 2>&1 || true
        "${apt[@]}" -o "Dir::Cache::archives=$state/none/" install --print-uris "$@" >"$state/uris" 2>>"$log" ||
            _debs_failed "$log" "$@"
    fi
    mapfile -t _files < <(awk -v archive="$archive" '/^\x27/ { print archive "/" $2 }' "$state/uris" | LC_ALL=C sort)
    [[ ${#_files[@]} -gt 0 ]] || _debs_failed "$log" "$@"
    local file
    for file in "${_files[@]}"; do
        if [[ ! -s $file ]]; then
            "${apt[@]}" -o "Dir::Cache::archives=$archive/" install --download-only "$@" >"$log" 2>&1 ||
                _debs_failed "$log" "$@"
            break
        fi
    done
}

_debs_failed() {
    tail -n 20 "$1" >&2
    shift
    fail "cannot download the packages $*" \
        "the end of apt-get's output is above; check /etc/apt/sources.list and the network"
}

# unpack DIRECTORY DEB...: unpacks packages into a tree with merged /usr, without their documentation.
unpack() {
    local root="$1" deb link
    shift
    for link in bin sbin lib lib64; do
        mkdir -p "$root/usr/$link"
        [[ -L $root/$link ]] || ln -s "usr/$link" "$root/$link"
    done
    for deb in "$@"; do
        dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink --directory "$root" \
            --exclude='./usr/share/doc/*' --exclude='./usr/share/man/*' --exclude='./usr/share/locale/*' \
            --exclude='./usr/share/info/*' --exclude='./usr/share/lintian/*' --exclude='./usr/share/bug/*'
    done
}
