// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

// The beds' networks are cut from 198.18.0.0/15, which RFC 2544 reserves for tests: no real network
// uses it. A node gets a /22: one gateway and 1021 pods, more than any benchmark here starts.
const (
	networkBase = "198.18.0.0/15"
	subnetBits  = 22
	subnetCount = 1 << (subnetBits - 15)
)

// subnet returns the i-th node network and its gateway, which is the bridge's address.
func subnet(i int) (network netip.Prefix, gateway netip.Addr) {
	base := netip.MustParsePrefix(networkBase).Addr().As4()
	n := uint32(base[0])<<24 | uint32(base[1])<<16 | uint32(i)<<(32-subnetBits)
	addr := netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
	return netip.PrefixFrom(addr, subnetBits), addr.Next()
}

// inUse reports whether an interface of this machine has an address in network, which then is no
// longer ours to give away.
func inUse(network netip.Prefix) (bool, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return false, err
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Overlaps(network) {
			return true, nil
		}
	}
	return false, nil
}

// addBridge creates a bridge with the gateway's address, up, in a network namespace or, without
// one, on this machine. Its hardware address is its own: the kernel would give it that of one of
// its ports, and another one when that pod goes, and for seconds the other pods would answer to
// nobody.
func addBridge(ctx context.Context, netns, name string, network netip.Prefix, gateway netip.Addr) error {
	ip := gateway.As4()
	hardware := net.HardwareAddr(append([]byte{0x02, 0x42}, ip[:]...)) // locally administered
	for _, args := range [][]string{
		{"link", "add", name, "address", hardware.String(), "type", "bridge"},
		{"addr", "add", fmt.Sprintf("%s/%d", gateway, network.Bits()), "dev", name},
		{"link", "set", name, "up"},
	} {
		if err := ipIn(ctx, netns, args...); err != nil {
			return err
		}
	}
	return nil
}

// uplink is the interface by which a network namespace reaches this machine.
const uplink = "uplink"

// joinNamespace makes the bridge of a node in its network namespace, and a pair of interfaces
// between there and here. Neither end has an address of its own: here network is routed to the
// bridge, there everything else to host, an address of this machine. The namespace takes all of it
// along when it goes.
func joinNamespace(ctx context.Context, netns, name string, network netip.Prefix, host netip.Addr) error {
	gateway := network.Addr().Next()
	if err := addBridge(ctx, netns, name, network, gateway); err != nil {
		return err
	}
	for _, step := range []struct {
		netns string
		args  []string
	}{
		{netns, []string{"link", "set", "lo", "up"}},
		{netns, []string{"link", "add", uplink, "type", "veth", "peer", "name", name, "netns",
			strconv.Itoa(os.Getpid())}},
		{netns, []string{"link", "set", uplink, "up"}},
		{netns, []string{"route", "add", "default", "via", host.String(), "dev", uplink, "src",
			gateway.String(), "onlink"}},
		{"", []string{"link", "set", name, "up"}},
		{"", []string{"route", "add", network.String(), "via", gateway.String(), "dev", name, "src",
			host.String(), "onlink"}},
	} {
		if err := ipIn(ctx, step.netns, step.args...); err != nil {
			return err
		}
	}
	return nil
}

// deleteBridge removes a bridge and the host ends of the pods' veth pairs on it. A bridge that is
// gone is fine.
func deleteBridge(ctx context.Context, name string) error {
	if _, err := net.InterfaceByName(name); err != nil {
		return nil
	}
	out, err := exec.CommandContext(ctx, "ip", "-o", "link", "show", "master", name).Output()
	if err != nil {
		return goneOr(name, fmt.Errorf("list the ports of bridge %s: %w", name, err))
	}
	for line := range strings.Lines(string(out)) {
		// "7: veth1a2b@if2: <BROADCAST ..."
		if f := strings.Fields(line); len(f) > 1 {
			port, _, _ := strings.Cut(strings.TrimSuffix(f[1], ":"), "@")
			_ = ip(ctx, "link", "del", port) // it goes by itself with the pod's network namespace
		}
	}
	return goneOr(name, ip(ctx, "link", "del", name))
}

// goneOr returns err unless the interface has gone: that to a network namespace goes by itself some
// time after it.
func goneOr(name string, err error) error {
	if err == nil {
		return nil
	}
	if _, gone := net.InterfaceByName(name); gone != nil {
		return nil
	}
	return err
}

func ip(ctx context.Context, args ...string) error { return ipIn(ctx, "", args...) }

// ipIn runs ip in a network namespace, which is a file; empty is this machine's.
func ipIn(ctx context.Context, netns string, args ...string) error {
	cmd := exec.CommandContext(ctx, "ip", args...)
	if netns != "" {
		cmd = exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + netns, "ip"}, args...)...)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
