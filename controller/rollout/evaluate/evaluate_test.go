// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package evaluate_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
)

// setReadiness sets the conditions ContainersReady and Ready of a pod, as kubelet would with its
// gates as they are.
func setReadiness(pod *corev1.Pod, containers bool) {
	set := func(kind corev1.PodConditionType, is bool) {
		status := corev1.ConditionFalse
		if is {
			status = corev1.ConditionTrue
		}
		for i := range pod.Status.Conditions {
			if c := &pod.Status.Conditions[i]; c.Type == kind {
				c.Status = status
				return
			}
		}
		pod.Status.Conditions = append(pod.Status.Conditions, corev1.PodCondition{Type: kind, Status: status})
	}
	set(corev1.ContainersReady, containers)
	ready := containers
	for _, g := range pod.Spec.ReadinessGates {
		ready = ready && slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
			return c.Type == g.ConditionType && c.Status == corev1.ConditionTrue
		})
	}
	set(corev1.PodReady, ready)
}

func TestJudge(t *testing.T) {
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	ago := func(d time.Duration) metav1.Time { return metav1.NewTime(now.Add(-d)) }
	g := evaluate.Goal{Rollout: "r", Revision: "rev", Images: map[string]string{"app": "app:2"}}
	changed := func(d time.Duration) *evaluate.InPlaceState {
		return &evaluate.InPlaceState{Rollout: "r", Revision: "rev", Operation: "op",
			Time: metav1.NewMicroTime(now.Add(-d)),
			Containers: map[string]evaluate.Previous{"app": {Image: "app:1", Base: "app:1", ID: "c://1",
				ImageID: "i1"}}}
	}
	of := func(m *evaluate.InPlaceState, rollout types.UID) *evaluate.InPlaceState {
		m.Rollout = rollout
		return m
	}
	image := func(image string) func(*corev1.Pod) {
		return func(p *corev1.Pod) { p.Spec.Containers[0].Image = image }
	}
	container := func(id, imageID, name string, state corev1.ContainerState) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "app", ContainerID: id, ImageID: imageID,
				Image: name, State: state}}
		}
	}
	running := func(d time.Duration) corev1.ContainerState {
		return corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: ago(d)}}
	}
	waiting := func(reason, message string) corev1.ContainerState {
		return corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}}
	}
	ready := func(is bool, d time.Duration) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			setReadiness(p, is)
			for i := range p.Status.Conditions {
				p.Status.Conditions[i].LastTransitionTime = ago(d)
			}
		}
	}
	shut := func(p *corev1.Pod) {
		p.Spec.ReadinessGates = []corev1.PodReadinessGate{{ConditionType: inplace.ReadyGate}}
		p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: inplace.ReadyGate,
			Status: corev1.ConditionFalse, Reason: "InPlaceRollout", Message: "r x"})
		setReadiness(p, true)
	}
	finished := &opsv1.Operation{FinishTime: timestamppb.New(now), Phase: opsv1.Phase_PHASE_SUCCEEDED}
	successor := &opsv1.Operation{Containers: []*opsv1.ContainerOperation{{Name: "app", SuccessorId: "2"}}}
	tests := []struct {
		name     string
		mark     *evaluate.InPlaceState
		k        evaluate.PodFacts
		pod      []func(*corev1.Pod)
		minReady time.Duration
		stage    evaluate.Stage
		flags    string // a available, d disrupted, o open, q ask
		reason   string
	}{
		{"untouched", nil, evaluate.PodFacts{}, nil, 0, evaluate.Outdated, "a", ""},
		{"untouched, its turn", nil, evaluate.PodFacts{Updating: true}, nil, 0, evaluate.Outdated, "ad", ""},
		{"out of service", nil, evaluate.PodFacts{}, []func(*corev1.Pod){shut}, 0, evaluate.Outdated, "d", ""},
		{"failed before anything was touched", nil,
			evaluate.PodFacts{Failed: &evaluate.Failure{Reason: "NotFound", Message: "no"}}, []func(*corev1.Pod){shut},
			0, evaluate.Broken, "do", "NotFound"},
		{"has the image from the beginning", nil, evaluate.PodFacts{}, []func(*corev1.Pod){image("app:2")}, 0,
			evaluate.Updated, "a", ""},
		{"is a static pod", nil, evaluate.PodFacts{},
			[]func(*corev1.Pod){
				func(p *corev1.Pod) { p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "x"} }}, 0,
			evaluate.Broken, "a", "StaticPod"},
		{"written, kubelet has not acted", changed(time.Second), evaluate.PodFacts{},
			[]func(*corev1.Pod){image("app:2")}, 0, evaluate.Updating, "adq", ""},
		{"new, not ready", changed(5 * time.Second), evaluate.PodFacts{Answered: true},
			[]func(*corev1.Pod){image("app:2"), container("c://2", "i2", "app:2", running(time.Second)),
				ready(false, time.Second)}, 0, evaluate.Updating, "", ""},
		{"new and ready", changed(5 * time.Second), evaluate.PodFacts{Updating: true},
			[]func(*corev1.Pod){image("app:2"), container("c://2", "i2", "app:2", running(time.Second)),
				ready(true, time.Second)}, 0, evaluate.Updated, "a", ""},
		{"new and ready, not for long", changed(5 * time.Second), evaluate.PodFacts{Answered: true},
			[]func(*corev1.Pod){image("app:2"), container("c://2", "i2", "app:2", running(time.Second)),
				ready(true, time.Hour)}, 10 * time.Second, evaluate.Updating, "", ""},
		{"new and ready, out of service", changed(5 * time.Second), evaluate.PodFacts{Answered: true},
			[]func(*corev1.Pod){image("app:2"), container("c://2", "i2", "app:2", running(time.Second)),
				ready(true, time.Second), shut}, 0, evaluate.Updating, "do", ""},
		{"another ID, the same image ID: not asked", changed(5 * time.Second), evaluate.PodFacts{},
			[]func(*corev1.Pod){image("app:2"), container("c://2", "i1", "app:1", running(time.Second))}, 0,
			evaluate.Updating, "adq", ""},
		{"another ID, the same image ID: the operation goes on", changed(5 * time.Second),
			evaluate.PodFacts{Answered: true, Op: &opsv1.Operation{}},
			[]func(*corev1.Pod){image("app:2"), container("c://2", "i1", "app:1", running(time.Second))}, 0,
			evaluate.Updating, "ad", ""},
		{"another ID, the same image ID: the successor's", changed(5 * time.Second),
			evaluate.PodFacts{Answered: true, Op: successor}, []func(*corev1.Pod){image("app:2"),
				container("c://2", "i1", "app:1", running(time.Second))}, 0, evaluate.Updated, "a", ""},
		{"another ID, the same image ID: the operation has ended", changed(5 * time.Second),
			evaluate.PodFacts{Answered: true, Op: finished}, []func(*corev1.Pod){image("app:2"),
				container("c://3", "i1", "app:1", running(time.Second))}, 0, evaluate.Updated, "a", ""},
		{"the new one ended", changed(5 * time.Second), evaluate.PodFacts{Answered: true},
			[]func(*corev1.Pod){image("app:2"), container("c://2", "i2", "app:2",
				corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 3}}), ready(false,
				0)}, 0, evaluate.Broken, "", "ContainerExited"},
		{"the new one ended and runs again", changed(5 * time.Second), evaluate.PodFacts{Answered: true},
			[]func(*corev1.Pod){image("app:2"), container("c://3", "i2", "app:2", running(time.Second)),
				func(p *corev1.Pod) {
					p.Status.ContainerStatuses[0].LastTerminationState.Terminated = &corev1.ContainerStateTerminated{
						ContainerID: "c://2", StartedAt: ago(4 * time.Second), FinishedAt: ago(2 * time.Second)}
				}, ready(false, 0)}, 0, evaluate.Broken, "", "ContainerCrashed"},
		{"the old one was in a crash loop", changed(time.Second), evaluate.PodFacts{Answered: true},
			[]func(*corev1.Pod){image("app:2"), container("c://1", "i1", "app:1",
				waiting("CrashLoopBackOff", "back-off")), ready(false, time.Hour)}, 0, evaluate.Updating, "d", ""},
		{"the new one is in a crash loop", changed(time.Minute), evaluate.PodFacts{Answered: true},
			[]func(*corev1.Pod){image("app:2"), container("c://2", "i2", "app:2",
				waiting("CrashLoopBackOff", "back-off")), ready(false,
				time.Minute)}, 0, evaluate.Broken, "", "CrashLoopBackOff"},
		{"the old image could not be pulled", changed(time.Second), evaluate.PodFacts{Answered: true},
			[]func(*corev1.Pod){image("app:2"), container("", "", "app:1",
				waiting("ImagePullBackOff", `Back-off pulling image "app:1"`)), ready(false,
				time.Hour)}, 0, evaluate.Updating, "d", ""},
		{"the new image cannot be pulled", changed(time.Second), evaluate.PodFacts{Answered: true},
			[]func(*corev1.Pod){image("app:2"), container("c://1", "i1", "app:2",
				waiting("ImagePullBackOff", `Back-off pulling image "app:2"`)), ready(false,
				0)}, 0, evaluate.Broken, "d", "ImagePullBackOff"},
		{"not ready in time", changed(11 * time.Minute), evaluate.PodFacts{Answered: true},
			[]func(*corev1.Pod){image("app:2"), container("c://2", "i2", "app:2", running(10*time.Minute)),
				ready(false, 11*time.Minute)}, 0, evaluate.Broken, "", "ProgressDeadlineExceeded"},
		{"was ready after it, and is not now", changed(11 * time.Minute), evaluate.PodFacts{Answered: true},
			[]func(*corev1.Pod){image("app:2"), container("c://2", "i2", "app:2", running(10*time.Minute)),
				ready(false, time.Minute)}, 0, evaluate.Updated, "", ""},
		{"was available as far as is known", changed(11 * time.Minute),
			evaluate.PodFacts{Answered: true, Settled: true}, []func(*corev1.Pod){image("app:2"),
				container("c://2", "i2", "app:2", running(time.Second)), ready(false,
					11*time.Minute)}, 0, evaluate.Updated, "", ""},
		{"another's mark, kubelet has not acted", of(changed(time.Hour), "x"), evaluate.PodFacts{},
			[]func(*corev1.Pod){image("app:2")}, 0, evaluate.Updated, "ad", ""},
		{"another's mark, the same content", of(changed(time.Minute), "x"), evaluate.PodFacts{},
			[]func(*corev1.Pod){image("app:2"), container("c://2", "i1", "app:1", running(time.Second))}, 0,
			evaluate.Updated, "a", ""},
		{"another's mark, the same content, just now", of(changed(time.Second), "x"), evaluate.PodFacts{},
			[]func(*corev1.Pod){image("app:2"), container("c://2", "i1", "app:1", running(time.Second))}, 0,
			evaluate.Updated, "ad", ""},
		{"another's mark, taken back", of(changed(time.Minute), "x"), evaluate.PodFacts{Rested: true}, nil, 0,
			evaluate.Outdated, "a", ""},
		{"another's mark, the node may restart it", of(changed(time.Minute), "x"), evaluate.PodFacts{}, nil, 0,
			evaluate.Outdated, "ad", ""},
		{"made anew with a bad image", nil, evaluate.PodFacts{}, []func(*corev1.Pod){image("app:2"),
			func(p *corev1.Pod) { p.CreationTimestamp = ago(time.Minute) },
			container("c://2", "i2", "app:2", waiting("CrashLoopBackOff", "")),
			ready(false, time.Minute)}, 0, evaluate.Broken, "", "CrashLoopBackOff"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			pod := &corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{Name: "p", CreationTimestamp: ago(2 * time.Hour)},
				Spec: corev1.PodSpec{NodeName: "n",
					Containers: []corev1.Container{{Name: "app", Image: "app:1"}}},
			}
			container("c://1", "i1", "app:1", running(time.Hour))(pod)
			ready(true, time.Hour)(pod)
			for _, f := range tt.pod {
				f(pod)
			}
			tt.k.Begun = now.Add(-time.Hour)
			v := evaluate.Pod(pod, tt.mark, g, tt.k, &evaluate.Strategy{Deadline: 10 * time.Minute,
				MinReady: tt.minReady}, now)
			flags := ""
			for _, f := range []struct {
				is   bool
				name string
			}{{v.Available, "a"}, {v.Disrupted, "d"}, {v.Open, "o"}, {v.Ask, "q"}} {
				if f.is {
					flags += f.name
				}
			}
			if v.Stage != tt.stage || flags != tt.flags || v.Failure.Reason != tt.reason {
				t.Errorf("stage %d, %q, %q (%s); want %d, %q, %q", v.Stage, flags, v.Failure.Reason, v.Failure.Message,
					tt.stage, tt.flags, tt.reason)
			}
		})
	}
}

// A rollback puts back what the pod had before all that was not finished.
func TestUndo(t *testing.T) {
	since := metav1.NewMicroTime(time.Unix(100, 0))
	status := &inplace.InPlaceRolloutStatus{PreviousImages: map[string]string{"app": "app:1"}, LastSuccessTime: &since}
	g := evaluate.Goal{Rollout: "r", Revision: "rev", Images: map[string]string{"app": "app:2"}}
	of := func(at int64) *evaluate.InPlaceState {
		return &evaluate.InPlaceState{Rollout: "r", Time: metav1.NewMicroTime(time.Unix(at, 0)),
			Containers: map[string]evaluate.Previous{"app": {Base: "own:1"}}}
	}
	for _, tt := range []struct {
		name     string
		workload bool
		mark     *evaluate.InPlaceState
		want     string
	}{
		{"changed since", false, of(101), "own:1"}, {"changed before", false, of(99), ""},
		{"not changed", false, nil, ""},
		{"of a workload, not changed", true, nil, "app:1"}, {"of a workload, changed before", true, of(99), "app:1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := g.Rollback(status, tt.workload).ForPod(tt.mark).Images["app"]; got != tt.want {
				t.Errorf("back to %q, want %q", got, tt.want)
			}
		})
	}
}

// TestAccountTellsNoHookOutput: what a hook has printed may be a secret, and a rollout's status and
// Events are read by many.
func TestAccountTellsNoHookOutput(t *testing.T) {
	got := evaluate.AccountOf(&opsv1.Operation{Phase: opsv1.Phase_PHASE_FAILED,
		Containers: []*opsv1.ContainerOperation{{
			Name: "app", Phase: opsv1.Phase_PHASE_FAILED, Reason: "PostStartHookFailed",
			Message: "postStart hook failed and the new container was stopped: exited with 3: s3cret",
		}}})
	if strings.Contains(got, "s3cret") || !strings.Contains(got, "container app: the postStart hook failed") {
		t.Error(got)
	}
}
