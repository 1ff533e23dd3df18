// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package spec_test

import (
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
)

type (
	job      = v1beta1.ImagePullJob
	template = v1beta1.ImagePullJobTemplate
)

func number[T any](n T) *T { return &n }

func jobOf(image string, t template) *job {
	return &job{Spec: v1beta1.ImagePullJobSpec{Image: image, ImagePullJobTemplate: t}}
}

func TestRequestOfJob(t *testing.T) {
	job := jobOf("a", template{
		PullPolicy:      &v1beta1.PullPolicy{TimeoutSeconds: number(int32(30)), BackoffLimit: number(int32(0))},
		ImagePullPolicy: "Always",
	})
	job.Annotations = map[string]string{v1beta1.PinForAnnotation: "0s"}
	s, err := spec.Of(job)
	if err != nil {
		t.Fatal(err)
	}
	if r := s.Request; r.GetMaxAttempts() != 1 || r.GetAttemptTimeout().AsDuration() != 30*time.Second || r.GetPinFor().
		AsDuration() != 0 || r.GetPolicy() != opsv1.PullPolicy_PULL_POLICY_ALWAYS {
		t.Errorf("%v", r)
	}
	job.Spec.PullPolicy = &v1beta1.PullPolicy{TimeoutSeconds: number(int32(-1)), BackoffLimit: number(int32(-1))}
	if s, _ = spec.Of(job); s.Request.GetMaxAttempts() != 4 || s.Request.GetAttemptTimeout().
		AsDuration() != 10*time.Minute {
		t.Errorf("of negative numbers: %v", s.Request)
	}
	for key, values := range map[string][]string{v1beta1.PinForAnnotation: {"", "x", "-1s", "745h"},
		v1beta1.BytesPerSecondAnnotation: {"", "fast", "-1"}} {
		for _, value := range values {
			job.Annotations = map[string]string{key: value}
			if _, err := spec.Of(job); err == nil || !strings.Contains(err.Error(), key) {
				t.Errorf("%s: %q: error %v", key, value, err)
			}
		}
	}
}

func TestParallelism(t *testing.T) {
	for _, tt := range []struct {
		given string
		nodes int
		want  int
	}{{"10%", 25, 3}, {"100%", 7, 7}, {"0%", 7, 0}, {"1%", 1, 1}, {"4", 2, 4}} {
		given := intstr.FromString(tt.given)
		s, err := spec.Of(jobOf("a", template{Parallelism: &given}))
		if err != nil {
			t.Fatal(err)
		}
		s.Nodes = make([]spec.Target, tt.nodes)
		if got := s.Parallelism(); got != tt.want {
			t.Errorf("%s of %d nodes: %d, want %d", tt.given, tt.nodes, got, tt.want)
		}
	}
}

func TestSameImage(t *testing.T) {
	digest := "@sha256:" + strings.Repeat("0a", 32)
	for _, tt := range []struct {
		a, b string
		same bool
	}{
		{"nginx", "docker.io/library/nginx:latest", true}, {"nginx:1", "docker.io/library/nginx:1", true},
		{"nginx:1" + digest, "docker.io/library/nginx" + digest, true},
		{"nginx", "nginx:1", false}, {"nginx:1", "nginx" + digest, false}, {"a/nginx", "nginx", false},
		{"Nginx", "Nginx", true},
	} {
		if spec.SameImage(tt.a, tt.b) != tt.same {
			t.Errorf("%s and %s", tt.a, tt.b)
		}
	}
}

// The deadline that a node gets follows from the job.
func TestDeadlineOfRequest(t *testing.T) {
	const queueAllowance, maxSpan = 6 * time.Hour, 31 * 24 * time.Hour
	for name, tt := range map[string]struct {
		attempts, timeout int32
		policy            v1beta1.CompletionPolicy
		want              time.Duration
	}{
		"one attempt": {1, 60, v1beta1.CompletionPolicy{}, time.Minute + queueAllowance},
		"four":        {4, 60, v1beta1.CompletionPolicy{}, 4*time.Minute + 7*time.Second + queueAllowance},
		"seven": {7, 60, v1beta1.CompletionPolicy{}, 7*time.Minute + (1+2+4+8+16+30)*time.Second +
			queueAllowance},
		"the most": {100, 31 * 24 * 3600, v1beta1.CompletionPolicy{}, maxSpan},
		"the job's": {4, 60,
			v1beta1.CompletionPolicy{Type: v1beta1.Always, ActiveDeadlineSeconds: number(int64(90))}, 90 * time.Second},
		"the job's is longer": {1, 60,
			v1beta1.CompletionPolicy{Type: v1beta1.Always, ActiveDeadlineSeconds: number(int64(1e12))},
			time.Minute + queueAllowance},
		"never ends": {1, 60,
			v1beta1.CompletionPolicy{Type: v1beta1.Never, ActiveDeadlineSeconds: number(int64(90))},
			time.Minute + queueAllowance},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := spec.Of(jobOf("a", template{
				PullPolicy: &v1beta1.PullPolicy{TimeoutSeconds: &tt.timeout,
					BackoffLimit: number(tt.attempts - 1)},
				CompletionPolicy: tt.policy,
			}))
			if err != nil {
				t.Fatal(err)
			}
			if got := s.Request.GetDeadline().AsDuration(); got != tt.want {
				t.Errorf("deadline %s, want %s", got, tt.want)
			}
		})
	}
}
