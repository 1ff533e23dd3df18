// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package pods_test

import (
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/cri-proxy/cri-proxy/controller/pods"
)

func TestRunAs(t *testing.T) {
	yes, no, one, two := true, false, int64(1), int64(2)
	for _, tt := range []struct {
		name    string
		pod     *corev1.PodSecurityContext
		own     *corev1.SecurityContext
		nonRoot bool
		user    *int64
	}{
		{name: "nothing"},
		{name: "the pod's", pod: &corev1.PodSecurityContext{RunAsNonRoot: &yes, RunAsUser: &one}, nonRoot: true,
			user: &one},
		{name: "the pod's, and something else of its own",
			pod: &corev1.PodSecurityContext{RunAsNonRoot: &yes, RunAsUser: &one}, own: &corev1.SecurityContext{},
			nonRoot: true, user: &one},
		{name: "its own", own: &corev1.SecurityContext{RunAsNonRoot: &yes, RunAsUser: &two}, nonRoot: true, user: &two},
		{name: "its own before the pod's", pod: &corev1.PodSecurityContext{RunAsNonRoot: &yes, RunAsUser: &one},
			own: &corev1.SecurityContext{RunAsNonRoot: &no, RunAsUser: &two}, user: &two},
	} {
		t.Run(tt.name, func(t *testing.T) {
			nonRoot, user := pods.RunAs(&corev1.Pod{Spec: corev1.PodSpec{SecurityContext: tt.pod}},
				&corev1.Container{SecurityContext: tt.own})
			if nonRoot != tt.nonRoot || user != tt.user {
				t.Errorf("got %v, %v", nonRoot, user)
			}
		})
	}
}
