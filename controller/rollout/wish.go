// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
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
)

// rollbackSuffix makes the revision of a rollback from the revision that failed.
const rollbackSuffix = "-undo"

// besideMax is the longest time for which nodes let the old and the new container run side by side.
const besideMax = time.Hour

// goal says what the pods of a rollout have to become.
type goal struct {
	rollout  types.UID
	revision string
	// images are the images by container, restarts the containers to restart.
	images   map[string]string
	restarts []string
	// undo says that this is a rollback: pods that were changed after since go back to the images that they had before. If
	// the target is a workload, the other pods get the images of its template.
	undo, workload bool
	since          time.Time
	// tags says that containers which have their image already have to be checked: the tag may name another image by now.
	tags bool
}

// strategy is the strategy of the spec with its defaults filled in.
type strategy struct {
	maxUnavailable, partition intstr.IntOrString
	startFirst                bool
	drain, minReady, deadline time.Duration
	onFailure                 inplace.FailurePolicy
	grace                     *int64
}

// goalOf returns the goal of the spec.
func goalOf(r *inplace.InPlaceRollout) goal {
	// A rollout that follows a template names containers that nobody has asked for.
	g := goal{rollout: r.UID, revision: revisionOf(r), images: map[string]string{}, tags: metav1.GetControllerOf(r) == nil}
	for _, c := range r.Spec.Containers {
		if c.Image == "" {
			g.restarts = append(g.restarts, c.Name)
		} else {
			g.images[c.Name] = c.Image
		}
	}
	return g
}

// Rollback returns the goal after a failure.
func (g goal) undoing(status *inplace.InPlaceRolloutStatus, workload bool) goal {
	u := goal{rollout: g.rollout, revision: g.revision + rollbackSuffix, images: map[string]string{}, undo: true, workload: workload}
	for name := range g.images {
		if image := status.PreviousImages[name]; image != "" {
			u.images[name] = image
		}
	}
	if t := status.LastSuccessTime; t != nil {
		u.since = t.Time
	}
	return u
}

// ForPod returns the goal of one pod.
func (g goal) of(m *mark) goal {
	if !g.undo {
		return g
	}
	own := g
	own.images = map[string]string{}
	if g.workload {
		maps.Copy(own.images, g.images)
	}
	if m != nil && m.Rollout == g.rollout && m.Time.After(g.since) {
		for name, was := range m.Containers {
			if was.Base != "" {
				own.images[name] = was.Base
			}
		}
	}
	return own
}

// revisionOf returns a hash of what a rollout wants. It is in statuses, annotations and operation UIDs: it must stay the same from
// version to version.
func revisionOf(r *inplace.InPlaceRollout) string {
	list := slices.Clone(r.Spec.Containers)
	slices.SortFunc(list, func(a, b inplace.ContainerChange) int { return cmp.Compare(a.Name, b.Name) })
	if at := r.Annotations[restartedAt]; at != "" {
		return hash(list, r.Annotations[inplace.RetryAnnotation], at)
	}
	return hash(list, r.Annotations[inplace.RetryAnnotation])
}

func strategyOf(s *inplace.Strategy) strategy {
	seconds := func(n int32) time.Duration { return time.Duration(n) * time.Second }
	t := strategy{
		maxUnavailable: intstr.FromInt32(1), partition: intstr.FromInt32(0), startFirst: s.Order == inplace.StartFirst,
		drain: seconds(s.DrainSeconds), minReady: seconds(s.MinReadySeconds), deadline: seconds(s.ProgressDeadlineSeconds),
		onFailure: s.OnFailure, grace: s.TerminationGracePeriodSeconds,
	}
	if s.MaxUnavailable != nil {
		t.maxUnavailable = *s.MaxUnavailable
	}
	if s.Partition != nil {
		t.partition = *s.Partition
	}
	if t.deadline <= 0 {
		t.deadline = 600 * time.Second
	}
	if t.onFailure == "" {
		t.onFailure = inplace.Rollback
	}
	return t
}

// honour takes the workload's own minReadySeconds into account: the longer one counts.
func (s *strategy) honour(minReady time.Duration) {
	if minReady <= s.minReady {
		return
	}
	s.minReady = minReady
	if s.deadline <= s.minReady+s.drain {
		s.deadline += s.minReady // else no pod could be in time
	}
}

// besideSeconds is how long the new container runs beside the old one with StartFirst.
func (s *strategy) besideSeconds() int32 { return int32(min(s.minReady, besideMax) / time.Second) }

// resolve returns the number that n is of total. Percentages are rounded up or down.
func resolve(n intstr.IntOrString, total int, up bool) int {
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

// unavailableLimit is how many of the pods may be unavailable; at least one.
func (s *strategy) unavailableLimit(desired int) int {
	return max(resolve(s.maxUnavailable, desired, false), 1)
}

// operationUID returns the UID of a node's operation. The same work on the same containers has the same UID, whoever asks for it.
func operationUID(kind string, g goal, pod *corev1.Pod, containers map[string]string, round int) string {
	uid := string(g.rollout) + "." + kind + "." + string(pod.UID) + "." + hash(g.revision, containers, round)
	if len(uid) > 128 {
		uid = kind + "." + hash(uid) + "." + hash(containers, uid)
	}
	return uid
}

func hash(parts ...any) string {
	b, err := json.Marshal(parts)
	if err != nil {
		return "unhashable" // never: all parts are plain data
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:5])
}

// ownerOf names a rollout to nodes: as the owner of pins, and as the requester of operations.
func ownerOf(r *inplace.InPlaceRollout) string {
	return "InPlaceRollout/" + r.Namespace + "/" + r.Name + "/" + string(r.UID)
}

// restartedAt is the annotation of a template that kubectl rollout restart changes.
const restartedAt = "kubectl.kubernetes.io/restartedAt"
