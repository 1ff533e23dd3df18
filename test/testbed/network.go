// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
)

// The beds' networks are cut from 198.18.0.0/15, which RFC 2544 reserves for tests: no real network uses it. A node gets a /22: one
// gateway and 1021 pods, more than any benchmark here starts.
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

// inUse reports whether an interface of this machine has an address in network, which then is no longer ours to give away.
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

// addBridge creates a bridge with the gateway's address, up.
func addBridge(ctx context.Context, name string, network netip.Prefix, gateway netip.Addr) error {
	for _, args := range [][]string{
		{"link", "add", name, "type", "bridge"},
		{"addr", "add", fmt.Sprintf("%s/%d", gateway, network.Bits()), "dev", name},
		{"link", "set", name, "up"},
	} {
		if err := ip(ctx, args...); err != nil {
			return err
		}
	}
	return nil
}

// deleteBridge removes a bridge and the host ends of the pods' veth pairs on it. A bridge that is gone is fine.
func deleteBridge(ctx context.Context, name string) error {
	if _, err := net.InterfaceByName(name); err != nil {
		return nil
	}
	out, err := exec.CommandContext(ctx, "ip", "-o", "link", "show", "master", name).Output()
	if err != nil {
		return fmt.Errorf("list the ports of bridge %s: %w", name, err)
	}
	for line := range strings.Lines(string(out)) {
		// "7: veth1a2b@if2: <BROADCAST ..."
		if f := strings.Fields(line); len(f) > 1 {
			port, _, _ := strings.Cut(strings.TrimSuffix(f[1], ":"), "@")
			_ = ip(ctx, "link", "del", port) // it goes by itself with the pod's network namespace
		}
	}
	return ip(ctx, "link", "del", name)
}

func ip(ctx context.Context, args ...string) error {
	if out, err := exec.CommandContext(ctx, "ip", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
