// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/cri-proxy/cri-proxy/cmd/cri-proxy/config"
)

// kubeletDefault is kubelet's own default endpoint (pkg/kubelet/apis/config/v1beta1/defaults.go).
const kubeletDefault = "unix:///run/containerd/containerd.sock"

// quietKubelet is after how long without a call something is wrong: kubelet lists the containers every second, with the
// generic PLEG, and every 5 minutes with the evented one.
const quietKubelet = 6 * time.Minute

// endpoints are where a kubelet is told to find its runtime.
type endpoints struct {
	runtime, image string // image: empty if it is the same
	from           string // flag or file that says so
}

// kubelets returns the processes that are one.
func kubelets(proc string) []process {
	return processes(proc, func(dir string) bool { return comm(dir) == "kubelet" })
}

// endpointsOf finds out what a kubelet is told: flags win over the drop-in directory, that wins over the file (cmd/kubelet/app/server.go).
func endpointsOf(p process) (endpoints, error) {
	e := endpoints{runtime: kubeletDefault, from: "kubelet's default"}
	var files []string
	if file := flagOf(p.args, "config"); file != "" {
		files = append(files, file)
	}
	if dir := flagOf(p.args, "config-dir"); dir != "" {
		drops, err := filepath.Glob(filepath.Join(dir, "*.conf"))
		if err != nil {
			return e, err
		}
		slices.Sort(drops)
		files = append(files, drops...)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			return e, fmt.Errorf("kubelet's configuration: %w", err)
		}
		var c struct {
			Runtime string `yaml:"containerRuntimeEndpoint"`
			Image   string `yaml:"imageServiceEndpoint"`
		}
		if err := yaml.Unmarshal(b, &c); err != nil {
			return e, fmt.Errorf("kubelet's configuration %s: %w", file, err)
		}
		if c.Runtime != "" {
			e.runtime, e.from = c.Runtime, file
		}
		if c.Image != "" {
			e.image = c.Image
		}
	}
	if f := flagOf(p.args, "container-runtime-endpoint"); f != "" {
		e.runtime, e.from = f, "--container-runtime-endpoint"
	}
	if f := flagOf(p.args, "image-service-endpoint"); f != "" {
		e.image = f
	}
	if e.image == e.runtime {
		e.image = ""
	}
	return e, nil
}

// flagOf returns the last value of a flag.
func flagOf(args []string, name string) string {
	value := ""
	for i, a := range args {
		for _, dashes := range []string{"--", "-"} {
			if v, ok := strings.CutPrefix(a, dashes+name+"="); ok {
				value = v
			} else if a == dashes+name && i+1 < len(args) {
				value = args[i+1]
			}
		}
	}
	return value
}

// kubelet looks at what kubelet dials, and at what it is told to dial.
func (x *examination) kubelet() {
	const check = "kubelet"
	toProxy, err := peersOf(x.o.Proc, x.config.Listen.Path)
	if err != nil && x.exists(x.config.Listen.Path) {
		x.warn(check, "run this as root, in the host's namespaces", "who is connected to %s cannot be found out: %v", x.config.Listen.Path, err)
	}
	toRuntime, _ := peersOf(x.o.Proc, x.runtimeSocket) // its absence is the runtime's finding
	isKubelet := func(p process) bool { return p.name == "kubelet" }
	through, past := slices.IndexFunc(toProxy, isKubelet), slices.IndexFunc(toRuntime, isKubelet)

	told := 0
	for _, k := range kubelets(x.o.Proc) {
		e, err := endpointsOf(k)
		if err != nil {
			x.warn(check, "", "%s: %v", k, err)
			continue
		}
		if x.toldWhere(check, k, e, through >= 0 && toProxy[through].pid == k.pid || past >= 0 && toRuntime[past].pid == k.pid) {
			told++
		}
	}
	x.connections(check, toProxy, toRuntime, through, past, told)
	x.lastCall(check)
}

// toldWhere judges the endpoint of a kubelet. It returns false for one that has nothing to do with this proxy.
func (x *examination) toldWhere(check string, k process, e endpoints, connected bool) bool {
	socket, err := config.SocketPath(e.runtime)
	if err != nil {
		x.warn(check, "", "%s: endpoint %s (%s) is not understood: %v", k, e.runtime, e.from, err)
		return true
	}
	here := "point it at unix://" + x.link + " and restart kubelet; containers run on"
	switch {
	case same(socket, x.link):
		x.ok(check, "%s is told to dial %s (%s)", k, socket, e.from)
	case same(socket, x.config.Listen.Path):
		x.warn(check, here, "%s is told to dial %s itself (%s): a bypass cannot lead it elsewhere", k, socket, e.from)
	case same(socket, x.runtimeSocket):
		x.fail(check, here, "%s is told to dial the runtime, %s (%s), past cri-proxy", k, socket, e.from)
	case connected:
		x.warn(check, "restart kubelet", "%s is told to dial %s (%s), and is connected to something else", k, socket, e.from)
	default:
		return false
	}
	if e.image != "" {
		image, err := config.SocketPath(e.image)
		if err == nil && !same(image, socket) {
			x.warn(check, "remove imageServiceEndpoint", "%s has another endpoint for images, %s: pulls ahead of time do not give way to its own", k, e.image)
		}
	}
	return true
}

// connections judges who is connected to what. Beside CRI, kubelet's cAdvisor has a connection to containerd of its own: one to the runtime alone
// says something, one to both does not.
func (x *examination) connections(check string, toProxy, toRuntime []process, through, past, told int) {
	switch {
	case x.past && past >= 0 && through < 0:
		x.ok(check, "%s is connected to the runtime, as the bypass wants it", toRuntime[past])
	case x.past && through >= 0:
		x.warn(check, "it leaves with its next dial; restart kubelet to have it now", "%s is still connected to cri-proxy, which is bypassed", toProxy[through])
	case through >= 0:
		x.ok(check, "%s is connected to cri-proxy", toProxy[through])
	case past >= 0:
		x.fail(check, "restart kubelet: it keeps the connection that it has, after a bypass for example; containers run on",
			"%s is connected to the runtime, %s, and not to cri-proxy", toRuntime[past], x.runtimeSocket)
	case told > 0:
		x.fail(check, "see journalctl -u kubelet", "kubelet is not connected to cri-proxy")
	default:
		x.fail(check, "start kubelet, with containerRuntimeEndpoint: unix://"+x.link, "no kubelet runs here that is to use cri-proxy")
	}
}

// lastCall says when kubelet was last heard of.
func (x *examination) lastCall(check string) {
	if x.info == nil || x.past {
		return
	}
	at := x.info.GetKubeletLastCall()
	up := x.o.Now().Sub(x.info.GetStartTime().AsTime())
	switch {
	case at == nil && up > quietKubelet:
		x.fail(check, "is kubelet running, and does it dial unix://"+x.link+"?", "no call from kubelet in the %s since cri-proxy started", round(up))
	case at == nil:
		x.warn(check, "look again in a minute", "no call from kubelet yet, %s after the start of cri-proxy", round(up))
	case x.o.Now().Sub(at.AsTime()) > quietKubelet:
		x.fail(check, "see journalctl -u kubelet", "the last call from kubelet was %s ago", round(x.o.Now().Sub(at.AsTime())))
	default:
		x.ok(check, "last call %s ago", round(x.o.Now().Sub(at.AsTime())))
	}
}
