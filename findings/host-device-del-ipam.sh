#!/usr/bin/env bash
#
# The CNI plugin host-device: DEL without a network namespace keeps the address.
#
# Versions:  Debian bookworm, containernetworking-plugins 1.1.1+ds1-3+b5.
# Behaviour: once a pod's network namespace is gone (after a reboot, say), a
#            runtime calls DEL with CNI_NETNS empty, for what the plugins keep
#            elsewhere. host-device answers success without asking its IPAM
#            plugin to release the address, so host-local's file for it stays,
#            and the address is lost to later pods. bridge, given the same,
#            releases it.
#            Known upstream as containernetworking/plugins issue 1196.
# Output seen:
#            bridge: ADD exit 0, host-local has 10.99.0.2
#            bridge: DEL without a namespace exit 0, host-local has nothing
#            host-device: ADD exit 0, host-local has 10.99.0.2
#            host-device: DEL without a namespace exit 0, host-local has 10.99.0.2
#            host-device: ADD of the next pod exit 1, failed to allocate for range 0:
#            no IP addresses available in range set: 10.99.0.2-10.99.0.2
#
# Needs root, and Debian bookworm's apt-get, dpkg, iproute2 and util-linux. The
# packages go into a temporary folder; all network changes are made in
# namespaces of its own.
# Exits 0 if it saw the above, 1 if the behaviour has changed.
set -euo pipefail

if [ $# -eq 0 ]; then
    tmp=$(mktemp -d)
    trap 'rm -rf "$tmp"' EXIT
    (
        cd "$tmp"
        apt-get -qq -o APT::Sandbox::User=root download \
            containernetworking-plugins=1.1.1+ds1-3+b5
        dpkg -x containernetworking-plugins_*.deb .
    )
    unshare -n -m bash "$0" "$tmp"
    exit
fi

tmp=$1
net=$tmp/pod.net
touch "$net"
ip link set lo up

# cni COMMAND PLUGIN POD NETNS MORE: calls a plugin for a pod.
cni() {
    env -i CNI_COMMAND="$1" CNI_CONTAINERID="$3" CNI_IFNAME=eth0 CNI_NETNS="$4" \
        CNI_PATH="$tmp/usr/lib/cni" "$tmp/usr/lib/cni/$2" <<<"{
        \"cniVersion\": \"1.0.0\", \"name\": \"$2-net\", \"type\": \"$2\", $5,
        \"ipam\": {\"type\": \"host-local\", \"dataDir\": \"$tmp/ipam\", \"ranges\":
        [[{\"subnet\": \"10.99.0.0/24\", \"rangeStart\": \"10.99.0.2\",
        \"rangeEnd\": \"10.99.0.2\"}]]}}"
}

# held PLUGIN: the addresses that host-local holds for the plugin's network.
held() {
    local files
    files=$(find "$tmp/ipam/$1-net" -name '10.*' -printf '%f\n')
    echo "${files:-nothing}"
}

# life PLUGIN MORE: a pod is made, its namespace vanishes, and it is removed.
life() {
    local code=0
    unshare --net="$net" true
    cni ADD "$1" pod-a "$net" "$2" >/dev/null
    echo "$1: ADD exit 0, host-local has $(held "$1")"
    umount "$net"
    cni DEL "$1" pod-a "" "$2" || code=$?
    echo "$1: DEL without a namespace exit $code, host-local has $(held "$1")"
    codes+=$code
}

codes=

life bridge '"bridge": "br0"'
ip link add dev0 type veth peer name peer0
life host-device '"device": "dev0"'

unshare --net="$net" true
ip link add dev1 type veth peer name peer1
next=0
said=$(cni ADD host-device pod-b "$net" '"device": "dev1"') || next=$?
echo "host-device: ADD of the next pod exit $next," \
    "$(sed -n 's/.*"msg": "\(.*\)".*/\1/p' <<<"$said")"

if [ "$codes/$(held bridge)/$(held host-device)/$next" = 00/nothing/10.99.0.2/1 ]; then
    echo "as described"
else
    echo "the behaviour has changed"
    exit 1
fi
