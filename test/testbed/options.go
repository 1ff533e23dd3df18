// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"errors"
	"fmt"
	"io"
	"strings"
)

// Mode says how much of a cluster a bed runs.
type Mode int

const (
	// ModeNode is an image registry, containerd and (unless Direct) cri-proxy: enough for a CRI
	// client.
	ModeNode Mode = iota
	// ModeCluster is ModeNode plus etcd, the control plane and one kubelet per node.
	ModeCluster
)

// String returns the mode as the command line spells it.
func (m Mode) String() string {
	if m == ModeCluster {
		return "cluster"
	}
	return "node"
}

// ParseMode is the inverse of [Mode.String].
func ParseMode(s string) (Mode, error) {
	switch s {
	case "node":
		return ModeNode, nil
	case "cluster":
		return ModeCluster, nil
	}
	return 0, fmt.Errorf("mode %q is neither node nor cluster", s)
}

// maxNodes keeps one bed from taking all subnets.
const maxNodes = 8

// Options of [Start]. The zero value is a one-node bed in ModeNode behind cri-proxy.
type Options struct {
	// Mode defaults to ModeNode.
	Mode Mode
	// Nodes is the number of nodes, 1 when 0, at most 8. All share this machine; each has its own
	// containerd, proxy, kubelet and bridge.
	Nodes int
	// Later is how many of them, the last ones, are prepared and not started: they join with
	// [Node.Join].
	Later int
	// Namespaces gives every node but the first a network namespace of its own, which a pair of
	// interfaces and routes join to this machine. The first has the registry and the control plane
	// beside it.
	Namespaces bool
	// Direct makes kubelet dial containerd itself and starts no proxy.
	Direct bool

	// Dir holds everything of this bed; it is removed on Close. Empty means runs/<id> in the cache
	// (see [CacheDir]).
	Dir string
	// Source is the checkout that cri-proxy and cri-controller are built from. Empty: the module
	// around the working directory.
	Source string
	// Race builds them with the race detector.
	Race bool
	// Log takes one readable line per step. Nil discards them.
	Log io.Writer
	// KeepLogs, asked when the bed closes, keeps the log directory (and says where it is) when it
	// returns true. t.Failed fits.
	KeepLogs func() bool
	// Detach lets the processes outlive this one: nothing is swept until somebody calls [Destroy].
	Detach bool

	// Containerd17 runs containerd 1.7 of test/components/containerd17, with its shim, in place of
	// the pinned one. Its shims' sockets are in this machine's /run/containerd/s, an empty
	// directory afterwards: it has no setting for that.
	Containerd17 bool
	// ContainerdEnv (NAME=value) is added to the environment of containerd alone, as its systemd
	// unit would.
	ContainerdEnv []string
	// ContainerdConfig returns the whole of containerd's configuration. Nil is [ContainerdV3], or
	// [ContainerdV2] for Containerd17; a test's own will call one of them and append to it.
	ContainerdConfig func(ContainerdPaths) string
	// ContainerdExtra is TOML, in the version of that configuration and without saying so, that
	// containerd merges over it. containerd 1.7 takes a plugin's whole table from it: what is to be
	// added to the CRI plugin's is appended by ContainerdConfig.
	ContainerdExtra string
	// KubeletExtra is YAML; its top-level keys replace those of the bed's KubeletConfiguration.
	KubeletExtra string
	// KubeletArgs, APIServerArgs and ControllerManagerArgs are appended to the command lines.
	KubeletArgs, APIServerArgs, ControllerManagerArgs []string
	// ProxyExtra is YAML; its top-level keys replace those of the bed's cri-proxy configuration.
	ProxyExtra string
	// ProxyArgs are appended to `cri-proxy serve --config FILE`.
	ProxyArgs []string
	// ProxyBinary and ControllerBinary, when set, are used instead of building them.
	ProxyBinary, ControllerBinary string
	// ComponentBin, by component name (kubelet, containerd, runc ...), replaces a pinned component
	// by another binary.
	ComponentBin map[string]string
}

func (o *Options) complete() error {
	if o.Nodes == 0 {
		o.Nodes = 1
	}
	if o.Log == nil {
		o.Log = io.Discard
	}
	var errs []error
	if o.Nodes < 1 || o.Nodes > maxNodes {
		errs = append(errs, fmt.Errorf("%d nodes asked for, 1 to %d are possible", o.Nodes, maxNodes))
	}
	if o.Later < 0 || o.Later >= o.Nodes {
		errs = append(errs, fmt.Errorf("%d of %d nodes are to join later: the first cannot", o.Later, o.Nodes))
	}
	if o.Direct && (o.ProxyExtra != "" || len(o.ProxyArgs) > 0 || o.ProxyBinary != "") {
		errs = append(errs,
			errors.New("a direct bed has no proxy, so the Proxy options have no effect: leave them out"))
	}
	if o.Containerd17 && strings.Contains(o.ContainerdExtra, `"io.containerd.grpc.v1.cri"`) {
		errs = append(errs,
			errors.New("option ContainerdExtra: containerd 1.7 would lose the rest of the CRI plugin's table: append "+
				"to ContainerdV2 in ContainerdConfig"))
	}
	for _, e := range o.ContainerdEnv {
		if name, _, ok := strings.Cut(e, "="); !ok || name == "" {
			errs = append(errs, fmt.Errorf("option ContainerdEnv: %q is not NAME=value", e))
		}
	}
	return errors.Join(errs...)
}
