#!/usr/bin/env bash
#
# The CNI plugin firewall: a repeated DEL takes away another pod's rules.
#
# Versions:  Debian bookworm, containernetworking-plugins 1.1.1+ds1-3+b5 and
#            iptables 1.8.9-2 (nf_tables).
# Behaviour: CNI lets a runtime repeat a DEL, with the result of the pod's ADD
#            as prevResult. firewall removes its rules by the addresses in that
#            result alone, whatever the container's ID. If another pod has been
#            given the address between the two calls, the second one, for a pod
#            that is long gone, succeeds and removes the rules of the new pod.
# Output seen:
#            pod-a: ADD, address 10.99.0.2/24, 2 rules
#            pod-a: DEL, 0 rules
#            pod-b: ADD, address 10.99.0.2/24, 2 rules
#            pod-b: CHECK exit 0
#            pod-a: DEL with another address, 2 rules
#            pod-a: DEL again exit 0, 0 rules
#            pod-b: CHECK exit 1
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
mkdir "$tmp/bin"
ln -s "$multi" "$tmp/bin/iptables"
ln -s "$multi" "$tmp/bin/ip6tables"

# cni COMMAND PLUGIN POD CONFIG: calls a plugin for a pod.
cni() {
    env -i PATH="$tmp/bin" LD_LIBRARY_PATH="$libs" XTABLES_LIBDIR="$libs/xtables" \
        CNI_COMMAND="$1" CNI_CONTAINERID="$3" CNI_IFNAME=eth0 \
        CNI_NETNS="$tmp/$3.net" CNI_PATH="$tmp/usr/lib/cni" \
        "$tmp/usr/lib/cni/$2" <<<"$4"
}

# rules: how many rules the plugin has for the address.
rules() {
    LD_LIBRARY_PATH=$libs XTABLES_LIBDIR=$libs/xtables \
        "$multi" iptables -S CNI-FORWARD | grep -c '10\.99\.0\.2/32' || true
}

# address POD: the pod's address.
address() {
    nsenter --net="$tmp/$1.net" ip -4 -o addr show eth0 | awk '{print $4}'
}

head='"cniVersion": "1.0.0", "name": "findings"'
bridge="{$head, \"type\": \"bridge\", \"bridge\": \"br0\", \"ipam\": {
    \"type\": \"host-local\", \"dataDir\": \"$tmp/ipam\", \"ranges\":
    [[{\"subnet\": \"10.99.0.0/24\", \"rangeStart\": \"10.99.0.2\",
    \"rangeEnd\": \"10.99.0.2\"}]]}}"
firewall="$head, \"type\": \"firewall\", \"backend\": \"iptables\""

for pod in pod-a pod-b; do
    touch "$tmp/$pod.net"
    unshare --net="$tmp/$pod.net" true
done
ip link set lo up

a=$(cni ADD bridge pod-a "$bridge")
a=$(cni ADD firewall pod-a "{$firewall, \"prevResult\": $a}")
echo "pod-a: ADD, address $(address pod-a), $(rules) rules"
cni DEL firewall pod-a "{$firewall, \"prevResult\": $a}"
cni DEL bridge pod-a "$bridge"
echo "pod-a: DEL, $(rules) rules"

b=$(cni ADD bridge pod-b "$bridge")
b=$(cni ADD firewall pod-b "{$firewall, \"prevResult\": $b}")
made=$(rules)
echo "pod-b: ADD, address $(address pod-b), $made rules"
before=0
cni CHECK firewall pod-b "{$firewall, \"prevResult\": $b}" || before=$?
echo "pod-b: CHECK exit $before"

cni DEL firewall pod-a "{$firewall, \"prevResult\": ${a//10.99.0.2/10.99.0.3}}"
other=$(rules)
echo "pod-a: DEL with another address, $other rules"

again=0
cni DEL firewall pod-a "{$firewall, \"prevResult\": $a}" || again=$?
left=$(rules)
echo "pod-a: DEL again exit $again, $left rules"
after=0
cni CHECK firewall pod-b "{$firewall, \"prevResult\": $b}" >/dev/null || after=$?
echo "pod-b: CHECK exit $after"

if [ "$made/$before/$other/$again/$left/$after" = 2/0/2/0/0/1 ]; then
    echo "as described"
else
    echo "the behaviour has changed"
    exit 1
fi
