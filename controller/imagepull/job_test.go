// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"context"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/report"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

// A reconcile may look at a job just after a node has failed, while a goroutine still talks to the
// node. When that goroutine ends, it wakes the reconciler in time for the next attempt.
func TestEnsureWakeup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := logrus.New()
		log.SetOutput(io.Discard)
		r := &Reconciler{Log: log}
		r.prepare()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() { _ = r.crew.Start(ctx) }()
		s, err := spec.Of(
			&v1beta1.ImagePullJob{Spec: v1beta1.ImagePullJobSpec{Image: "a", ImagePullJobTemplate: v1beta1.ImagePullJobTemplate{
				CompletionPolicy: v1beta1.CompletionPolicy{Type: v1beta1.Never},
			}}})
		if err != nil {
			t.Fatal(err)
		}
		s.Nodes = []spec.Target{{Node: nodes.Node{Name: "poor"}, Ready: true}}
		woken := 0
		j := newJobState(r, s, false, false, func() { woken++ })
		j.mu.Lock()
		n := j.table.nodes[0]
		j.talk(n, func(context.Context, int) {
			j.mu.Lock()
			defer j.mu.Unlock()
			j.table.setPhase(n, failed)
			n.retryAt = time.Now().Add(10 * time.Minute)
			// What the reconciler leaves, for another node.
			j.planned, j.woken, j.table.throttle = time.Now().Add(19*time.Hour), false, report.Throttle{}
		})
		j.mu.Unlock()
		synctest.Wait()
		if woken != 1 {
			t.Errorf("woken %d times", woken)
		}
		j.close()
	})
}
