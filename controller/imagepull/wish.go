// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/distribution/reference"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

const (
	defaultPin = 24 * time.Hour
	// maxSpan is the longest duration a node takes.
	maxSpan = 31 * 24 * time.Hour
	// maxAttempts is the most a node takes.
	maxAttempts     = 100
	defaultTimeout  = 600 * time.Second
	defaultAttempts = 4
)

// wish is what a job wants of its nodes.
type wish struct {
	job types.NamespacedName
	uid types.UID
	// request lacks the UID and the credentials.
	request *opsv1.PullRequest
	// work and params are hashes of the request: what is to be on the node, and how it gets there. The UID of a pull is
	// job UID, work, params and round.
	work, params string
	parallelism  intstr.IntOrString
	never        bool
	secrets      []string
	// asked says that the job names the time for which the image is pinned.
	asked bool
	// shortened says that the cluster bounds the time for which the image is pinned.
	shortened string
	// begun is the job's startTime: a failure of before does not count.
	begun time.Time
	// nodes in the order of their turn.
	nodes []target
}

// Limits bound what image jobs may ask of all nodes, whoever makes them. The zero value bounds nothing.
type Limits struct {
	// PinFor is the longest time for which a job keeps an image on a node after it has been pulled.
	PinFor time.Duration
	// PinPercent is how much of a node's image file system the pins of all jobs may hold, in percent.
	PinPercent int32
}

// bound keeps the wish to the limits.
func (w *wish) bound(l Limits) {
	r := w.request
	if asked := r.GetPinFor().AsDuration(); l.PinFor > 0 && asked > l.PinFor {
		r.PinFor = durationpb.New(l.PinFor)
		if w.asked { // nobody misses a part of the default
			w.shortened = fmt.Sprintf("pinned for %s and not for %s, which is more than this cluster allows (--image-pin-max of cri-controller)", l.PinFor, asked)
		}
	}
	r.PinPercent = l.PinPercent
	w.params = paramsOf(r)
}

func paramsOf(r *opsv1.PullRequest) string {
	if percent := r.GetPinPercent(); percent > 0 {
		return hash(r.MaxAttempts, r.AttemptTimeout.AsDuration(), r.Deadline.AsDuration(), r.BytesPerSecond, r.PinFor.AsDuration(), percent)
	}
	return hash(r.MaxAttempts, r.AttemptTimeout.AsDuration(), r.Deadline.AsDuration(), r.BytesPerSecond, r.PinFor.AsDuration())
}

// target is a node of a job.
type target struct {
	node nodes.Node
	// ready says that the node is; else reason and message say why not.
	ready           bool
	reason, message string
}

// specError is what the user has to correct in a job.
type specError = apierror.SpecError

func wrong(format string, args ...any) error {
	return &specError{Message: fmt.Sprintf(format, args...)}
}

// wishOf reads the job. The error is a *specError.
func wishOf(job *v1beta1.ImagePullJob) (*wish, error) {
	s := &job.Spec
	w := &wish{
		job: types.NamespacedName{Namespace: job.Namespace, Name: job.Name}, uid: job.UID,
		parallelism: intstr.FromInt32(1), never: s.CompletionPolicy.Type == v1beta1.Never, secrets: s.PullSecrets,
	}
	if s.Parallelism != nil {
		w.parallelism = *s.Parallelism
	}
	if job.Status.StartTime != nil {
		w.begun = job.Status.StartTime.Time
	}
	if _, err := reference.ParseDockerRef(s.Image); err != nil {
		return nil, wrong("image %q is no image reference (%s): it must be [REGISTRY[:PORT]/]NAME[:TAG][@DIGEST], as in a pod", s.Image, err)
	}
	r := &opsv1.PullRequest{
		Image: s.Image, Policy: opsv1.PullPolicy_PULL_POLICY_IF_NOT_PRESENT, Owner: owner(job),
		MaxAttempts: defaultAttempts, PinFor: durationpb.New(defaultPin),
	}
	if s.ImagePullPolicy != "" && s.ImagePullPolicy != v1beta1.PullIfNotPresent {
		r.Policy = opsv1.PullPolicy_PULL_POLICY_ALWAYS
	}
	if c := s.SandboxConfig; c != nil {
		r.SandboxLabels, r.SandboxAnnotations = c.Labels, c.Annotations
	}
	timeout := defaultTimeout
	if p := s.PullPolicy; p != nil {
		if p.BackoffLimit != nil && *p.BackoffLimit >= 0 {
			r.MaxAttempts = min(*p.BackoffLimit, maxAttempts-1) + 1
		}
		if p.TimeoutSeconds != nil && *p.TimeoutSeconds > 0 {
			timeout = min(time.Duration(*p.TimeoutSeconds)*time.Second, maxSpan)
		}
	}
	r.AttemptTimeout = durationpb.New(timeout)
	r.Deadline = deadlineOf(job, r)
	if text, ok := job.Annotations[v1beta1.PinForAnnotation]; ok {
		d, err := time.ParseDuration(text)
		if err != nil || d < 0 || d > maxSpan {
			return nil, wrong("annotation %s is %q: it must be a duration from 0s to 744h, such as 36h", v1beta1.PinForAnnotation, text)
		}
		r.PinFor, w.asked = durationpb.New(d), true
	}
	if text, ok := job.Annotations[v1beta1.BytesPerSecondAnnotation]; ok {
		q, err := resource.ParseQuantity(text)
		if err != nil || q.Sign() < 0 || q.Value() == math.MaxInt64 {
			return nil, wrong("annotation %s is %q: it must be a quantity of bytes, such as 20Mi", v1beta1.BytesPerSecondAnnotation, text)
		}
		r.BytesPerSecond = q.Value()
	}
	w.request = r
	w.work = hash(r.Image, r.Policy, r.SandboxLabels, r.SandboxAnnotations)
	w.params = paramsOf(r)
	return w, nil
}

// owner is whose the pulls and pins of a job are.
func owner(job *v1beta1.ImagePullJob) string {
	return fmt.Sprintf("ImagePullJob/%s/%s/%s", job.Namespace, job.Name, job.UID)
}

// observedWork identifies what a job is about, as opposed to how it goes about it.
func observedWork(job *v1beta1.ImagePullJob) string {
	s := &job.Spec
	return hash(s.Image, s.ImagePullPolicy, s.SandboxConfig, s.Selector, s.PodSelector)
}

// observedEffort identifies how a job goes about its work, and when it ends: what may be changed to make a success of a failure.
func observedEffort(job *v1beta1.ImagePullJob) string {
	s := &job.Spec
	return hash(s.PullSecrets, s.Parallelism, s.PullPolicy, s.CompletionPolicy.Type, s.CompletionPolicy.ActiveDeadlineSeconds,
		job.Annotations[v1beta1.PinForAnnotation], job.Annotations[v1beta1.BytesPerSecondAnnotation])
}

// beginsAnew says that a job which has ended was changed since so that it is to begin again: it is about something else, or has failed and
// may not fail now. One that ended under another controller stays as it is.
func beginsAnew(job *v1beta1.ImagePullJob) bool {
	s := &job.Status
	switch {
	case s.ObservedWork == "":
		return false
	case s.ObservedWork != observedWork(job):
		return true
	}
	return meta.IsStatusConditionFalse(s.Conditions, v1beta1.ConditionSucceeded) && s.ObservedEffort != "" && s.ObservedEffort != observedEffort(job)
}

func hash(parts ...any) string {
	b, err := json.Marshal(parts)
	if err != nil {
		return "unhashable" // never: all parts are plain data
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:5])
}

// pullUID is what the node calls a pull. Rounds are pulls of the same kind after another.
func (w *wish) pullUID(round int) string {
	uid := string(w.uid) + "." + w.work + "." + w.params
	if round > 0 {
		uid += "." + strconv.Itoa(round)
	}
	return uid
}

// parse says whether a pull is the job's, and what it is about.
func (w *wish) parse(uid string) (work, params string, round int, ok bool) {
	rest, ok := strings.CutPrefix(uid, string(w.uid)+".")
	parts := strings.Split(rest, ".")
	if !ok || len(parts) < 2 || len(parts) > 3 {
		return "", "", 0, false
	}
	if len(parts) == 3 {
		var err error
		if round, err = strconv.Atoi(parts[2]); err != nil {
			return "", "", 0, false
		}
	}
	return parts[0], parts[1], round, true
}

func (w *wish) pullRequest(round int, credentials []*opsv1.RegistryCredential) *opsv1.PullRequest {
	r := proto.Clone(w.request).(*opsv1.PullRequest)
	r.Uid, r.Credentials = w.pullUID(round), credentials
	return r
}

// limit is how many nodes may pull at once.
func (w *wish) limit() int {
	if w.parallelism.Type == intstr.Int {
		return max(w.parallelism.IntValue(), 0)
	}
	if text, ok := strings.CutSuffix(w.parallelism.StrVal, "%"); ok {
		percent, err := strconv.Atoi(text)
		if err != nil {
			return 1
		}
		return (len(w.nodes)*percent + 99) / 100
	}
	n, err := strconv.Atoi(w.parallelism.StrVal)
	if err != nil {
		return 1
	}
	return max(n, 0)
}

// renewEvery is how often a job of type Never makes sure that a node still has the image: while it is pinned, or daily.
func (w *wish) renewEvery() time.Duration {
	if pin := w.request.GetPinFor().AsDuration(); pin > 0 {
		return pin * 3 / 4
	}
	return defaultPin
}

// inTurn sorts nodes: the same for a job every time, and different from job to job, so that jobs that begin together do
// not all begin with the same node.
func inTurn(uid types.UID, nodes []target) {
	turn := func(t target) uint64 {
		h := fnv.New64a()
		_, _ = h.Write([]byte(string(uid) + "/" + t.node.Name)) // never fails
		// The last bytes reach the high bits of FNV only through this.
		x := h.Sum64()
		x ^= x >> 33
		x *= 0xff51afd7ed558ccd
		x ^= x >> 33
		return x
	}
	turns := make(map[string]uint64, len(nodes))
	for _, n := range nodes {
		turns[n.node.Name] = turn(n)
	}
	slices.SortFunc(nodes, func(a, b target) int {
		x, y := turns[a.node.Name], turns[b.node.Name]
		switch {
		case x < y:
			return -1
		case x > y:
			return 1
		}
		return strings.Compare(a.node.Name, b.node.Name)
	})
}

func emptySelector(s *metav1.LabelSelector) bool {
	return s == nil || len(s.MatchLabels) == 0 && len(s.MatchExpressions) == 0
}
