# shellcheck shell=bash
# busybox as its source's own default configuration makes it, statically linked: Debian's static package lacks programs
# that conformance tests run (pgrep, ipcs, adduser). Sourced by tests/images/build.

# busybox_source: prints the directory with busybox's source, from Debian's source package, verified by apt.
busybox_source() {
    local state="$work/apt-source" log="$work/apt-source.log" apt archive
    mkdir -p "$state"/{lists/partial,parts,source}
    source_lists >"$state/parts/debian.sources"
    apt=(apt-get -q -y -o "Dir::Etc::sourcelist=/dev/null" -o "Dir::Etc::sourceparts=$state/parts"
        -o "Dir::State::lists=$state/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User=root)
    if ! { "${apt[@]}" update && (cd "$state/source" && "${apt[@]}" source --download-only busybox); } >"$log" 2>&1; then
        _debs_failed "$log" "busybox (source)"
    fi
    for archive in "$state"/source/busybox_*.orig.tar.*; do
        tar -x --directory "$state/source" --file "$archive"
    done
    printf '%s\n' "$state"/source/busybox-*/
}

# source_lists: the machine's own package sources of its release, as sources of source packages.
source_lists() {
    local codename file
    codename=$(. /etc/os-release && printf %s "${VERSION_CODENAME:-}")
    for file in /etc/apt/sources.list.d/*.sources; do
        [[ -f $file ]] || continue
        # Stanzas are paragraphs; each is kept whose suites are this release's.
        awk -v codename="$codename" 'BEGIN { RS = ""; ORS = "\n\n" }
            match($0, /(^|\n)Suites:[^\n]*/) {
                suites = substr($0, RSTART, RLENGTH)
                if (suites ~ "[ \t]" codename "([ \t-]|$)") { sub(/Types:[^\n]*/, "Types: deb-src"); print }
            }' "$file"
    done
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [[ -f $file ]] || continue
        # deb [options] URI SUITE COMPONENT...
        awk -v codename="$codename" '$1 == "deb" {
            signed = ""; first = 2
            if ($2 ~ /^\[/) {
                for (i = 2; i <= NF; i++) {
                    if (match($i, /signed-by=[^]]*/)) signed = substr($i, RSTART + 10, RLENGTH - 10)
                    if ($i ~ /\]$/) break
                }
                first = i + 1
            }
            suite = $(first + 1)
            if (suite != codename && index(suite, codename "-") != 1) next
            printf "Types: deb-src\nURIs: %s\nSuites: %s\nComponents:", $first, suite
            for (i = first + 2; i <= NF; i++) printf " %s", $i
            if (signed != "") printf "\nSigned-By: %s", signed
            printf "\n\n"
        }' "$file"
    done
}

# busybox_program: prints the path of the program. Built once for a version of this file, and kept in the cache.
busybox_program() {
    local program source
    program="$(cache_dir)/busybox-$(hash_of "$here/busybox-source.sh" "$(gcc --version | head -n 1)")"
    if [[ ! -x $program ]]; then
        source=$(busybox_source)
        make -s -C "$source" defconfig >"$work/busybox.log" 2>&1
        # tc wants kernel headers of before 2024.
        sed -i -e 's/^# CONFIG_STATIC is not set/CONFIG_STATIC=y/' -e 's/^CONFIG_TC=y/# CONFIG_TC is not set/' "$source/.config"
        NACELLE_COMMAND=tests/images/build run_shown "compiling busybox" "$work/busybox.log" 0 \
            make -C "$source" -j"$(nproc)" busybox || fail "cannot compile busybox"
        install -m 0755 "$source/busybox" "$program.$$"
        mv "$program.$$" "$program"
    fi
    printf '%s\n' "$program"
}

# busybox_full_tree DIRECTORY: like busybox_tree, with every program that busybox has.
busybox_full_tree() {
    local root="$1" program applet
    program=$(busybox_program)
    system_files "$root"
    install -D -m 0755 "$program" "$root/bin/busybox"
    for applet in $("$root/bin/busybox" --list-full); do
        [[ $applet != bin/busybox ]] || continue
        mkdir -p "$root/$(dirname "$applet")"
        ln "$root/bin/busybox" "$root/$applet"
    done
}
