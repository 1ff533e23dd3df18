// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// upgradable is a pod whose container app writes its version into a directory of the host when it
// starts, when it is asked to stop, and in its hooks; rest is what the container has beyond that.
func upgradable(ns, name, dir, rest string, policy corev1.RestartPolicy) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, namespace: %[2]s}
spec:
  restartPolicy: %[6]s
  terminationGracePeriodSeconds: %[7]d
  containers:
  - name: app
    image: "%[3]s"
    command: [sh, -c, 'trap "echo asked $VERSION >> /trace/%[1]s; exit 0" TERM; echo began $VERSION $SETTING >> /trace/%[1]s; while :; do sleep 0.1; done']
    volumeMounts: [{name: trace, mountPath: /trace}]%[5]s
  - name: neighbour
    image: "%[3]s"
    command: [sh, -c, 'trap "exit 0" TERM; while :; do sleep 0.1; done']
  volumes: [{name: trace, hostPath: {path: "%[4]s"}}]
---
`, name, ns, bed.Image("busybox:1.0"), dir, rest, policy, tracedGrace/time.Second)
}

// traceOf returns what the pod has written, by line.
func traceOf(t testing.TB, dir, pod string) []string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, pod))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(b)), "\n")
}

// began waits until the pod's container app of that version can be asked to stop.
func began(t testing.TB, dir, pod, version string) {
	t.Helper()
	eventually(t, "version "+version+" of "+pod+" has begun", func() bool {
		return slices.ContainsFunc(traceOf(t, dir, pod),
			func(l string) bool { return strings.HasPrefix(l, "began "+version) })
	})
}

// prepareUpgrade prepares the upgrade of container app and waits until it is prepared.
func prepareUpgrade(t testing.TB, pod *corev1.Pod, image string, change func(*opsv1.ContainerUpgrade)) string {
	t.Helper()
	c := &opsv1.ContainerUpgrade{Name: "app", Image: image, ExpectedContainerId: container(t, pod, "app").ContainerID}
	if change != nil {
		change(c)
	}
	uid := "upgrade-" + string(pod.UID)
	_, err := opsClient(t).PrepareUpgrade(t.Context(), &opsv1.PrepareUpgradeRequest{
		Uid: uid, Pod: &opsv1.PodRef{Namespace: pod.Namespace, Name: pod.Name, Uid: string(pod.UID)},
		Containers: []*opsv1.ContainerUpgrade{c}, Requester: "test",
	})
	must(t, err)
	inPhase(t, uid, opsv1.Phase_PHASE_PREPARED)
	return uid
}

// commitUpgrade commits the upgrade and waits until it is armed.
func commitUpgrade(t testing.TB, uid string) {
	t.Helper()
	must(t, testbed.CommitUpgrade(t.Context(), opsClient(t), uid))
	inPhase(t, uid, opsv1.Phase_PHASE_ARMED)
}

// inPhase waits until the operation is in the phase and returns it.
func inPhase(t testing.TB, uid string, phase opsv1.Phase) *opsv1.Operation {
	t.Helper()
	node := opsClient(t)
	var op *opsv1.Operation
	eventually(t, "operation "+uid+" is in phase "+phase.String(), func() bool {
		var err error
		op, err = node.GetOperation(t.Context(), &opsv1.GetOperationRequest{Uid: uid})
		must(t, err)
		if op.GetFinishTime() != nil && op.GetPhase() != phase {
			t.Fatalf("the operation has ended: %v", op)
		}
		return op.GetPhase() == phase
	})
	return op
}

// setImage patches the pod's spec, which is what has kubelet replace the container.
func setImage(t testing.TB, pod *corev1.Pod, image string) {
	t.Helper()
	kubectl(t, "-n", pod.Namespace, "set", "image", "pod/"+pod.Name, "app="+image)
}

// upgraded waits until the pod's status has the new image and the pod is ready, and checks that
// everything else is as it was.
func upgraded(t testing.TB, before *corev1.Pod, image string) *corev1.Pod {
	t.Helper()
	was := container(t, before, "app")
	var after *corev1.Pod
	eventually(t, "pod "+before.Name+" has the new container", func() bool {
		after = getPod(t, before.Namespace, before.Name)
		c := container(t, after, "app")
		return c.ContainerID != was.ContainerID && c.Ready && c.State.Running != nil
	})
	c := container(t, after, "app")
	// The runtime tells a name of the image, which need not be the one that it was asked for by.
	if wasImage, isOther := was.ImageID, c.ImageID != was.ImageID; isOther == strings.HasSuffix(image, ":twin") ||
		c.RestartCount != was.RestartCount+1 {
		t.Logf("image was %s", wasImage)
		t.Errorf("container: %+v, want image %s", c, image)
	}
	if after.UID != before.UID || after.Status.PodIP != before.Status.PodIP || after.Status.Phase != corev1.PodRunning {
		t.Errorf("pod was %s %s and is %s %s %s", before.UID, before.Status.PodIP, after.UID, after.Status.PodIP,
			after.Status.Phase)
	}
	if n, o := container(t, after, "neighbour"), container(t, before, "neighbour"); n.ContainerID != o.ContainerID {
		t.Errorf("neighbour was restarted: %+v", n)
	}
	return after
}

// callsOf returns what kubelet did to the slot since a time, in order.
func callsOf(t testing.TB, ns, pod, name string, since time.Time) []string {
	t.Helper()
	type at struct {
		call
		method string
	}
	var all []at
	ids := map[string]bool{}
	p := getPod(t, ns, pod)
	c := container(t, p, name)
	for _, id := range []string{c.ContainerID, func() string {
		if last := c.LastTerminationState.Terminated; last != nil {
			return last.ContainerID
		}
		return ""
	}()} {
		_, bare, _ := strings.Cut(id, "://")
		ids[bare] = true
	}
	for _, method := range []string{"StopContainer", "CreateContainer", "StartContainer", "RemoveContainer",
		"StopPodSandbox"} {
		for _, c := range kubeletCalls(t, method) {
			if c.Time.After(since) && (ids[c.ContainerID] && c.ContainerID != "" ||
				c.Pod == pod && c.Namespace == ns && c.Container == name) {
				all = append(all, at{c, method})
			}
		}
	}
	slices.SortFunc(all, func(a, b at) int { return a.Time.Compare(b.Time) })
	var out []string
	for _, c := range all {
		out = append(out, c.method+" "+c.Code)
	}
	return out
}

// TestUpgrade changes the image of a running container. Kubelet does what it does for any change of
// an image, and finds everything ready.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	dir := scratchDir(t, "trace")
	hooks := `
    lifecycle:
      preStop: {exec: {command: [sh, -c, "echo preStop $VERSION >> /trace/$HOSTNAME"]}}
      # Kubelet runs it beside the entrypoint, which may be the slower one.
      postStart: {exec: {command: [sh, -c, "until grep -q \"^began $VERSION\" /trace/$HOSTNAME; do sleep 0.01; done; echo postStart $VERSION >> /trace/$HOSTNAME"]}}`
	two := bed.Image("busybox:2.0")
	// busybox:twin is another name of the image that runs.
	crane(t, "tag", bed.Image("busybox:1.0"), "twin")
	digest := bed.Image("busybox@" + crane(t, "digest", bed.Image("busybox:2.0")))
	for _, tc := range []struct {
		name, rest, image string
		policy            corev1.RestartPolicy
		change            func(*opsv1.ContainerUpgrade)
		trace             []string
	}{
		{name: "always", rest: hooks, policy: corev1.RestartPolicyAlways,
			trace: []string{"began 1.0", "postStart 1.0", "preStop 1.0", "asked 1.0", "began 2.0", "postStart 2.0"}},
		{name: "never", policy: corev1.RestartPolicyNever, trace: []string{"began 1.0", "asked 1.0", "began 2.0"}},
		{name: "pulled-always", rest: "\n    imagePullPolicy: Always", policy: corev1.RestartPolicyAlways,
			change: func(c *opsv1.ContainerUpgrade) { c.PullPolicy = opsv1.PullPolicy_PULL_POLICY_ALWAYS },
			trace:  []string{"began 1.0", "asked 1.0", "began 2.0"}},
		{name: "start-first", policy: corev1.RestartPolicyAlways,
			change: func(c *opsv1.ContainerUpgrade) { c.Order, c.MinReadySeconds = opsv1.Order_ORDER_START_FIRST, 1 },
			trace:  []string{"began 1.0", "began 2.0", "asked 1.0"}},
		{name: "same-image", policy: corev1.RestartPolicyAlways, image: bed.Image("busybox:twin"),
			trace: []string{"began 1.0", "asked 1.0", "began 1.0"}},
		{name: "digest", policy: corev1.RestartPolicyOnFailure, image: digest,
			trace: []string{"began 1.0", "asked 1.0", "began 2.0"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.image == "" {
				tc.image = two
			}
			apply(t, upgradable(ns, tc.name, dir, tc.rest, tc.policy))
			before := ready(t, ns, tc.name)
			began(t, dir, tc.name, "1.0")
			// of the pod's start, when a volume may not have been there at once
			told := strings.Split(events(t, ns, tc.name), "\n")
			uid := prepareUpgrade(t, before, tc.image, tc.change)
			commitUpgrade(t, uid)
			since := time.Now()
			seen := watchUnexpected(t, before)
			setImage(t, before, tc.image)
			after := upgraded(t, before, tc.image)
			op := inPhase(t, uid, opsv1.Phase_PHASE_SUCCEEDED)
			c := op.GetContainers()[0]
			_, id, _ := strings.Cut(container(t, after, "app").ContainerID, "://")
			if c.GetSuccessorId() != id || len(c.GetWarnings()) > 0 {
				t.Errorf("operation: %v", op)
			}
			eventually(t, "all has been written", func() bool { return len(traceOf(t, dir, tc.name)) >= len(tc.trace) })
			var got []string
			for _, l := range traceOf(t, dir, tc.name) {
				got = append(got, strings.TrimSpace(l))
			}
			if !slices.Equal(got, tc.trace) {
				t.Errorf("the pod wrote %q, want %q", got, tc.trace)
			}
			if got := callsOf(t, ns, tc.name, "app", since); !slices.Equal(got,
				[]string{"StopContainer OK", "CreateContainer OK", "StartContainer OK"}) {
				t.Errorf("kubelet called %q", got)
			}
			if bad := seen(); len(bad) > 0 {
				t.Errorf("the pod was %q", bad)
			}
			for _, e := range strings.Split(events(t, ns, tc.name), "\n") {
				if (strings.HasPrefix(e, "Failed") || strings.HasPrefix(e, "BackOff")) && !slices.Contains(told, e) {
					t.Errorf("event: %s", e)
				}
			}
			t.Logf("gap %s by %s, %s", c.GetGap().AsDuration(), c.GetMethod(), strings.Join(got, ", "))
		})
	}
}

// crane runs the registry client on the bed's registry.
func crane(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), filepath.Join(bed.Bin, "crane"), append(args, "--insecure")...).
		Output()
	must(t, err)
	return strings.TrimSpace(string(out))
}

// watchUnexpected watches a pod and returns a function that tells in what phases other than Running
// it was seen.
func watchUnexpected(t testing.TB, pod *corev1.Pod) func() []string {
	t.Helper()
	w := watchPhases(t, pod.Namespace, pod.Name, string(pod.UID))
	return func() []string {
		w.stop()
		var bad []string
		for _, s := range w.seen {
			if strings.HasPrefix(s, "uid") {
				bad = append(bad, s)
			}
		}
		return bad
	}
}

// TestUpgradeWithNewSetting upgrades a container whose ConfigMap has changed since it was made: it
// gets the new setting.
func TestUpgradeWithNewSetting(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	dir := scratchDir(t, "trace")
	apply(t, fmt.Sprintf("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: conf, namespace: %s}\ndata: {setting: "+
		"old}\n---\n", ns)+
		upgradable(ns, "setting", dir,
			"\n    env: [{name: SETTING, valueFrom: {configMapKeyRef: {name: conf, key: setting}}}]",
			corev1.RestartPolicyAlways))
	before := ready(t, ns, "setting")
	began(t, dir, "setting", "1.0 old")
	// Before the preparation, which goes by what kubelet asked for when it made the container:
	// kubelet hears of the change by a watch.
	kubectl(t, "-n", ns, "patch", "configmap", "conf", "-p", `{"data":{"setting":"new"}}`)
	uid := prepareUpgrade(t, before, bed.Image("busybox:2.0"), nil)
	commitUpgrade(t, uid)
	setImage(t, before, bed.Image("busybox:2.0"))
	upgraded(t, before, bed.Image("busybox:2.0"))
	began(t, dir, "setting", "2.0 new")
	op := inPhase(t, uid, opsv1.Phase_PHASE_SUCCEEDED)
	if c := op.GetContainers()[0]; c.GetMethod() != "kubelet" ||
		!strings.Contains(strings.Join(c.GetWarnings(), " "), "envs.SETTING") {
		t.Errorf("operation: %v", op)
	}
	assertOneRunning(t, string(before.UID), "app")
}

// TestPodDeletedDuringUpgrade deletes, or evicts, the pod at each step between the patch and
// kubelet's start of the new container.
func TestPodDeletedDuringUpgrade(t *testing.T) {
	ns := namespace(t)
	dir := scratchDir(t, "trace")
	hooks := `
    lifecycle: {preStop: {exec: {command: [sh, -c, "echo preStop $VERSION >> /trace/$HOSTNAME"]}}}`
	points := []string{"armed", "stop", "stopped", "running", "started", "reveal", "revealed", "adopt"}
	pods := ""
	for _, point := range points {
		pods += upgradable(ns, point, dir, hooks, corev1.RestartPolicyAlways)
	}
	apply(t, pods)
	for _, point := range points {
		ready(t, ns, point)
	}
	for i, point := range points {
		t.Run(point, func(t *testing.T) {
			pod := ready(t, ns, point)
			began(t, dir, point, "1.0")
			if point == "armed" { // nothing is held: kubelet has not seen the patch, or has, when the pod goes
				uid := prepareUpgrade(t, pod, bed.Image("busybox:2.0"), nil)
				commitUpgrade(t, uid)
				setImage(t, pod, bed.Image("busybox:2.0"))
				kubectl(t, "-n", ns, "delete", "pod", point, "--wait=false")
			} else {
				h := holdAt(t, "upgrade."+point)
				kubeletIsThrough(t) // a preStop hook that it cannot run is left out
				uid := prepareUpgrade(t, pod, bed.Image("busybox:2.0"), nil)
				commitUpgrade(t, uid)
				setImage(t, pod, bed.Image("busybox:2.0"))
				h.reached()
				if i >= slices.Index(points, "running") {
					began(t, dir, point, "2.0")
				}
				if i%2 == 0 {
					kubectl(t, "-n", ns, "delete", "pod", point, "--wait=false")
				} else {
					evict(t, pod)
				}
				h.release()
			}
			eventually(t, "the pod is gone", func() bool {
				return apierrors.IsNotFound(api.Get(t.Context(), client.ObjectKeyFromObject(pod), &corev1.Pod{}))
			})
			counts := map[string]int{}
			trace := traceOf(t, dir, point)
			for _, l := range trace {
				counts[strings.TrimSpace(l)]++
			}
			if counts["preStop 1.0"] != 1 || counts["asked 1.0"] != 1 || counts["began 2.0"] > counts["asked 2.0"] ||
				counts["began 2.0"] > 1 || counts["asked 2.0"] > 1 || counts["preStop 2.0"] > 1 {
				t.Errorf("the pod wrote %q", trace)
			}
			assertNothingLeft(t, pod)
		})
	}
}

// evict asks for the pod's eviction, as kubectl drain does.
func evict(t testing.TB, pod *corev1.Pod) {
	t.Helper()
	body := fmt.Sprintf(`{"apiVersion":"policy/v1","kind":"Eviction","metadata":{"name":%q,"namespace":%q}}`,
		pod.Name, pod.Namespace)
	file := filepath.Join(scratchDir(t, "evict"), "eviction.json")
	must(t, os.WriteFile(file, []byte(body), 0o600))
	kubectl(t, "create", "--raw", fmt.Sprintf("/api/v1/namespaces/%s/pods/%s/eviction", pod.Namespace, pod.Name), "-f",
		file)
}

// TestLivenessDuringUpgrade has kubelet restart the container because a probe fails while an
// upgrade is armed and the pod's spec has not been patched. Kubelet gets what it asks for, and the
// patch is served afterwards.
func TestLivenessDuringUpgrade(t *testing.T) {
	ns := namespace(t)
	dir := scratchDir(t, "trace")
	apply(t, upgradable(ns, "ill", dir, `
    livenessProbe: {exec: {command: [test, "!", -e, /trace/ill-ill]}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 1}`, corev1.RestartPolicyAlways))
	before := ready(t, ns, "ill")
	began(t, dir, "ill", "1.0")
	uid := prepareUpgrade(t, before, bed.Image("busybox:2.0"), nil)
	commitUpgrade(t, uid)
	must(t, os.WriteFile(filepath.Join(dir, "ill-ill"), nil, 0o644))
	eventually(t, "kubelet has restarted the container", func() bool {
		c := container(t, getPod(t, ns, "ill"), "app")
		return c.RestartCount == 1 && c.State.Running != nil || slices.Contains(traceOf(t, dir, "ill"), "asked 1.0")
	})
	must(t, os.Remove(filepath.Join(dir, "ill-ill")))
	op := inPhase(t, uid, opsv1.Phase_PHASE_FAILED)
	if op.GetContainers()[0].GetReason() != "TakenBackByKubelet" {
		t.Errorf("operation: %v", op)
	}
	if slices.Contains(traceOf(t, dir, "ill"), "began 2.0") {
		t.Errorf("the new version has run before the spec was patched: %q", traceOf(t, dir, "ill"))
	}
	between := ready(t, ns, "ill")
	setImage(t, between, bed.Image("busybox:2.0"))
	began(t, dir, "ill", "2.0")
	assertOneRunning(t, string(before.UID), "app")
}

// TestLivenessAtEachStepOfUpgrade has the liveness probe fail at steps between the patch and
// kubelet's start of the new container, at all of them with CHAOS=full. What kubelet makes of it is
// one preStop and one request to stop for each process, and a container of the new image in the
// end.
func TestLivenessAtEachStepOfUpgrade(t *testing.T) {
	ns := namespace(t)
	dir := scratchDir(t, "trace")
	points := []string{"armed", "stop", "stopped", "running", "started", "reveal", "revealed", "adopt"}
	if os.Getenv("CHAOS") != "full" {
		points = []string{"armed", "stop", "revealed"}
	}
	pods := ""
	for _, point := range points {
		pods += upgradable(ns, point, dir, `
    lifecycle: {preStop: {exec: {command: [sh, -c, "echo preStop $VERSION >> /trace/$HOSTNAME"]}}}
    livenessProbe: {exec: {command: [sh, -c, "! rm /trace/$HOSTNAME-ill-$VERSION 2>/dev/null"]}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 1}`, corev1.RestartPolicyAlways)
	}
	apply(t, pods)
	for _, point := range points {
		ready(t, ns, point)
	}
	for _, point := range points {
		t.Run(point, func(t *testing.T) {
			two := bed.Image("busybox:2.0")
			pod := ready(t, ns, point)
			began(t, dir, point, "1.0")
			ill := func(version string) string { return filepath.Join(dir, point+"-ill-"+version) }
			// One probe fails, after which kubelet probes no more but kills the container. The next
			// one is well.
			failing := func(version string) { must(t, os.WriteFile(ill(version), nil, 0o644)) }
			// A probe of the old container has failed, or could not be told.
			probed := func() {
				t.Helper()
				_, id, _ := strings.Cut(container(t, pod, "app").ContainerID, "://")
				since := time.Now()
				eventually(t, "kubelet has probed the old container", func() bool {
					return slices.ContainsFunc(kubeletCalls(t, "ExecSync"),
						func(c call) bool { return c.ContainerID == id && c.Time.After(since) })
				})
			}
			// there nothing is held: kubelet stops the container for the one reason or the other
			waits := point != "armed"
			var h *held
			if waits {
				h = holdAt(t, "upgrade."+point)
				kubeletIsThrough(t) // as above
			}
			uid := prepareUpgrade(t, pod, two, nil)
			commitUpgrade(t, uid)
			kills := 0
			if waits {
				setImage(t, pod, two)
				h.reached()
				failing("1.0")
				if point == "revealed" || point == "adopt" { // kubelet knows the new one
					began(t, dir, point, "2.0")
					failing("2.0")
					kills = 1
				}
				probed()
				h.release()
			} else {
				failing("1.0")
				probed()
				setImage(t, pod, two)
			}
			eventually(t, "the old container has been asked to stop",
				func() bool { return slices.Contains(traceOf(t, dir, point), "asked 1.0") })
			if kills > 0 {
				eventually(t, "kubelet has killed the new one",
					func() bool { return slices.Contains(traceOf(t, dir, point), "asked 2.0") })
			}
			// Without a hold kubelet may stop the old container for its probe, and make it anew as
			// the spec was then, after the node has taken the stop for that of the patch: the new
			// one is then asked to stop and forgotten, and made again.
			counts, forgotten := map[string]int{}, 0
			var after *corev1.Pod
			eventually(t, "all is settled", func() bool {
				clear(counts)
				for _, l := range traceOf(t, dir, point) {
					counts[strings.TrimSpace(l)]++
				}
				forgotten = counts["asked 2.0"] - kills
				after = getPod(t, ns, point)
				c := container(t, after, "app")
				return c.Ready && c.Image == two && counts["began 2.0"] == counts["asked 2.0"]+1 &&
					int(c.RestartCount) == counts["began 1.0"]+counts["began 2.0"]-1-forgotten
			})
			if counts["preStop 1.0"] != counts["began 1.0"] || counts["asked 1.0"] != counts["began 1.0"] ||
				counts["preStop 2.0"] != kills ||
				forgotten > 1 || waits && (forgotten > 0 || counts["began 1.0"] != 1) {
				t.Errorf("the pod wrote %q", traceOf(t, dir, point))
			}
			if n := container(t, after, "neighbour"); n.ContainerID != container(t, pod, "neighbour").ContainerID ||
				after.UID != pod.UID || after.Status.PodIP != pod.Status.PodIP {
				t.Errorf("the pod was touched: %+v", after.Status)
			}
			node := opsClient(t)
			eventually(t, "no operation is left on the node", func() bool {
				info, err := node.NodeInfo(t.Context(), &opsv1.NodeInfoRequest{})
				must(t, err)
				return len(info.GetActiveSlots()) == 0
			})
			op, err := node.GetOperation(t.Context(), &opsv1.GetOperationRequest{Uid: uid})
			must(t, err)
			if waits && op.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED {
				t.Errorf("operation: %v", op)
			}
			t.Logf("%s: the pod wrote %q", op.GetPhase(), traceOf(t, dir, point))
			assertOneRunning(t, string(pod.UID), "app")
			assertNoGates(t)
		})
	}
}

// TestKillDuringUpgrade kills the proxy, kubelet or the runtime at steps of an upgrade, at all of
// them with CHAOS=full. It ends with the new image all the same.
func TestKillDuringUpgrade(t *testing.T) {
	ns := namespace(t)
	dir := scratchDir(t, "trace")
	kinds := map[string]func(){
		"proxy": func() { restartProxy(t, syscall.SIGKILL) },
		"kubelet": func() {
			must(t, bed.StopKubelet(t.Context(), syscall.SIGKILL))
			must(t, bed.StartKubelet(t.Context()))
		},
		"runtime": func() {
			must(t, bed.StopContainerd(t.Context(), syscall.SIGKILL))
			must(t, bed.StartContainerd(t.Context()))
		},
	}
	all := []string{"held", "armed", "stop", "running", "revealed", "adopt"}
	points := map[string][]string{"proxy": all, "kubelet": {"stop", "revealed"}, "runtime": {"armed", "stop"}}
	if os.Getenv("CHAOS") == "full" {
		points["kubelet"], points["runtime"] = all, all
	}
	var names []string
	pods := ""
	for kind := range kinds {
		for _, point := range points[kind] {
			names = append(names, kind+"-"+point)
			pods += upgradable(ns, kind+"-"+point, dir, "", corev1.RestartPolicyNever)
		}
	}
	slices.Sort(names)
	apply(t, pods)
	for _, name := range names {
		ready(t, ns, name)
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			kind, point, _ := strings.Cut(name, "-")
			pod := ready(t, ns, name)
			began(t, dir, name, "1.0")
			h := holdAt(t, "upgrade."+point)
			node := opsClient(t)
			uid := "upgrade-" + string(pod.UID)
			req := &opsv1.PrepareUpgradeRequest{
				Uid: uid, Pod: &opsv1.PodRef{Namespace: ns, Name: name, Uid: string(pod.UID)},
				Containers: []*opsv1.ContainerUpgrade{{Name: "app", Image: bed.Image("busybox:2.0")}},
				Requester:  "test",
			}
			_, err := node.PrepareUpgrade(t.Context(), req)
			must(t, err)
			end := func() {
				h.reached()
				if kind == "proxy" {
					kinds[kind]()
				} else {
					go h.release()
					kinds[kind]()
				}
			}
			if point == "held" {
				end()
			}
			inPhase(t, uid, opsv1.Phase_PHASE_PREPARED)
			must(t, testbed.CommitUpgrade(t.Context(), opsClient(t), uid))
			if point == "armed" {
				end()
			}
			inPhase(t, uid, opsv1.Phase_PHASE_ARMED)
			setImage(t, pod, bed.Image("busybox:2.0"))
			if point != "held" && point != "armed" {
				end()
			}
			upgraded(t, pod, bed.Image("busybox:2.0"))
			assertOneRunning(t, string(pod.UID), "app")
			began(t, dir, name, "2.0")
			counts := map[string]int{}
			for _, l := range traceOf(t, dir, name) {
				counts[strings.TrimSpace(l)]++
			}
			if counts["began 1.0"] != 1 || counts["asked 1.0"] != 1 || counts["began 2.0"] != 1 ||
				counts["asked 2.0"] != 0 {
				t.Errorf("the pod wrote %v", counts)
			}
			assertNoGates(t)
		})
	}
}
