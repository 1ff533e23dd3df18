// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"slices"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// TestOverrideGoesWithPod deletes a pod that has another image than its spec says. Kubelet takes up
// to a minute to remove the sandbox of a pod that is gone: this is the last test that is alone, and
// those that run beside each other have begun meanwhile.
func TestOverrideGoesWithPod(t *testing.T) {
	ns := namespace(t)
	dir := scratchDir(t, "trace")
	apply(t, upgradable(ns, "shop", dir, "", corev1.RestartPolicyAlways))
	pod := ready(t, ns, "shop")
	began(t, dir, "shop", "1.0")
	restartWith(t, pod, "override", func(c *opsv1.ContainerRestart) { c.Image = bed.Image("busybox:2.0") })
	if o := overridesOf(t, pod); len(o) != 1 {
		t.Errorf("overrides: %v", o)
	}
	kubectl(t, "-n", ns, "delete", "pod", "shop", "--wait=true")
	leaving.await("the override of a pod that is gone", func(ctx context.Context) (gone bool, err error) {
		conn, err := grpc.NewClient("unix://"+bed.AdminSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return false, err
		}
		defer func() { err = errors.Join(err, conn.Close()) }()
		l, err := opsv1.NewOpsClient(conn).ListOverrides(ctx, &opsv1.ListOverridesRequest{})
		if err != nil {
			return false, err
		}
		return !slices.ContainsFunc(l.GetOverrides(),
			func(o *opsv1.ImageOverride) bool { return o.GetPod().GetUid() == string(pod.UID) }), nil
	})
}
