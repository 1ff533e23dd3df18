// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

const annotationHash = "io.kubernetes.container.hash"

// overrideWith is a restart of app with another image.
func overrideWith(image string) *opsv1.RestartRequest {
	return &opsv1.RestartRequest{Requester: "test", Containers: []*opsv1.ContainerRestart{{Name: "app", Image: image}}}
}

// revertImage is a restart of app with the image of the pod's spec.
func revertImage() *opsv1.RestartRequest {
	return &opsv1.RestartRequest{Requester: "test",
		Containers: []*opsv1.ContainerRestart{{Name: "app", RevertImage: true}}}
}

// overridden runs app with the second image in the place of the first one.
func (n *node) overridden(t testing.TB) (p *pod, id string) {
	t.Helper()
	p = n.runPod(t)
	p.runSpec(t, version1())
	op := n.restart(t, p, overrideWith(bed.busybox2))
	if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
		t.Fatalf("operation: %v", op)
	}
	return p, op.GetContainers()[0].GetSuccessorId()
}

func version1() spec { return spec{name: "app", command: versioned} }

// overrideOf returns what the node tells of the pod's app, or nil.
func (n *node) overrideOf(t testing.TB, p *pod) *opsv1.ImageOverride {
	t.Helper()
	l, err := n.ops.ListOverrides(t.Context(), &opsv1.ListOverridesRequest{})
	must(t, err)
	for _, o := range l.GetOverrides() {
		if o.GetPod().GetUid() == p.uid && o.GetContainer() == "app" {
			return o
		}
	}
	return nil
}

// has checks what runs and what is remembered: image is that of the override, or empty for none.
func (n *node) has(t testing.TB, p *pod, attempt int, version, image string) {
	t.Helper()
	eventually(t, "version "+version+" has begun", func() bool {
		b, _ := os.ReadFile(p.logFile("app", attempt))
		return strings.TrimSpace(started(string(b))) == version
	})
	if running, _ := p.running(t, n.direct, "app"); running != 1 {
		t.Errorf("%d containers run", running)
	}
	switch o := n.overrideOf(t, p); {
	case image == "" && o != nil:
		t.Errorf("there is an override: %v", o)
	case image != "" && (o.GetImage() != image || o.GetSpecImage() != bed.busybox ||
		!strings.HasPrefix(o.GetImageId(), "sha256:") || o.GetPod().GetName() != p.name || o.GetRequester() != "test" ||
		o.GetOperationUid() == "" || o.GetSince() == nil):
		t.Errorf("override: %v, want %s", o, image)
	}
}

// crash ends the container without the proxy, and kubelet makes the next one of the spec.
func (p *pod) crash(t testing.TB, n *node, id string, s spec) string {
	t.Helper()
	_, err := n.direct.StopContainer(t.Context(), stopRequest(id, 2))
	must(t, err)
	return p.replace(t, id, s)
}

func TestOverride(t *testing.T) {
	for name, order := range map[string]opsv1.Order{"stop first": opsv1.Order_ORDER_STOP_FIRST,
		"start first": opsv1.Order_ORDER_START_FIRST} {
		t.Run(name, func(t *testing.T) {
			n := startNode(t)
			p := n.runPod(t)
			app := p.runSpec(t, version1())
			hash := n.status(t, app).GetAnnotations()[annotationHash]
			req := overrideWith(bed.busybox2)
			req.Containers[0].Order = order
			seen := p.watch("app")
			op := n.restart(t, p, req)
			if bad := seen.stop(); len(bad) > 0 {
				t.Errorf("what kubelet must not see:\n%s", strings.Join(bad, "\n"))
			}
			c := op.GetContainers()[0]
			if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED || c.GetImage() != bed.busybox2 ||
				len(c.GetWarnings()) > 0 {
				t.Fatalf("operation: %v", op)
			}
			st := n.status(t, c.GetSuccessorId())
			if st.GetImage().GetImage() != bed.busybox2 || st.GetMetadata().GetAttempt() != 1 ||
				st.GetAnnotations()[annotationHash] != hash {
				t.Errorf("new container: %v", st)
			}
			n.has(t, p, 1, "2.0", bed.busybox2)

			// kubelet makes it anew, from the spec that it knows: after a crash, after a failed
			// probe.
			id := p.crash(t, n, c.GetSuccessorId(), version1())
			n.has(t, p, 2, "2.0", bed.busybox2)
			id = p.replace(t, id, version1())
			n.has(t, p, 3, "2.0", bed.busybox2)
			if st := n.status(t, id); st.GetImage().GetImage() != bed.busybox2 ||
				st.GetAnnotations()[annotationHash] != hash {
				t.Errorf("kubelet's container: %v", st)
			}
			// A plain restart keeps it, and so does another one on top.
			if op = n.restart(t, p, restartOf("app")); op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
				t.Fatalf("operation: %v", op)
			}
			n.has(t, p, 4, "2.0", bed.busybox2)
			op = n.restart(t, p, overrideWith(bed.app3))
			if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
				t.Fatalf("operation: %v", op)
			}
			n.has(t, p, 5, "3", bed.app3)
			id = p.crash(t, n, op.GetContainers()[0].GetSuccessorId(), version1())
			n.has(t, p, 6, "3", bed.app3)

			// The spec gets another image, and wins.
			p.replace(t, id, version2())
			n.has(t, p, 7, "2.0", "")
		})
	}
}

func TestOverrideReverted(t *testing.T) {
	n := startNode(t)
	p, id := n.overridden(t)
	op := n.restart(t, p, revertImage())
	c := op.GetContainers()[0]
	if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED || c.GetImage() != bed.busybox || c.GetIncumbentId() != id {
		t.Fatalf("operation: %v", op)
	}
	n.has(t, p, 2, "1.0", "")
	if st := n.status(t, c.GetSuccessorId()); st.GetImage().GetImage() != bed.busybox {
		t.Errorf("new container: %v", st)
	}
	p.crash(t, n, c.GetSuccessorId(), version1())
	n.has(t, p, 3, "1.0", "")

	req := revertImage()
	req.Uid, req.Pod = "revert-none", &opsv1.PodRef{Namespace: "default", Name: p.name}
	if _, err := n.ops.Restart(t.Context(), req); status.Code(err) != codes.FailedPrecondition ||
		!strings.Contains(err.Error(), "nothing to revert") {
		t.Errorf("reverted twice: %v", err)
	}

	t.Run("not running", func(t *testing.T) { // in a crash loop, which is when one wants to go back
		p, id := n.overridden(t)
		_, err := n.direct.StopContainer(t.Context(), stopRequest(id, 2))
		must(t, err)
		op := n.restart(t, p, revertImage())
		if c := op.GetContainers()[0]; op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED || c.GetSuccessorId() != "" ||
			len(c.GetWarnings()) != 1 {
			t.Errorf("operation: %v", op)
		}
		p.replace(t, id, version1())
		n.has(t, p, 2, "1.0", "")
	})
	t.Run("queued behind the override", func(t *testing.T) {
		p := n.runPod(t)
		s := version1()
		s.preStop = `{"sleep":{"seconds":2}}`
		p.runSpec(t, s)
		first := n.begin(t, p, overrideWith(bed.busybox2))
		n.waitFor(t, first, func(op *opsv1.Operation) bool { return op.GetPhase() == opsv1.Phase_PHASE_STOPPING })
		second := n.begin(t, p, revertImage())
		for _, uid := range []string{first, second} {
			if op := n.wait(t, uid); op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
				t.Errorf("operation: %v", op)
			}
		}
		n.has(t, p, 2, "1.0", "")
	})
	t.Run("the image of the spec is gone", func(t *testing.T) {
		p := n.runPod(t)
		s := version1()
		s.image = bed.app3
		p.runSpec(t, s)
		if op := n.restart(t, p, overrideWith(bed.busybox2)); op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
			t.Fatalf("operation: %v", op)
		}
		p.removeImage(t, bed.app3)
		if op := n.restart(t, p, revertImage()); op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
			t.Errorf("operation: %v", op)
		}
		n.has(t, p, 2, "3", "")
	})
}

// removeImage removes an image as kubelet's garbage collection does.
func (p *pod) removeImage(t testing.TB, image string) {
	t.Helper()
	st, err := p.k.images.ImageStatus(t.Context(),
		&runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: image}})
	must(t, err)
	_, err = p.k.images.RemoveImage(t.Context(),
		&runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: st.GetImage().GetId()}})
	must(t, err)
}

// TestOverrideImageGone has the image removed from the node: kubelet's container is made as kubelet
// asks for it.
func TestOverrideImageGone(t *testing.T) {
	n := startNode(t)
	p, id := n.overridden(t)
	p.removeImage(t, bed.busybox2)
	p.crash(t, n, id, version1())
	n.has(t, p, 2, "1.0", "")
}

// TestOverrideOfPodThatIsGone removes pods, while the proxy runs and while it does not.
func TestOverrideOfPodThatIsGone(t *testing.T) {
	dir := shortDir(t)
	n := startNodeIn(t, dir)
	first, _ := n.overridden(t)
	second, _ := n.overridden(t)
	remove := func(k *kubelet, p *pod) {
		_, err := k.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.sandbox})
		must(t, err)
		_, err = k.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.sandbox})
		must(t, err)
	}
	_, err := n.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: first.sandbox})
	must(t, err)
	if n.overrideOf(t, first) == nil {
		t.Error("forgotten although the pod is there")
	}
	remove(n.kubelet, first)
	eventually(t, "the override of the first pod is forgotten", func() bool { return n.overrideOf(t, first) == nil })
	if n.overrideOf(t, second) == nil {
		t.Error("that of the second is forgotten too")
	}
	n.stop()
	remove(n.direct, second)
	for _, name := range []string{"cri.sock", "admin.sock"} {
		_ = os.Remove(filepath.Join(dir, name))
	}
	n = startNodeIn(t, dir)
	eventually(t, "the override of the second pod is forgotten", func() bool { return n.overrideOf(t, second) == nil })
}

// TestOverrideRefused asks for overrides that cannot work: what runs is not touched, and nothing is
// remembered.
func TestOverrideRefused(t *testing.T) {
	n := startNode(t)
	for _, tc := range []struct {
		name, image, reason, text string
		spec                      spec
	}{
		{"no such image", bed.missing, "PullFailed", "NotFound", version1()},
		{"no reference", "UPPER/case:", "PullFailed", "invalid reference", version1()},
		{"the same image", bed.busybox, "ImageUnchanged", "leave the image out", version1()},
		{"it cannot start", bed.busybox2, "StartFailed", "",
			spec{name: "app", image: bed.app, command: []string{"/app"}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := n.runPod(t)
			created, err := n.CreateContainer(t.Context(), p.withSpec(t, tc.spec, 0))
			must(t, err)
			_, err = n.StartContainer(t.Context(),
				&runtimeapi.StartContainerRequest{ContainerId: created.GetContainerId()})
			must(t, err)
			op := n.restart(t, p, overrideWith(tc.image))
			if c := op.GetContainers()[0]; op.GetPhase() != opsv1.Phase_PHASE_FAILED || c.GetReason() != tc.reason ||
				!strings.Contains(c.GetMessage(), tc.text) {
				t.Errorf("operation: %v", op)
			}
			if running, all := p.running(t, n.direct, "app"); running != 1 || all != 1 {
				t.Errorf("%d running of %d", running, all)
			}
			if st := n.status(t,
				created.GetContainerId()); st.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
				t.Errorf("old container: %v", st)
			}
			if o := n.overrideOf(t, p); o != nil {
				t.Errorf("there is an override: %v", o)
			}
		})
	}
	t.Run("the image of the spec", func(t *testing.T) {
		p, _ := n.overridden(t)
		op := n.restart(t, p, overrideWith(bed.busybox))
		if c := op.GetContainers()[0]; c.GetReason() != "ImageUnchanged" ||
			!strings.Contains(c.GetMessage(), "revert") {
			t.Errorf("operation: %v", op)
		}
		n.has(t, p, 1, "2.0", bed.busybox2)
	})
}

// TestOverrideDoesNotStart has no gate, so that the old container has been stopped when the new one
// turns out not to start: kubelet gets its own image back, or the override that there was.
func TestOverrideDoesNotStart(t *testing.T) {
	n := startProcess(t, "")
	n.kill(t)
	f, err := os.OpenFile(filepath.Join(n.dir, "config.yaml"), os.O_APPEND|os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteString("restart: {method: pidfd}\n")
	must(t, err)
	must(t, f.Close())
	n.start(t, "")
	p := n.runPod(t)
	s := spec{name: "app", image: bed.app, command: []string{"/app"}}
	created, err := n.CreateContainer(t.Context(), p.withSpec(t, s, 0))
	must(t, err)
	_, err = n.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: created.GetContainerId()})
	must(t, err)
	op := n.restart(t, p, overrideWith(bed.busybox2))
	if c := op.GetContainers()[0]; c.GetReason() != "StartFailed" || c.GetMethod() != "pidfd" {
		t.Errorf("operation: %v", op)
	}
	if running, all := p.running(t, n.kubelet, "app"); running != 0 || all != 2 {
		t.Errorf("kubelet sees %d running of %d", running, all)
	}
	id := p.replace(t, created.GetContainerId(), s)
	if st := n.status(t, id); st.GetImage().GetImage() != bed.app || n.overrideOf(t, p) != nil {
		t.Errorf("kubelet's container: %v", st)
	}
}

// TestOverrideAndUpgrade changes the spec of a pod that has an override: the spec wins, but not
// before it has been changed.
func TestOverrideAndUpgrade(t *testing.T) {
	n := startNode(t)
	start := func(t *testing.T) (*pod, string) {
		p := n.runPod(t)
		p.runSpec(t, version1())
		op := n.restart(t, p, overrideWith(bed.app3))
		if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
			t.Fatalf("operation: %v", op)
		}
		return p, op.GetContainers()[0].GetSuccessorId()
	}
	t.Run("patched", func(t *testing.T) {
		p, id := start(t)
		uid := n.toVersion2(t, p, nil)
		n.arm(t, uid)
		created := p.replace(t, id, version2())
		if op := n.wait(t, uid); op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED ||
			op.GetContainers()[0].GetSuccessorId() != created || len(op.GetContainers()[0].GetWarnings()) > 0 {
			t.Errorf("operation: %v", op)
		}
		n.has(t, p, 2, "2.0", "")
	})
	t.Run("to the image that runs", func(t *testing.T) {
		p, id := start(t)
		uid := n.toVersion2(t, p, func(c *opsv1.ContainerUpgrade) { c.Image = bed.app3 })
		n.arm(t, uid)
		s := version1()
		s.image = bed.app3
		created := p.replace(t, id, s)
		if op := n.wait(t, uid); op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED ||
			op.GetContainers()[0].GetSuccessorId() != created {
			t.Errorf("operation: %v", op)
		}
		n.has(t, p, 2, "3", "")
	})
	t.Run("liveness", func(t *testing.T) { // kubelet has not seen the new spec
		p, id := start(t)
		uid := n.toVersion2(t, p, nil)
		n.arm(t, uid)
		p.replace(t, id, version1())
		if op := n.wait(t, uid); op.GetContainers()[0].GetReason() != "TakenBackByKubelet" {
			t.Errorf("operation: %v", op)
		}
		n.has(t, p, 2, "3", bed.app3)
	})
	t.Run("to the image of the spec", func(t *testing.T) {
		p, _ := start(t)
		uid := n.prepare(t, p, func(c *opsv1.ContainerUpgrade) { c.Image = bed.busybox })
		if c := n.wait(t, uid).GetContainers()[0]; c.GetReason() != "ImageUnchanged" ||
			!strings.Contains(c.GetMessage(), "revert") {
			t.Errorf("operation: %v", c)
		}
		n.has(t, p, 1, "3", bed.app3)
	})
}

// TestOverrideKillAtEachStep kills cri-proxy at every step of an override and of its end: the one
// that runs is the one that is remembered.
func TestOverrideKillAtEachStep(t *testing.T) {
	for _, point := range []string{"pulled", "stage", "created", "staged", "stop", "gated", "stopped", "running",
		"started", "reveal", "revealed", "done"} {
		t.Run(point, func(t *testing.T) {
			n := startProcess(t, "restart."+point)
			p := n.runPod(t)
			p.runSpec(t, version1())
			again := func(uid string, req *opsv1.RestartRequest) *opsv1.Operation {
				t.Helper()
				req.Uid, req.Pod = uid, &opsv1.PodRef{Namespace: "default", Name: p.name, Uid: p.uid}
				_, _ = n.ops.Restart(t.Context(), req) // the answer may not come: that is the test
				n.died(t)
				n.start(t, "")
				seen := p.watch("app")
				op := n.wait(t, uid)
				if bad := seen.stop(); len(bad) > 0 {
					t.Errorf("what kubelet must not see:\n%s", strings.Join(bad, "\n"))
				}
				if op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
					t.Errorf("operation: %v", op)
				}
				return op
			}
			op := again("override-"+point, overrideWith(bed.busybox2))
			n.has(t, p, 1, "2.0", bed.busybox2)
			id := p.crash(t, n.node, op.GetContainers()[0].GetSuccessorId(), version1())
			n.has(t, p, 2, "2.0", bed.busybox2)
			if point == "pulled" {
				return // the image of the spec is there
			}
			n.kill(t)
			n.start(t, "restart."+point)
			if op := again("revert-"+point, revertImage()); op.GetContainers()[0].GetIncumbentId() != id {
				t.Errorf("operation: %v", op)
			}
			n.has(t, p, 3, "1.0", "")
		})
	}
}

// TestOverrideTakenBack has kubelet stop the container at steps of an override: before it is bound
// to stop the container nothing is remembered of it, by the next process either; from then on
// kubelet gets the container with the other image.
func TestOverrideTakenBack(t *testing.T) {
	for _, step := range []string{"created", "staged", "stopped", "running", "started", "reveal"} {
		joins := step != "created" && step != "staged"
		t.Run(step, func(t *testing.T) {
			n, hold := startPaused(t, step)
			t.Cleanup(hold.release)
			p := n.runPod(t)
			id := p.runSpec(t, version1())
			uid := hold.held(n.node, p, overrideWith(bed.busybox2))
			s := &stepTest{n: n, hold: hold, pod: p, steps: stopFirst, step: step, incumbent: id, uid: uid}
			stopped := make(chan error, 1)
			go func() {
				_, err := n.StopContainer(t.Context(), stopRequest(id, 10))
				stopped <- err
			}()
			if joins {
				s.logged(t, p.name, "joins the restart")
				hold.release()
				must(t, <-stopped)
				successor := p.create(t, version1(), 1)
				if c := s.succeeded(t); c.GetSuccessorId() != successor {
					t.Errorf("kubelet was given %s: %v", successor, c)
				}
				if o := n.overrideOf(t, p); o == nil {
					t.Error("there is no override")
				}
				return
			}
			s.kubeletArrives(t, "StopContainer")
			hold.release()
			must(t, <-stopped)
			s.takenBack(t)
			if o := n.overrideOf(t, p); o != nil {
				t.Errorf("there is an override: %v", o)
			}
			n.kill(t)
			n.start(t, "")
			p.replace(t, id, version1())
			n.has(t, p, 1, "1.0", "")
		})
	}
}

// TestOverrideKillWhileUndoing kills cri-proxy while it takes an override back.
func TestOverrideKillWhileUndoing(t *testing.T) {
	n := startProcess(t, "restart.undo")
	p := n.runPod(t)
	s := version1()
	s.preStop, s.grace = `{"sleep":{"seconds":60}}`, 60
	app := p.runSpec(t, s)
	uid := n.begin(t, p, overrideWith(bed.busybox2))
	n.waitFor(t, uid, func(op *opsv1.Operation) bool { return op.GetPhase() == opsv1.Phase_PHASE_STOPPING })
	go func() { // it does not come to the runtime
		_, _ = n.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.sandbox})
	}()
	n.died(t)
	n.start(t, "")
	op := n.wait(t, uid)
	if op.GetPhase() != opsv1.Phase_PHASE_FAILED || op.GetContainers()[0].GetReason() != "TakenBackByKubelet" {
		t.Errorf("operation: %v", op)
	}
	p.replace(t, app, s)
	n.has(t, p, 1, "1.0", "")
}

// TestOverridePrivate pulls from a registry that wants a password, and kills the only process that
// has it.
func TestOverridePrivate(t *testing.T) {
	const host = "private.it"
	auth, err := bed.node.BasicAuth()
	must(t, err)
	addr, err := bed.node.StartRegistryAs(t.Context(), "registry-"+host, testbed.RegistryOptions{Auth: auth})
	must(t, err)
	t.Cleanup(func() { _ = bed.node.Process("registry-" + host).Signal(syscall.SIGKILL) })
	must(t, bed.node.MapRegistry(host, "http://"+addr))
	image := host + "/busybox:2.0"

	n := startProcess(t, "restart.pulling")
	p := n.runPod(t)
	p.runSpec(t, version1())
	req := overrideWith(image)
	req.Uid, req.Pod = "private", &opsv1.PodRef{Namespace: "default", Name: p.name, Uid: p.uid}
	req.Credentials = []*opsv1.RegistryCredential{{Match: host, Username: testbed.RegistryUser,
		Password: testbed.RegistryPassword}}
	_, _ = n.ops.Restart(t.Context(), req) // the answer may not come
	n.died(t)
	n.start(t, "")
	n.waitFor(t, "private", func(op *opsv1.Operation) bool {
		return op.GetContainers()[0].GetPull().GetReason() == "CredentialsNeeded"
	})
	_, err = n.ops.Restart(t.Context(), req)
	must(t, err)
	if op := n.wait(t, "private"); op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
		t.Fatalf("operation: %v", op)
	}
	n.has(t, p, 1, "2.0", image)
	files, err := filepath.Glob(filepath.Join(n.dir, "state", "*.db"))
	if err != nil || len(files) == 0 {
		t.Fatalf("state: %v, %v", files, err)
	}
	for _, f := range append(files, filepath.Join(n.dir, "log")) {
		b, err := os.ReadFile(f)
		must(t, err)
		if strings.Contains(string(b), testbed.RegistryPassword) {
			t.Errorf("the password is in %s", f)
		}
	}

	t.Run("cancelled", func(t *testing.T) {
		n.kill(t)
		n.start(t, "restart.pulling")
		again := overrideWith(host + "/busybox:3.0")
		again.Uid, again.Pod, again.Credentials = "cancelled", req.GetPod(), req.GetCredentials()
		_, _ = n.ops.Restart(t.Context(), again)
		n.died(t)
		n.start(t, "")
		n.waitFor(t, "cancelled", func(op *opsv1.Operation) bool {
			return op.GetContainers()[0].GetPull().GetReason() == "CredentialsNeeded"
		})
		op, err := n.ops.CancelOperation(t.Context(), &opsv1.CancelOperationRequest{Uid: "cancelled"})
		must(t, err)
		if op.GetPhase() != opsv1.Phase_PHASE_CANCELLED || op.GetContainers()[0].GetReason() != "Cancelled" {
			t.Errorf("operation: %v", op)
		}
		n.has(t, p, 1, "2.0", image)
	})
	t.Run("without", func(t *testing.T) {
		p := n.runPod(t)
		p.removeImage(t, image)
		p.runSpec(t, version1())
		op := n.restart(t, p, overrideWith(image))
		if c := op.GetContainers()[0]; c.GetReason() != "PullFailed" ||
			!strings.Contains(c.GetMessage(), "Unauthorized") {
			t.Errorf("operation: %v", op)
		}
		n.has(t, p, 0, "1.0", "")
	})
}

// TestOverridePatchedBehindTheProxy has kubelet make the container of another spec while the proxy
// is bypassed.
func TestOverridePatchedBehindTheProxy(t *testing.T) {
	n := startNode(t)
	p, id := n.overridden(t)
	p.k = n.direct
	s := version1()
	s.image = bed.app3
	id = p.crash(t, n, id, s)
	p.k = n.kubelet
	req := revertImage()
	op := n.restart(t, p, req)
	if c := op.GetContainers()[0]; c.GetReason() != "ImageNotOverridden" || c.GetSuccessorId() != "" {
		t.Errorf("operation: %v", op)
	}
	n.has(t, p, 2, "3", "")
	if st := n.status(t, id); st.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("container: %v", st)
	}
}
