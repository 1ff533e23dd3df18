// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/ops/prepull/runtimeconfig"
	"github.com/cri-proxy/cri-proxy/systemd/node/bypass"
)

// plain is the message of a gRPC error, without its frame.
func plain(err error) string { return status.Convert(err).Message() }

// runtime asks the runtime itself, past the proxy.
func (x *examination) runtime(ctx context.Context) {
	const check = "runtime"
	conn, err := bypass.Dial(x.runtimeSocket)
	if err != nil {
		x.fail(check, "", "%s: %v", x.runtimeSocket, err)
		return
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	rt := runtimeapi.NewRuntimeServiceClient(conn)
	v, err := rt.Version(ctx, &runtimeapi.VersionRequest{})
	if err != nil {
		x.fail(check, "start the runtime, or set "+
			"runtimeEndpoint", "%s does not answer: %s", x.runtimeSocket, plain(err))
		return
	}
	x.ok(check, "%s %s at %s", v.GetRuntimeName(), v.GetRuntimeVersion(), x.runtimeSocket)
	if st, err := rt.Status(ctx, &runtimeapi.StatusRequest{}); err == nil {
		for _, c := range st.GetStatus().GetConditions() {
			if !c.GetStatus() {
				x.warn(check, "", "%s is not so: %s %s", c.GetType(), c.GetReason(), c.GetMessage())
			}
		}
	}
	if state := x.info.GetRuntime().GetState(); x.info != nil && state != "READY" {
		x.fail(check, "does the daemon have the same runtimeEndpoint? "+x.info.GetRuntime().GetEndpoint(),
			"it answers here, but the daemon is not connected (%s)", state)
	}
	x.leftovers(ctx, rt)
	x.openKruise(ctx, rt)
	x.images(ctx, runtimeapi.NewImageServiceClient(conn))
	if v.GetRuntimeName() == "containerd" {
		x.registries(ctx, conn)
	}
}

// registries says how containerd reaches registries. Pulls with a speed limit go the same way.
func (x *examination) registries(ctx context.Context, conn grpc.ClientConnInterface) {
	const check = "registries"
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	explicit := x.config.Images.RegistryHostsDir
	s, err := runtimeconfig.New(runtimeconfig.Options{
		Socket: x.runtimeSocket, Conn: conn, Proc: x.o.Proc, Log: quiet,
	}).Look(ctx)
	if err != nil {
		x.warn(check, "run this as root, in the host's namespaces; "+
			"else see images.registryHostsDir in docs/OPERATIONS.md",
			"how containerd reaches them is not known, so speed limits may not be kept: %v", err)
		return
	}
	if s.Unknown != nil {
		x.warn(check, "run this as root, in the host's namespaces", "%s", s)
	} else {
		x.ok(check, "%s", s)
	}
	if explicit != "" && !slices.Equal(filepath.SplitList(explicit), s.Dirs) {
		x.warn(check, "leave out images.registryHostsDir, unless that is meant",
			"images.registryHostsDir is %s, where containerd goes elsewhere: "+
				"pulls with a speed limit may take another way, or have no limit", explicit)
	}
}

// leftovers looks for containers that an operation has created and not started, and that no running
// operation knows.
func (x *examination) leftovers(ctx context.Context, rt runtimeapi.RuntimeServiceClient) {
	const check = "containers"
	list, err := rt.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
		State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_CREATED},
	}})
	if err != nil {
		x.warn(check, "", "staged containers not looked for: %s", plain(err))
		return
	}
	busy := map[string]bool{}
	for _, s := range x.info.GetActiveSlots() {
		busy[s.GetPodUid()+"/"+s.GetContainer()] = true
	}
	var left []string
	for _, c := range list.GetContainers() {
		slot := c.GetLabels()["io.kubernetes.pod.uid"] + "/" + c.GetLabels()["io.kubernetes.container.name"]
		if c.GetAnnotations()[view.StagedAnnotation] != "" && !busy[slot] {
			left = append(left, fmt.Sprintf("%.13s (%s of %s/%s)", c.GetId(),
				c.GetLabels()["io.kubernetes.container.name"],
				c.GetLabels()["io.kubernetes.pod.namespace"], c.GetLabels()["io.kubernetes.pod.name"]))
		}
	}
	if len(left) == 0 {
		x.ok(check, "none is left from an operation that has ended")
		return
	}
	hint := "the daemon removes them within 15 s of its start; else crictl rm ID"
	if x.info == nil {
		hint = "start cri-proxy, which removes them or goes on with them; cri-proxy bypass on removes them too"
	}
	x.warn(check, hint, "made by an operation and not started, "+
		"though no operation is under way: %s", strings.Join(left, ", "))
}

// openKruise looks for the node daemon of OpenKruise, which handles the same requests and jobs.
func (x *examination) openKruise(ctx context.Context, rt runtimeapi.RuntimeServiceClient) {
	const check = "OpenKruise"
	list, err := rt.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{
		State: &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY},
	}})
	if err != nil {
		x.warn(check, "", "its daemon not looked for: %s", plain(err))
		return
	}
	for _, s := range list.GetItems() {
		if strings.HasPrefix(s.GetMetadata().GetName(), "kruise-daemon-") {
			x.warn(check, "docs/MIGRATION.md says how to move to cri-controller; InPlaceRollouts work beside it",
				"its daemon runs here (%s/%s): ContainerRecreateRequests and image jobs are carried out by it, "+
					"and cri-controller leaves them alone",
				s.GetMetadata().GetNamespace(), s.GetMetadata().GetName())
		}
	}
}

// images checks the file system of the images.
func (x *examination) images(ctx context.Context, images runtimeapi.ImageServiceClient) {
	const check = "images"
	info, err := images.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
	if err != nil {
		if status.Code(err) != codes.Unimplemented {
			x.warn(check, "", "the image file system is not known: %s", plain(err))
		}
		return
	}
	for _, fs := range info.GetImageFilesystems() {
		dir := fs.GetFsId().GetMountpoint()
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil || st.Blocks == 0 {
			x.warn(check, "", "%s: %v", dir, err)
			continue
		}
		used := 100 * (1 - float64(st.Bavail)/float64(st.Blocks))
		limit := float64(x.config.Images.MaxDiskPercent)
		if x.config.Images.MaxDiskPercent == config.LikeKubelet {
			limit = x.high
		}
		switch {
		case limit > 0 && used >= limit:
			x.warn(check, "make room, or raise images.maxDiskPercent; "+
				"kubelet removes images from its imageGCHighThresholdPercent on",
				"%s is %.0f %% full: pre-pulls are refused from %g %% on", dir, used, limit)
		case limit > 0 && limit < x.high:
			x.warn(check, "leave out images.maxDiskPercent, unless that is meant",
				"%s is %.0f %% full; pre-pulls are refused from %g %% on, "+
					"and kubelet makes room only from %g %% on", dir, used, limit, x.high)
		default:
			x.ok(check, "%s is %.0f %% full", dir, used)
		}
	}
}

// methods checks how containers can be restarted.
func (x *examination) methods() {
	const check = "restarts"
	if x.info == nil {
		return
	}
	var not []string
	for _, m := range x.info.GetRestartMethods() {
		switch {
		case !m.GetAvailable():
			not = append(not, fmt.Sprintf("no %s: %s", m.GetName(), m.GetReason()))
		case len(not) == 0:
			x.ok(check, "method %s", m.GetName())
			return
		default:
			x.warn(check, "enable CDI in containerd (enable_cdi, the default since 2.0), "+
				"see docs/ARCHITECTURE.md; without it a restart takes ten times as long",
				"method %s (%s)", m.GetName(), strings.Join(not, "; "))
			return
		}
	}
	x.warn(check, "it is found out once the runtime answers", "no method is known yet (%s)", strings.Join(not, "; "))
}
