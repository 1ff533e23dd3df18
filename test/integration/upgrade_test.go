// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"hash/fnv"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// withSpec makes a request what kubelet makes of a pod spec: image by ID, and the hash of name and
// image (pkg/kubelet/container/helpers.go HashContainer).
func (p *pod) withSpec(t testing.TB, s spec, attempt int) *runtimeapi.CreateContainerRequest {
	t.Helper()
	if s.image == "" {
		s.image = bed.busybox
	}
	req := p.request(t, s, attempt)
	st, err := p.k.images.ImageStatus(t.Context(),
		&runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: s.image}})
	must(t, err)
	req.Config.Image.Image = st.GetImage().GetId()
	words := []string{}
	for _, b := range []byte(fmt.Sprintf(`{"image":%q,"name":%q}`, s.image, s.name)) {
		words = append(words, strconv.Itoa(int(b)))
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte("([]uint8)[" + strings.Join(words, " ") + "]"))
	req.Config.Annotations["io.kubernetes.container.hash"] = strconv.FormatUint(uint64(h.Sum32()), 16)
	return req
}

// runSpec is run for a request as kubelet makes it.
func (p *pod) runSpec(t testing.TB, s spec) string {
	t.Helper()
	resp, err := p.k.CreateContainer(t.Context(), p.withSpec(t, s, 0))
	must(t, err)
	_, err = p.k.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: resp.GetContainerId()})
	must(t, err)
	p.began(t, s.name, 0)
	return resp.GetContainerId()
}

// versioned says which image it is of when it starts and when it is asked to stop.
var versioned = []string{"sh", "-c",
	`trap 'echo asked $VERSION; exit 7' TERM; echo started $VERSION $SETTING; while :; do sleep 0.05; done`}

// toVersion2 prepares app for the second image, and waits.
func (n *node) toVersion2(t testing.TB, p *pod, change func(*opsv1.ContainerUpgrade)) string {
	t.Helper()
	uid := n.prepare(t, p, change)
	n.waitFor(t, uid, func(op *opsv1.Operation) bool { return op.GetPhase() == opsv1.Phase_PHASE_PREPARED })
	return uid
}

// prepare begins an upgrade of app to the second image.
func (n *node) prepare(t testing.TB, p *pod, change func(*opsv1.ContainerUpgrade)) string {
	t.Helper()
	req := upgradeOf(p, fmt.Sprintf("up-%d", operationNumber.Add(1)), change)
	_, err := n.ops.PrepareUpgrade(t.Context(), req)
	must(t, err)
	return req.GetUid()
}

func upgradeOf(p *pod, uid string, change func(*opsv1.ContainerUpgrade)) *opsv1.PrepareUpgradeRequest {
	c := &opsv1.ContainerUpgrade{Name: "app", Image: bed.busybox2}
	if change != nil {
		change(c)
	}
	return &opsv1.PrepareUpgradeRequest{
		Uid: uid, Pod: &opsv1.PodRef{Namespace: "default", Name: p.name, Uid: p.uid},
		Containers: []*opsv1.ContainerUpgrade{c}, Requester: "test",
	}
}

// arm commits a prepared upgrade and waits until kubelet may come.
func (n *node) arm(t testing.TB, uid string) {
	t.Helper()
	must(t, testbed.CommitUpgrade(t.Context(), n.ops, uid))
	n.waitFor(t, uid, func(op *opsv1.Operation) bool { return op.GetPhase() == opsv1.Phase_PHASE_ARMED })
}

// replace is what kubelet does when the spec has changed. Like kubelet, it begins again after an
// error, from what it then finds.
func (p *pod) replace(t testing.TB, old string, s spec) string {
	t.Helper()
	ctx := t.Context()
	created := ""
	eventually(t, "kubelet has replaced the container", func() bool {
		p.relisting.Lock()
		list, err := p.k.ListContainers(ctx,
			&runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{LabelSelector: map[string]string{
				"io.kubernetes.pod.uid": p.uid, "io.kubernetes.container.name": s.name,
			}}})
		p.relisting.Unlock()
		if err != nil || len(list.GetContainers()) == 0 {
			return false
		}
		newest := list.GetContainers()[0]
		for _, c := range list.GetContainers() {
			if c.GetCreatedAt() > newest.GetCreatedAt() {
				newest = c
			}
		}
		attempt := int(newest.GetMetadata().GetAttempt()) + 1
		if newest.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
			if newest.GetId() != old {
				created = newest.GetId()
				return true // found running, with the hash of the spec
			}
			if _, err := p.k.StopContainer(ctx, stopRequest(old, 5)); err != nil {
				return false
			}
		}
		resp, err := p.k.CreateContainer(ctx, p.withSpec(t, s, attempt))
		if err != nil {
			t.Logf("create: %v", err)
			return false
		}
		created = resp.GetContainerId()
		_, err = p.k.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: created})
		if err != nil {
			t.Logf("start: %v", err)
		}
		return err == nil
	})
	return created
}

var version2 = func() spec { return spec{name: "app", image: bed.busybox2, command: versioned} }

func TestUpgrade(t *testing.T) {
	for name, change := range map[string]func(*opsv1.ContainerUpgrade){
		"stop first": nil,
		"start first": func(c *opsv1.ContainerUpgrade) {
			c.Order, c.MinReadySeconds = opsv1.Order_ORDER_START_FIRST, 1
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := startNode(t)
			p := n.runPod(t)
			app := p.runSpec(t, spec{name: "app", command: versioned})
			side := p.run(t, spec{name: "side", command: looping})
			before := n.status(t, side)
			uid := n.toVersion2(t, p, change)
			for _, k := range []*kubelet{n.kubelet, n.direct} {
				if running, all := p.running(t, k, "app"); running != 1 || k == n.kubelet && all != 1 ||
					k == n.direct && all != 2 {
					t.Errorf("prepared: %d running of %d", running, all)
				}
			}
			n.arm(t, uid)
			if running, all := p.running(t, n.kubelet, "app"); running != 1 || all != 1 {
				t.Errorf("armed: %d running of %d", running, all)
			}
			if st := n.status(t, app); st.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
				t.Errorf("armed: %v", st)
			}
			seen := p.watch("app")
			created := p.replace(t, app, version2())
			if bad := seen.stop(); len(bad) > 0 {
				t.Errorf("what kubelet must not see:\n%s", strings.Join(bad, "\n"))
			}
			op := n.wait(t, uid)
			c := op.GetContainers()[0]
			if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED || op.GetKind() != "Upgrade" ||
				c.GetSuccessorId() != created || len(c.GetWarnings()) > 0 {
				t.Errorf("operation: %v; kubelet has %s", op, created)
			}
			if running, all := p.running(t, n.direct, "app"); running != 1 || all != 2 {
				t.Errorf("%d running of %d", running, all)
			}
			p.look(t, n.kubelet)
			st := n.status(t, created)
			if st.GetImage().GetImage() != bed.busybox2 || st.GetMetadata().GetAttempt() != 1 ||
				st.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
				t.Errorf("new container: %v", st)
			}
			if old := n.status(t, app); old.GetExitCode() != 7 {
				t.Errorf("old container: %v", old)
			}
			p.began(t, "app", 1)
			if got := strings.TrimSpace(started(p.log(t, "app", 1))); got != "2.0" {
				t.Errorf("the new container is of version %q", got)
			}
			if got := n.status(t, side); got.GetId() != before.GetId() || got.GetState() != before.GetState() {
				t.Errorf("neighbour: %v", got)
			}
			t.Logf("gap %s by %s", c.GetGap().AsDuration(), c.GetMethod())
		})
	}
}

// TestUpgradeWithOtherSettings upgrades a pod of which something else has changed meanwhile, a
// ConfigMap for example: kubelet gets the container that it asks for.
func TestUpgradeWithOtherSettings(t *testing.T) {
	n := startNode(t)
	p := n.runPod(t)
	app := p.runSpec(t, spec{name: "app", command: versioned, env: map[string][]byte{"SETTING": []byte("old")}})
	uid := n.toVersion2(t, p, nil)
	n.arm(t, uid)
	s := version2()
	s.env = map[string][]byte{"SETTING": []byte("new")}
	created := p.replace(t, app, s)
	op := n.wait(t, uid)
	c := op.GetContainers()[0]
	if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED || c.GetMethod() != "kubelet" ||
		!strings.Contains(strings.Join(c.GetWarnings(), " "), "envs.SETTING") {
		t.Errorf("operation: %v", op)
	}
	if running, all := p.running(t, n.direct, "app"); running != 1 || all != 2 {
		t.Errorf("%d running of %d", running, all)
	}
	eventually(t, "kubelet's own container has the new setting",
		func() bool { return started(p.log(t, "app", 1)) == "2.0 new" })
	if st := n.status(t, created); st.GetMetadata().GetAttempt() != 1 {
		t.Errorf("kubelet's container: %v", st)
	}
}

// TestUpgradeTakenBack has kubelet stop the container for other reasons, or not at all, at each
// state of an upgrade.
func TestUpgradeTakenBack(t *testing.T) {
	n := startNode(t)
	// start prepares an upgrade and arms it if asked to.
	start := func(t *testing.T, armed bool) (*pod, string, string) {
		p := n.runPod(t)
		app := p.runSpec(t, spec{name: "app", command: versioned})
		uid := n.toVersion2(t, p, nil)
		if armed {
			n.arm(t, uid)
		}
		return p, app, uid
	}
	failed := func(t *testing.T, p *pod, uid, reason string, all int) {
		t.Helper()
		op := n.wait(t, uid)
		if op.GetPhase() == opsv1.Phase_PHASE_SUCCEEDED || op.GetContainers()[0].GetReason() != reason {
			t.Errorf("operation: %v, want %s", op, reason)
		}
		if _, left := p.running(t, n.direct, "app"); left != all {
			t.Errorf("%d containers are left, not %d", left, all)
		}
	}
	for _, armed := range []bool{false, true} {
		name := map[bool]string{false: "prepared", true: "armed"}[armed]
		t.Run(name+", aborted", func(t *testing.T) {
			p, app, uid := start(t, armed)
			_, err := n.ops.AbortUpgrade(t.Context(), &opsv1.AbortUpgradeRequest{Uid: uid, Reason: "changed my mind"})
			must(t, err)
			failed(t, p, uid, "Cancelled", 1)
			if st := n.status(t, app); st.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
				t.Errorf("old container: %v", st)
			}
		})
		t.Run(name+", the sandbox is stopped", func(t *testing.T) {
			p, _, uid := start(t, armed)
			_, err := n.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.sandbox})
			must(t, err)
			failed(t, p, uid, "TakenBackByKubelet", 1)
		})
		t.Run(name+", the container ends and kubelet makes it anew", func(t *testing.T) {
			p, app, uid := start(t, armed)
			_, err := n.direct.StopContainer(t.Context(), stopRequest(app, 2)) // the proxy does not know why
			must(t, err)
			p.replace(t, app, spec{name: "app", command: versioned})
			failed(t, p, uid, "TakenBackByKubelet", 2)
			eventually(t, "the old version runs",
				func() bool { return strings.TrimSpace(started(p.log(t, "app", 1))) == "1.0" })
		})
	}
	t.Run("prepared, stopped", func(t *testing.T) {
		p, app, uid := start(t, false)
		_, err := n.StopContainer(t.Context(), stopRequest(app, 5))
		must(t, err)
		failed(t, p, uid, "TakenBackByKubelet", 1)
	})
	t.Run("armed, the container ends and kubelet has the new spec", func(t *testing.T) {
		p, app, uid := start(t, true)
		_, err := n.direct.StopContainer(t.Context(), stopRequest(app, 2))
		must(t, err)
		created := p.replace(t, app, version2())
		if op := n.wait(t, uid); op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED ||
			op.GetContainers()[0].GetSuccessorId() != created {
			t.Errorf("operation: %v, kubelet has %s", op, created)
		}
	})
	t.Run("armed, liveness", func(t *testing.T) { // kubelet has not seen the new spec
		p, app, uid := start(t, true)
		created := p.replace(t, app, spec{name: "app", command: versioned})
		failed(t, p, uid, "TakenBackByKubelet", 2)
		eventually(t, "the old version runs",
			func() bool { return strings.TrimSpace(started(p.log(t, "app", 1))) == "1.0" })
		if running, _ := p.running(t, n.direct, "app"); running != 1 {
			t.Errorf("%d running", running)
		}
		if st := n.status(t, created); st.GetImage().GetImage() != bed.busybox {
			t.Errorf("kubelet's container: %v", st)
		}
	})
	t.Run("armed, deleted", func(t *testing.T) {
		p, app, uid := start(t, true)
		_, err := n.StopContainer(t.Context(), stopRequest(app, 5))
		must(t, err)
		p.began(t, "app", 1)
		_, err = n.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.sandbox})
		must(t, err)
		failed(t, p, uid, "TakenBackByKubelet", 2)
		p.logs(t, "app", 1, "asked 2.0") // it was not killed without being asked
		if running, _ := p.running(t, n.direct, "app"); running != 0 {
			t.Errorf("%d running", running)
		}
	})
	t.Run("armed, nobody comes", func(t *testing.T) {
		p := n.runPod(t)
		p.runSpec(t, spec{name: "app", command: versioned})
		req := upgradeOf(p, "nobody-comes", nil)
		req.HoldTimeout = durationpb.New(2 * time.Second)
		_, err := n.ops.PrepareUpgrade(t.Context(), req)
		must(t, err)
		n.waitFor(t, req.GetUid(),
			func(op *opsv1.Operation) bool { return op.GetPhase() == opsv1.Phase_PHASE_PREPARED })
		_, err = n.ops.CommitUpgrade(t.Context(), &opsv1.CommitUpgradeRequest{Uid: req.GetUid()})
		must(t, err)
		failed(t, p, req.GetUid(), "HoldTimeout", 1)
		if op := n.wait(t, req.GetUid()); !strings.Contains(op.GetContainers()[0].GetMessage(),
			"was the pod's spec patched") {
			t.Errorf("it was not armed: %v", op)
		}
	})
}

// TestUpgradeRefused asks for upgrades that cannot work: nothing that runs is touched.
func TestUpgradeRefused(t *testing.T) {
	n := startNode(t)
	p := n.runPod(t)
	app := p.runSpec(t, spec{name: "app", command: versioned})
	for _, tc := range []struct {
		name, reason, text string
		change             func(*opsv1.ContainerUpgrade)
	}{
		{"no such image", "PullFailed", "NotFound", func(c *opsv1.ContainerUpgrade) { c.Image = bed.missing }},
		{"no reference", "PullFailed", "invalid reference",
			func(c *opsv1.ContainerUpgrade) { c.Image = "UPPER/case:" }},
		{"the same image", "ImageUnchanged", "restart it instead",
			func(c *opsv1.ContainerUpgrade) { c.Image = bed.busybox }},
		{"would run as root", "ImageUnfit", "root", func(c *opsv1.ContainerUpgrade) { c.RunAsNonRoot = true }},
		{"another container", "ExpectedIDDiffers", "",
			func(c *opsv1.ContainerUpgrade) { c.ExpectedContainerId = "containerd://other" }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			req := upgradeOf(p, "refused-"+strings.ReplaceAll(tc.name, " ", "-"), tc.change)
			op, err := n.ops.PrepareUpgrade(t.Context(), req)
			if err != nil {
				if code := status.Code(err); code != codes.FailedPrecondition && code != codes.InvalidArgument ||
					!strings.Contains(err.Error(), tc.text) {
					t.Errorf("refused with %v", err)
				}
				return
			}
			op = n.wait(t, op.GetUid())
			if c := op.GetContainers()[0]; op.GetPhase() != opsv1.Phase_PHASE_FAILED || c.GetReason() != tc.reason ||
				!strings.Contains(c.GetMessage(), tc.text) {
				t.Errorf("operation: %v", op)
			}
			if _, err := n.ops.CommitUpgrade(t.Context(), &opsv1.CommitUpgradeRequest{Uid: op.GetUid()}); status.Code(
				err) != codes.FailedPrecondition {
				t.Errorf("commit: %v", err)
			}
			t.Log(op.GetMessage())
		})
	}
	t.Run("it cannot start", func(t *testing.T) { // /app is not in the new image
		p := n.runPod(t)
		created, err := n.CreateContainer(t.Context(),
			p.withSpec(t, spec{name: "app", image: bed.app, command: []string{"/app"}}, 0))
		must(t, err)
		app := created.GetContainerId()
		_, err = n.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: app})
		must(t, err)
		req := upgradeOf(p, "cannot-start", nil)
		_, err = n.ops.PrepareUpgrade(t.Context(), req)
		must(t, err)
		n.waitFor(t, req.GetUid(),
			func(op *opsv1.Operation) bool { return op.GetPhase() == opsv1.Phase_PHASE_PREPARED })
		_, err = n.ops.CommitUpgrade(t.Context(), &opsv1.CommitUpgradeRequest{Uid: req.GetUid()})
		must(t, err)
		op := n.wait(t, req.GetUid())
		if c := op.GetContainers()[0]; op.GetPhase() != opsv1.Phase_PHASE_FAILED || c.GetReason() != "StartFailed" {
			t.Errorf("operation: %v", op)
		}
		if running, all := p.running(t, n.direct, "app"); running != 1 || all != 1 {
			t.Errorf("%d running of %d", running, all)
		}
		if st := n.status(t, app); st.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
			t.Errorf("old container: %v", st)
		}
	})
	t.Run("a kubelet whose hash is another", func(t *testing.T) {
		p := n.runPod(t)
		p.run(t, spec{name: "app", command: looping})
		uid := n.toVersion2(t, p, nil)
		_, err := n.ops.CommitUpgrade(t.Context(), &opsv1.CommitUpgradeRequest{Uid: uid})
		must(t, err)
		op := n.wait(t, uid)
		if c := op.GetContainers()[0]; op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED || c.GetMethod() != "kubelet" ||
			len(c.GetWarnings()) == 0 {
			t.Errorf("operation: %v", op)
		}
	})
	if running, all := p.running(t, n.direct, "app"); running != 1 || all != 1 {
		t.Errorf("%d running of %d", running, all)
	}
	if st := n.status(t, app); st.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("old container: %v", st)
	}
}

// TestUpgradeKillAtEachStep kills cri-proxy at every step of an upgrade, and has kubelet go on with
// the next process.
func TestUpgradeKillAtEachStep(t *testing.T) {
	early := []string{"stage", "created", "held", "arm", "gated", "armed"}
	for _, point := range append(early, "stop", "stopped", "running", "started", "reveal", "revealed", "adopt", "done",
		"ask", "asking") {
		t.Run(point, func(t *testing.T) {
			n := startProcess(t, "upgrade."+point)
			p := n.runPod(t)
			app := p.runSpec(t, spec{name: "app", command: versioned})
			uid := "kill-" + point
			prepared := func(op *opsv1.Operation) bool { return op.GetPhase() == opsv1.Phase_PHASE_PREPARED }
			next := func() { // what the controller does next, whatever has become of the call before
				_, _ = n.ops.PrepareUpgrade(t.Context(), upgradeOf(p, uid, nil))
			}
			isEarly := false
			for _, e := range early {
				isEarly = isEarly || e == point
			}
			next()
			switch point {
			case "stage", "created", "held":
				n.died(t)
				n.start(t, "")
				n.waitFor(t, uid, prepared)
				n.arm(t, uid)
			case "arm", "gated", "armed":
				n.waitFor(t, uid, prepared)
				_ = testbed.CommitUpgrade(t.Context(), n.ops, uid)
				n.died(t)
				n.start(t, "")
				n.waitFor(t, uid, func(op *opsv1.Operation) bool { return op.GetPhase() == opsv1.Phase_PHASE_ARMED })
			default:
				n.waitFor(t, uid, prepared)
				if point == "ask" || point == "asking" { // nobody says what kubelet will ask for
					_, err := n.ops.CommitUpgrade(t.Context(), &opsv1.CommitUpgradeRequest{Uid: uid})
					must(t, err)
					n.waitFor(t, uid,
						func(op *opsv1.Operation) bool { return op.GetPhase() == opsv1.Phase_PHASE_ARMED })
				} else {
					n.arm(t, uid)
				}
				if point == "adopt" || point == "done" {
					_, err := n.StopContainer(t.Context(), stopRequest(app, 5))
					must(t, err)
					_, _ = n.CreateContainer(t.Context(), p.withSpec(t, version2(), 1))
				} else {
					_, _ = n.StopContainer(t.Context(), stopRequest(app, 5))
				}
				n.died(t)
				n.start(t, "")
			}
			seen := p.watch("app")
			created := p.replace(t, app, version2())
			if bad := seen.stop(); len(bad) > 0 {
				t.Errorf("what kubelet must not see:\n%s", strings.Join(bad, "\n"))
			}
			if running, all := p.running(t, n.direct, "app"); running != 1 || all != 2 {
				t.Errorf("%d running of %d", running, all)
			}
			st := n.status(t, created)
			if st.GetImage().GetImage() != bed.busybox2 || st.GetMetadata().GetAttempt() != 1 {
				t.Errorf("new container: %v", st)
			}
			p.logs(t, "app", 0, "asked")
			p.began(t, "app", 1)
			if strings.Count(p.log(t, "app", 0), "asked") != 1 || strings.Count(p.log(t, "app", 1), "started") != 1 {
				t.Errorf("old: %s\nnew: %s", p.log(t, "app", 0), p.log(t, "app", 1))
			}
			op, err := n.ops.GetOperation(t.Context(), &opsv1.GetOperationRequest{Uid: uid})
			must(t, err)
			// Where kubelet has found the successor by itself, the operation waits for its call a
			// little longer.
			if ph := op.GetPhase(); ph != opsv1.Phase_PHASE_SUCCEEDED && ph != opsv1.Phase_PHASE_ADOPTING ||
				op.GetContainers()[0].GetSuccessorId() != created {
				t.Errorf("operation: %v; kubelet has %s", op, created)
			}
		})
	}
}
