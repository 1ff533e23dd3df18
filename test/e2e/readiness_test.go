// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/pods"
)

// readyAgain is one restart of a container with a readinessProbe.
type readyAgain struct {
	reveal, notReady, ready time.Time // the second is zero if nobody has seen it
	startFirst, nudged      bool
}

// TestReadyAgain restarts containers that have a readinessProbe, and waits for their pods to be
// Ready again, as their Services do. Now and then kubelet misses to probe a new container; the next
// probe is a period away, which here is longer than is waited for. With READY_RESTARTS=200 the
// period is the usual one, as many are restarted, and the times are told.
func TestReadyAgain(t *testing.T) {
	if os.Getenv("READY_RESTARTS") == "" {
		t.Parallel()
	}
	ns := namespace(t)
	period, restarts, abreast, timeout := 60, 20, 4, 45*time.Second
	if n, err := strconv.Atoi(os.Getenv("READY_RESTARTS")); err == nil {
		period, restarts, timeout = 10, n, 2*time.Minute
	}
	var names []string
	for i := range abreast {
		name := fmt.Sprintf("ready-%d", i)
		names = append(names, name)
		apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s}
spec:
  terminationGracePeriodSeconds: 5
  containers:
  - name: app
    image: "%s"
    env: [{name: REUSEPORT, value: newest}]
    readinessProbe: {httpGet: {port: 8080, path: /healthz}, periodSeconds: %d, timeoutSeconds: 5}
`, name, ns, bed.Image("app:1"), period))
	}
	for _, name := range names {
		// A kubelet that is younger than a period waits for a part of that before it probes for the
		// first time.
		kubectl(t, "-n", ns, "wait", "--for=condition=Ready", "pod/"+name, fmt.Sprintf("--timeout=%ds", period+60))
	}
	node := opsClient(t)
	var mu sync.Mutex
	var all []readyAgain
	var wg sync.WaitGroup
	for i, name := range names {
		wg.Go(func() {
			for n := i; n < restarts; n += abreast {
				r, err := restartUntilReady(t.Context(), node, timeout, n/abreast%2 == 1, ns, name,
					fmt.Sprintf("%s-%d", name, n))
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				all = append(all, r)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	for _, startFirst := range []bool{false, true} {
		var since, gone []time.Duration
		nudged := 0
		for _, r := range all {
			if r.startFirst != startFirst {
				continue
			}
			since = append(since, r.ready.Sub(r.reveal))
			if !r.notReady.IsZero() {
				gone = append(gone, r.ready.Sub(r.notReady))
			}
			if r.nudged {
				nudged++
			}
		}
		t.Logf("StartFirst %v: %d nudges; from the swap to Ready: %s; not Ready, as the API server has told: %s",
			startFirst, nudged, percentiles(since), percentiles(gone))
	}
}

func percentiles(d []time.Duration) string {
	if len(d) == 0 {
		return "never"
	}
	slices.Sort(d)
	at := func(p int) time.Duration { return d[(len(d)*p+99)/100-1].Round(time.Millisecond) }
	return fmt.Sprintf("p50 %s, p90 %s, p99 %s, most %s of %d", at(50), at(90), at(99), at(100), len(d))
}

// restartUntilReady restarts the container of a pod, and follows the pod until it is Ready with the
// new one.
func restartUntilReady(
	ctx context.Context, node opsv1.OpsClient, timeout time.Duration, startFirst bool, ns, pod, request string,
) (readyAgain, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var r readyAgain
	var before corev1.Pod
	if err := api.Get(ctx, client.ObjectKey{Namespace: ns, Name: pod}, &before); err != nil {
		return r, err
	}
	old, nudge := before.Status.ContainerStatuses[0].ContainerID, before.Annotations[pods.NudgeAnnotation]
	manifest := recreate(ns, request, pod, "containers: [{name: app}]")
	if startFirst {
		const order = "annotations: {cri-proxy.io/restart-order: StartFirst}, "
		manifest = strings.Replace(manifest, "metadata: {", "metadata: {"+order, 1)
	}
	if err := bed.KubectlApply(ctx, manifest); err != nil {
		return r, err
	}
	w, err := api.Watch(ctx, &corev1.PodList{}, client.InNamespace(ns), client.MatchingFields{"metadata.name": pod})
	if err != nil {
		return r, err
	}
	defer w.Stop()
	for e := range w.ResultChan() {
		p, ok := e.Object.(*corev1.Pod)
		if !ok || e.Type == apiwatch.Deleted || p.Status.ContainerStatuses[0].ContainerID == old {
			continue
		}
		r.nudged = r.nudged || p.Annotations[pods.NudgeAnnotation] != nudge
		is := slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
			return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
		})
		if !is && r.notReady.IsZero() {
			r.notReady = time.Now()
		}
		if is {
			r.ready = time.Now()
			break
		}
	}
	if r.ready.IsZero() {
		return r, fmt.Errorf("pod %s is not Ready again: %w", pod, ctx.Err())
	}
	uid, err := bed.Kubectl(ctx, "-n", ns, "get", "crr", request, "-o", "jsonpath={.metadata.uid}")
	if err != nil {
		return r, err
	}
	op, err := node.GetOperation(ctx, &opsv1.GetOperationRequest{Uid: strings.TrimSpace(uid) + ".app"})
	if err != nil {
		return r, err
	}
	// The one comes right after the other, in either order.
	r.reveal = op.GetContainers()[0].GetStartTime().AsTime()
	if stop := op.GetContainers()[0].GetStopTime().AsTime(); stop.After(r.reveal) {
		r.reveal = stop
	}
	r.startFirst = startFirst
	_, err = bed.Kubectl(ctx, "-n", ns, "wait", "--for=jsonpath={.status.phase}=Completed", "crr/"+request,
		"--timeout=60s")
	return r, err
}
