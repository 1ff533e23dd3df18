// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/systemd/node/kubelet"
)

// quietKubelet is how long kubelet may be silent before something is wrong: it lists containers
// every second with the generic PLEG, and every 5 minutes with the evented one.
const quietKubelet = 6 * time.Minute

// kubelets returns the processes that are a kubelet.
func kubelets(proc string) []process {
	return processes(proc, func(dir string) bool { return comm(dir) == "kubelet" })
}

// settings returns what a kubelet process was told.
func (x *examination) settings(p process) *kubelet.Kubelet {
	k := &kubelet.Kubelet{PID: p.pid, Args: p.args[min(1, len(p.args)):]}
	k.Dir, _ = os.Readlink(filepath.Join(x.o.Proc, strconv.Itoa(p.pid), "cwd")) // for relative paths only
	return k
}

// endpoint returns the runtime endpoint that a kubelet is told, and whether images are there too.
func (x *examination) endpoint(p process) (endpoint string, images bool, err error) {
	k := x.settings(p)
	if endpoint, err = k.Endpoint(); err != nil {
		return "", false, err
	}
	_, images, err = k.Dials(endpoint)
	return endpoint, images, err
}

// kubelet checks what kubelet dials, and what it is told to dial.
func (x *examination) kubelet() {
	const check = "kubelet"
	toProxy, err := peersOf(x.o.Proc, x.config.Listen.Path)
	if err != nil && x.exists(x.config.Listen.Path) {
		x.warn(check, "run this as root, in the host's namespaces", "who is connected to %s cannot be "+
			"found out: %v", x.config.Listen.Path, err)
	}
	toRuntime, _ := peersOf(x.o.Proc, x.runtimeSocket) // its absence is the runtime's finding
	isKubelet := func(p process) bool { return p.name == "kubelet" }
	through, past := slices.IndexFunc(toProxy, isKubelet), slices.IndexFunc(toRuntime, isKubelet)

	told := 0
	for _, k := range kubelets(x.o.Proc) {
		endpoint, images, err := x.endpoint(k)
		if err != nil {
			// it still runs
			if args, readErr := os.ReadFile(filepath.Join(x.o.Proc, strconv.Itoa(k.pid), "cmdline")); readErr == nil &&
				len(args) > 0 {
				x.warn(check, "", "%s: %v", k, err)
			}
			continue
		}
		if x.toldWhere(check, k, endpoint, images, through >= 0 && toProxy[through].pid == k.pid ||
			past >= 0 && toRuntime[past].pid == k.pid) {
			told++
			if high, err := x.settings(k).ImageGCHighThreshold(); err == nil {
				x.high = float64(high)
			}
			x.access(k, images)
		}
	}
	x.connections(check, toProxy, toRuntime, through, past, told)
	x.lastCall(check)
}

// toldWhere checks the endpoint of a kubelet. It returns false if that kubelet has nothing to do
// with this proxy.
func (x *examination) toldWhere(check string, k process, endpoint string, images, connected bool) bool {
	socket, err := config.SocketPath(endpoint)
	if err != nil {
		x.warn(check, "", "%s: endpoint %s: %v", k, endpoint, err)
		return true
	}
	here := "point it at unix://" + x.link + " (cri-proxy install does); containers run on"
	switch {
	case same(socket, x.link):
		x.ok(check, "%s is told to dial %s", k, socket)
	case same(socket, x.config.Listen.Path):
		x.warn(check, here, "%s is told to dial %s itself: a bypass cannot lead it elsewhere", k, socket)
	case same(socket, x.runtimeSocket):
		x.fail(check, here, "%s is told to dial the runtime, %s, past cri-proxy", k, socket)
	case connected:
		x.warn(check, "restart kubelet", "%s is told to dial %s, and is connected to something else", k, socket)
	default:
		return false
	}
	if !images {
		x.warn(check, "remove imageServiceEndpoint", "%s has another endpoint for images: "+
			"pre-pulls do not yield to its own pulls", k)
	}
	return true
}

// access says which pods may run an image that was pre-pulled with secrets. By its policy kubelet
// verifies that for images that it has pulled itself, and not for those that were there before.
func (x *examination) access(k process, images bool) {
	const check = "images"
	policy, err := x.settings(k).CredentialsVerification()
	if err != nil {
		return // said of its endpoint, from the same files
	}
	const see = "see docs/OPERATIONS.md, Private images"
	verify := x.config.Images.VerifyAccess && images
	switch {
	case policy == "NeverVerify":
		x.ok(check, "imagePullCredentialsVerificationPolicy is NeverVerify: "+
			"every pod may run every image that is on the node, private ones too")
	case policy == "AlwaysVerify":
		x.ok(check, "imagePullCredentialsVerificationPolicy is AlwaysVerify: "+
			"private images that were pre-pulled are verified too (kubelet 1.35)")
	case !images:
		x.warn(check, "remove imageServiceEndpoint, or set the policy to AlwaysVerify; "+see,
			"imagePullCredentialsVerificationPolicy is %s, and kubelet asks for images elsewhere: "+
				"those that were pre-pulled with secrets may be run by every pod", policy)
	case !verify:
		x.warn(check, "set images.verifyAccess: true, or the policy to AlwaysVerify; "+see,
			"imagePullCredentialsVerificationPolicy is %s, and images.verifyAccess is false: "+
				"images that were pre-pulled with secrets may be run by every pod", policy)
	default:
		x.ok(check, "imagePullCredentialsVerificationPolicy is %s: "+
			"images that were pre-pulled with secrets are verified when a pod first wants them", policy)
	}
}

// connections checks which sockets kubelet is connected to. Besides CRI, kubelet's cAdvisor has its
// own connection to containerd. So a connection to the runtime is a problem only if there is none
// to the proxy.
func (x *examination) connections(check string, toProxy, toRuntime []process, through, past, told int) {
	switch {
	case x.past && past >= 0 && through < 0:
		x.ok(check, "%s is connected to the runtime, as the bypass wants it", toRuntime[past])
	case x.past && through >= 0:
		x.warn(check, "it leaves with its next dial; restart kubelet to have it now", "%s is still connected to "+
			"cri-proxy, which is bypassed", toProxy[through])
	case through >= 0:
		x.ok(check, "%s is connected to cri-proxy", toProxy[through])
	case past >= 0:
		x.fail(check, "restart kubelet: it keeps the connection that it has, after a bypass for example; "+
			"containers run on",
			"%s is connected to the runtime, %s, and not to cri-proxy", toRuntime[past], x.runtimeSocket)
	case told > 0:
		x.fail(check, "see journalctl -u kubelet", "kubelet is not connected to cri-proxy")
	default:
		x.fail(check, "start kubelet, with containerRuntimeEndpoint: unix://"+x.link, "no kubelet runs here that "+
			"is to use cri-proxy")
	}
}

// lastCall says when kubelet has called last.
func (x *examination) lastCall(check string) {
	if x.info == nil || x.past {
		return
	}
	at := x.info.GetKubeletLastCall()
	up := x.o.Now().Sub(x.info.GetStartTime().AsTime())
	switch {
	case at == nil && up > quietKubelet:
		x.fail(check, "is kubelet running, and does it dial unix://"+x.link+"?", "no call from kubelet in the %s "+
			"since cri-proxy started", round(up))
	case at == nil:
		x.warn(check, "look again in a minute", "no call from kubelet yet, %s after the start of cri-proxy", round(up))
	case x.o.Now().Sub(at.AsTime()) > quietKubelet:
		x.fail(check, "see journalctl -u kubelet", "the last call from kubelet "+
			"was %s ago", round(x.o.Now().Sub(at.AsTime())))
	default:
		x.ok(check, "last call %s ago", round(x.o.Now().Sub(at.AsTime())))
	}
}
