// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"
	"debug/buildinfo"
	"fmt"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"

	opsprocess "github.com/cri-proxy/cri-proxy/ops/process"
	"github.com/cri-proxy/cri-proxy/systemd/node/kubelet"
)

// criModule is the Go module of the CRI. Its version v0.37.2 is that of Kubernetes 1.37.2.
const criModule = "k8s.io/cri-api"

// versions compares the CRI of kubelet and of the runtime with the one that this version knows.
// What is newer goes through, but cannot be changed while a container is hidden.
func (x *examination) versions(ctx context.Context) {
	const check = "cri"
	const hint = "upgrade cri-proxy; what it does not know goes through as it is, and lists, statistics and events " +
		"of a new kind wait while a container is replaced"
	before := len(x.findings)
	if names := x.info.GetUnknownMethods(); len(names) > 0 {
		x.warn(check, hint, "kubelet, or somebody else, calls what this cri-proxy does not know: %s",
			strings.Join(names, ", "))
	}
	own, known := minor(x.o.CRI)
	if !known {
		return // a build without module versions
	}
	var others []string
	say := func(who, version string) {
		of, ok := minor(version)
		switch {
		case !ok: // not one of a release
		case of > own:
			x.warn(check, hint, "%s %s: newer than the CRI of Kubernetes 1.%d, which is what this cri-proxy knows",
				who, version, own)
		default:
			others = append(others, who+" "+version)
		}
	}
	for _, p := range kubelets(x.o.Proc) {
		if endpoint, _, err := x.endpoint(p); err != nil || !x.ours(endpoint) {
			continue
		}
		if v, err := (&kubelet.Kubelet{PID: p.pid}).Version(ctx); err == nil {
			say(p.String(), v)
		}
	}
	if p, err := opsprocess.Listener(ctx, "/proc", x.runtimeSocket); err == nil {
		if v := linkedBy(filepath.Join(x.o.Proc, strconv.Itoa(p.PID), "exe")); v != "" {
			say(fmt.Sprintf("the runtime (pid %d) with %s", p.PID, criModule), v)
		}
	}
	if len(x.findings) == before {
		x.ok(check, "%s", strings.Join(append(others, fmt.Sprintf("cri-proxy that of Kubernetes 1.%d", own)), ", "))
	}
}

// ours reports whether an endpoint is one of this proxy's, or the runtime's.
func (x *examination) ours(endpoint string) bool {
	socket := strings.TrimPrefix(endpoint, "unix://")
	return same(socket, x.link) || same(socket, x.config.Listen.Path) || same(socket, x.runtimeSocket)
}

// minor returns the Kubernetes minor version of v1.37.2 and v0.37.2.
func minor(version string) (int, bool) {
	parts := strings.SplitN(strings.TrimPrefix(version, "v"), ".", 3)
	if len(parts) < 3 || parts[0] != "1" && parts[0] != "0" {
		return 0, false
	}
	n, err := strconv.Atoi(strings.TrimRight(parts[1], "+"))
	return n, err == nil && n > 0 // v0.0.0 is a module that was replaced by a directory
}

// linkedCRI is the version of the CRI in this binary, or "".
func linkedCRI() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	return criOf(info)
}

// linkedBy is the version of the CRI in a Go program, or "".
func linkedBy(program string) string {
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		return "" // not a Go program
	}
	return criOf(info)
}

func criOf(info *debug.BuildInfo) string {
	for _, m := range info.Deps {
		if m.Path != criModule {
			continue
		}
		if m.Replace != nil {
			m = m.Replace
		}
		return m.Version
	}
	return ""
}
