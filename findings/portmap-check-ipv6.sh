#!/usr/bin/env bash
#
# The CNI plugin portmap: CHECK fails on a pod whose ADD has just succeeded.
#
# Versions:  Debian bookworm, containernetworking-plugins 1.1.1+ds1-3+b5 and
#            iptables 1.8.9-2 (nf_tables).
# Behaviour: for a pod with an IPv4 address only, ADD makes the pod's DNAT chain
#            in iptables only. CHECK wants it in ip6tables as well, wherever
#            ip6tables can be used, and fails. Nothing is wrong with the pod:
#            the same CHECK succeeds once ip6tables is not in PATH. So a runtime
#            that trusts CHECK takes every such pod with a host port for broken.
#            Known upstream as containernetworking/plugins issue 819.
# Output seen:
#            ADD: exit 0, the pod has 10.99.0.2/24
#            chain CNI-DN-... : in iptables 1, in ip6tables 0
#            CHECK: exit 1, could not check ipv6 dnat: chain CNI-DN-... not found
#            CHECK without ip6tables in PATH: exit 0
#            (the chain's name has a hash, which is always the same here)
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
            containernetworking-plugins=1.1.1+ds1-3+b5 iptables=1.8.9-2 \
            libxtables12=1.8.9-2 libmnl0=1.0.4-3 libnftnl11=1.2.4-2
        for deb in *.deb; do dpkg -x "$deb" .; done
    )
    unshare -n -m bash "$0" "$tmp"
    exit
fi

tmp=$1
libs=$(echo "$tmp"/usr/lib/*-linux-gnu)
multi=$tmp/usr/sbin/xtables-nft-multi
mkdir "$tmp/both" "$tmp/only4"
ln -s "$multi" "$tmp/both/iptables"
ln -s "$multi" "$tmp/both/ip6tables"
ln -s "$multi" "$tmp/only4/iptables"

# cni PATH COMMAND PLUGIN CONFIG: calls a plugin for the one pod.
cni() {
    env -i PATH="$1" LD_LIBRARY_PATH="$libs" XTABLES_LIBDIR="$libs/xtables" \
        CNI_COMMAND="$2" CNI_CONTAINERID=pod-a CNI_IFNAME=eth0 \
        CNI_NETNS="$tmp/pod.net" CNI_PATH="$tmp/usr/lib/cni" \
        "$tmp/usr/lib/cni/$3" <<<"$4"
}

# chains COMMAND: how many chains of a pod's host ports there are.
chains() {
    LD_LIBRARY_PATH=$libs XTABLES_LIBDIR=$libs/xtables \
        "$multi" "$1" -t nat -S | grep -c '^-N CNI-DN-' || true
}

touch "$tmp/pod.net"
unshare --net="$tmp/pod.net" true
ip link set lo up

head='"cniVersion": "1.0.0", "name": "findings"'
result=$(cni "$tmp/both" ADD bridge "{$head, \"type\": \"bridge\", \"bridge\": \"br0\",
    \"isGateway\": true, \"ipam\": {\"type\": \"host-local\", \"dataDir\": \"$tmp/ipam\",
    \"ranges\": [[{\"subnet\": \"10.99.0.0/24\"}]]}}")
portmap="$head, \"type\": \"portmap\", \"capabilities\": {\"portMappings\": true},
    \"runtimeConfig\": {\"portMappings\":
    [{\"hostPort\": 8080, \"containerPort\": 80, \"protocol\": \"tcp\"}]}"
result=$(cni "$tmp/both" ADD portmap "{$portmap, \"prevResult\": $result}")

address=$(nsenter --net="$tmp/pod.net" ip -4 -o addr show eth0 | awk '{print $4}')
echo "ADD: exit 0, the pod has $address"
in4=$(chains iptables)
in6=$(chains ip6tables)
echo "chain CNI-DN-... : in iptables $in4, in ip6tables $in6"

both=0
said=$(cni "$tmp/both" CHECK portmap "{$portmap, \"prevResult\": $result}") || both=$?
echo "CHECK: exit $both, $(sed -n 's/.*"msg": "\(.*\)".*/\1/p' <<<"$said")"
only4=0
cni "$tmp/only4" CHECK portmap "{$portmap, \"prevResult\": $result}" || only4=$?
echo "CHECK without ip6tables in PATH: exit $only4"

if [ "$in4/$in6/$both/$only4" = 1/0/1/0 ] && [[ $said == *"could not check ipv6 dnat"* ]]; then
    echo "as described"
else
    echo "the behaviour has changed"
    exit 1
fi
