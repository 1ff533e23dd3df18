// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package evaluate

import (
	"cmp"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/objects"
)

// rollbackSuffix makes the revision of a rollback from the revision that failed.
const rollbackSuffix = "-undo"

// besideMax is the longest time for which nodes let the old and the new container run side by side.
const besideMax = time.Hour

// Goal says what the pods of a rollout have to become.
type Goal struct {
	Rollout  types.UID
	Revision string
	// Images are the images by container, Restarts the containers to restart.
	Images   map[string]string
	Restarts []string
	// Undo says that this is a rollback: pods that were changed after Since go back to the images
	// that they had before. If the target is a workload, the other pods get the images of its
	// template.
	Undo, workload bool
	since          time.Time
	// tags says that containers which have their image already have to be checked: the tag may name
	// another image by now.
	tags bool
}

// Strategy is the strategy of the spec with its defaults filled in.
type Strategy struct {
	MaxUnavailable, Partition intstr.IntOrString
	StartFirst                bool
	Drain, MinReady, Deadline time.Duration
	OnFailure                 inplace.FailurePolicy
	Grace                     *int64
}

// GoalOf returns the goal of the spec.
func GoalOf(r *inplace.InPlaceRollout) Goal {
	// A rollout that follows a template names containers that nobody has asked for.
	g := Goal{Rollout: r.UID, Revision: RevisionOf(r), Images: map[string]string{},
		tags: metav1.GetControllerOf(r) == nil}
	for _, c := range r.Spec.Containers {
		if c.Image == "" {
			g.Restarts = append(g.Restarts, c.Name)
		} else {
			g.Images[c.Name] = c.Image
		}
	}
	return g
}

// Rollback returns the goal after a failure.
func (g Goal) Rollback(status *inplace.InPlaceRolloutStatus, workload bool) Goal {
	u := Goal{Rollout: g.Rollout, Revision: g.Revision + rollbackSuffix, Images: map[string]string{}, Undo: true,
		workload: workload}
	for name := range g.Images {
		if image := status.PreviousImages[name]; image != "" {
			u.Images[name] = image
		}
	}
	if t := status.LastSuccessTime; t != nil {
		u.since = t.Time
	}
	return u
}

// ForPod returns the goal of one pod.
func (g Goal) ForPod(m *InPlaceState) Goal {
	if !g.Undo {
		return g
	}
	own := g
	own.Images = map[string]string{}
	if g.workload {
		maps.Copy(own.Images, g.Images)
	}
	if m != nil && m.Rollout == g.Rollout && m.Time.After(g.since) {
		for name, was := range m.Containers {
			if was.Base != "" {
				own.Images[name] = was.Base
			}
		}
	}
	return own
}

// RevisionOf returns a hash of what a rollout wants. It is in statuses, annotations and operation
// UIDs: it must stay the same from version to version.
func RevisionOf(r *inplace.InPlaceRollout) string {
	list := slices.Clone(r.Spec.Containers)
	slices.SortFunc(list, func(a, b inplace.ContainerChange) int { return cmp.Compare(a.Name, b.Name) })
	if at := r.Annotations[RestartedAt]; at != "" {
		return objects.Hash(list, r.Annotations[inplace.RetryAnnotation], at)
	}
	return objects.Hash(list, r.Annotations[inplace.RetryAnnotation])
}

// StrategyOf fills in the defaults.
func StrategyOf(s *inplace.Strategy) Strategy {
	seconds := func(n int32) time.Duration { return time.Duration(n) * time.Second }
	t := Strategy{
		MaxUnavailable: intstr.FromInt32(1), Partition: intstr.FromInt32(0), StartFirst: s.Order == inplace.StartFirst,
		Drain: seconds(s.DrainSeconds), MinReady: seconds(s.MinReadySeconds),
		Deadline:  seconds(s.ProgressDeadlineSeconds),
		OnFailure: s.OnFailure, Grace: s.TerminationGracePeriodSeconds,
	}
	if s.MaxUnavailable != nil {
		t.MaxUnavailable = *s.MaxUnavailable
	}
	if s.Partition != nil {
		t.Partition = *s.Partition
	}
	if t.Deadline <= 0 {
		t.Deadline = 600 * time.Second
	}
	if t.OnFailure == "" {
		t.OnFailure = inplace.Rollback
	}
	return t
}

// Honour takes the workload's own minReadySeconds into account: the longer one counts.
func (s *Strategy) Honour(minReady time.Duration) {
	if minReady <= s.MinReady {
		return
	}
	s.MinReady = minReady
	if s.Deadline <= s.MinReady+s.Drain {
		s.Deadline += s.MinReady // else no pod could be in time
	}
}

// BesideSeconds is how long the new container runs beside the old one with StartFirst.
func (s *Strategy) BesideSeconds() int32 { return int32(min(s.MinReady, besideMax) / time.Second) }

// Resolve returns the number that n is of total. Percentages are rounded up or down.
func Resolve(n intstr.IntOrString, total int, up bool) int {
	if n.Type == intstr.Int {
		return max(n.IntValue(), 0)
	}
	percent, err := strconv.Atoi(strings.TrimSuffix(n.StrVal, "%"))
	if err != nil {
		return 0 // the schema lets nothing else through
	}
	part := total * percent
	if up {
		part += 99
	}
	return part / 100
}

// UnavailableLimit is how many of the pods may be unavailable; at least one.
func (s *Strategy) UnavailableLimit(desired int) int {
	return max(Resolve(s.MaxUnavailable, desired, false), 1)
}

// OperationUID returns the UID of a node's operation. The same work on the same containers has the
// same UID, whoever asks for it.
func OperationUID(kind string, g Goal, pod *corev1.Pod, containers map[string]string, round int) string {
	uid := string(g.Rollout) + "." + kind + "." + string(pod.UID) + "." + objects.Hash(g.Revision, containers, round)
	if len(uid) > 128 {
		uid = kind + "." + objects.Hash(uid) + "." + objects.Hash(containers, uid)
	}
	return uid
}

// OwnerOf names a rollout to nodes: as the owner of pins, and as the requester of operations.
func OwnerOf(r *inplace.InPlaceRollout) string {
	return "InPlaceRollout/" + r.Namespace + "/" + r.Name + "/" + string(r.UID)
}

// RestartedAt is the annotation of a template that kubectl rollout restart changes.
const RestartedAt = "kubectl.kubernetes.io/restartedAt"
