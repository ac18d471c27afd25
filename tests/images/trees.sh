# shellcheck shell=bash
# File trees that several recipes use. Sourced by tests/images/build.

DEFAULT_PATH=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

# system_files DIRECTORY: the files and directories any small system has.
system_files() {
    local root="$1"
    mkdir -p "$root"/{dev,etc,home/app,mnt,opt,proc,root,run,srv,sys,var/log}
    chmod 0700 "$root/root"
    install -d -m 1777 "$root/tmp" "$root/var/tmp"
    chown 1234:2345 "$root/home/app"
    put "$root" etc/passwd 0644 'root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
app:x:1234:2345:Application:/home/app:/bin/sh
'
    put "$root" etc/group 0644 'root:x:0:
daemon:x:1:
audio:x:29:app
staff:x:50:app,daemon
nogroup:x:65534:
app:x:2345:
'
}

# busybox_tree DIRECTORY: Debian's static busybox, each applet a hard link to it. Not symbolic links: a mount over
# one of those would hide all applets.
busybox_tree() {
    local root="$1" unpacked applet debs deb
    unpacked=$(tree)
    debs_of debs busybox-static
    for deb in "${debs[@]}"; do
        [[ $deb != */busybox-static_* ]] || dpkg-deb --extract "$deb" "$unpacked"
    done
    system_files "$root"
    install -D -m 0755 "$unpacked/bin/busybox" "$root/bin/busybox"
    for applet in $("$root/bin/busybox" --list-full); do
        [[ $applet != bin/busybox ]] || continue
        mkdir -p "$root/$(dirname "$applet")"
        ln "$root/bin/busybox" "$root/$applet"
    done
}

DEBIAN_PACKAGES=(base-files bash coreutils dash findutils grep procps sed)

# debian_tree DIRECTORY: a small Debian: shell, core programs, process tools. The same in every image that has it,
# so its layer is too.
debian_tree() {
    local root="$1" debs
    debs_of debs "${DEBIAN_PACKAGES[@]}"
    unpack "$root" "${debs[@]}"
    system_files "$root"
    ln -sf dash "$root/usr/bin/sh"
    ln -sf mawk "$root/usr/bin/awk"
}

# debian_packages DIRECTORY PACKAGE...: packages for a layer on top of debian_tree, with all they depend on that is
# not there yet.
debian_packages() {
    local root="$1" base all upper
    shift
    debs_of base "${DEBIAN_PACKAGES[@]}"
    debs_of all "${DEBIAN_PACKAGES[@]}" "$@"
    mapfile -t upper < <(LC_ALL=C comm -13 <(printf "%s\n" "${base[@]}") <(printf "%s\n" "${all[@]}"))
    unpack "$root" "${upper[@]}"
}
