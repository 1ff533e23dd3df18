// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package spec

import (
	"fmt"
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
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/objects"
)

const (
	defaultPin = 24 * time.Hour
	// maxSpan is the longest duration that a node accepts.
	maxSpan = 31 * 24 * time.Hour
	// maxAttempts is the highest number of attempts that a node accepts.
	maxAttempts = 100
)

// Spec is what a job asks of its nodes.
type Spec struct {
	Job types.NamespacedName
	// Request is the request for each node, without the UID and the credentials.
	Request *opsv1.PullRequest
	// Work and Params are hashes of the request: what is to be on the node, and how it gets there.
	// The UID of a pull is the job's UID, work, params and round.
	Work, Params string
	// Never says that the job never ends: it serves nodes that join later.
	Never bool
	// Secrets are the names of the job's pull secrets.
	Secrets []string
	// Shortened says that the cluster pins the image for less time than the job asks for; empty if
	// it does not.
	Shortened string
	// Begun is the job's startTime: failures from before that time do not count.
	Begun time.Time
	// Nodes are the nodes in the order in which they pull.
	Nodes []Target

	uid         types.UID
	generation  int64
	parallelism intstr.IntOrString
	// pinAsked says that the job itself names the time for which the image is pinned.
	pinAsked bool
}

// Target is a node of a job.
type Target struct {
	Node nodes.Node
	// Ready says that the node can be commanded; else Reason and Message say why not.
	Ready           bool
	Reason, Message string
}

// Limits bound what image jobs may ask of all nodes, whoever creates the jobs. The zero value
// bounds nothing.
type Limits struct {
	// PinFor is the longest time for which a job keeps an image on a node after the pull.
	PinFor time.Duration
	// PinPercent is the share of a node's image file system that the pins of all jobs may hold, in
	// percent.
	PinPercent int32
}

// Of reads a job. It leaves the nodes to Match. The error is an *apierror.SpecError.
func Of(job *v1beta1.ImagePullJob) (*Spec, error) {
	from := &job.Spec
	if _, err := reference.ParseDockerRef(from.Image); err != nil {
		return nil, apierror.Wrong("image %q is no image reference (%s): "+
			"it must be [REGISTRY[:PORT]/]NAME[:TAG][@DIGEST], as in a pod", from.Image, err)
	}
	s := OfDeleted(job)
	s.Never, s.Secrets = from.CompletionPolicy.Type == v1beta1.Never, from.PullSecrets
	if from.Parallelism != nil {
		s.parallelism = *from.Parallelism
	}
	if job.Status.StartTime != nil {
		s.Begun = job.Status.StartTime.Time
	}
	r := s.Request
	r.Policy = opsv1.PullPolicy_PULL_POLICY_IF_NOT_PRESENT
	r.MaxAttempts, r.PinFor = opsv1.DefaultAttempts, durationpb.New(defaultPin)
	if from.ImagePullPolicy != "" && from.ImagePullPolicy != v1beta1.PullIfNotPresent {
		r.Policy = opsv1.PullPolicy_PULL_POLICY_ALWAYS
	}
	if c := from.SandboxConfig; c != nil {
		r.SandboxLabels, r.SandboxAnnotations = c.Labels, c.Annotations
	}
	timeout := opsv1.DefaultAttemptTimeout
	if p := from.PullPolicy; p != nil {
		if p.BackoffLimit != nil && *p.BackoffLimit >= 0 {
			r.MaxAttempts = min(*p.BackoffLimit, maxAttempts-1) + 1
		}
		if p.TimeoutSeconds != nil && *p.TimeoutSeconds > 0 {
			timeout = min(time.Duration(*p.TimeoutSeconds)*time.Second, maxSpan)
		}
	}
	r.AttemptTimeout = durationpb.New(timeout)
	r.Deadline = deadlineOf(job, r)
	if err := s.readAnnotations(job.Annotations); err != nil {
		return nil, err
	}
	s.Work = objects.Hash(r.Image, r.Policy, r.SandboxLabels, r.SandboxAnnotations)
	s.Params = paramsOf(r)
	return s, nil
}

// readAnnotations reads how long the image is pinned and how fast it may be pulled.
func (s *Spec) readAnnotations(annotations map[string]string) error {
	if text, ok := annotations[v1beta1.PinForAnnotation]; ok {
		d, err := time.ParseDuration(text)
		if err != nil || d < 0 || d > maxSpan {
			return apierror.Wrong("annotation %s is %q: it must be a duration from 0s to 744h, such as 36h",
				v1beta1.PinForAnnotation, text)
		}
		s.Request.PinFor, s.pinAsked = durationpb.New(d), true
	}
	if text, ok := annotations[v1beta1.BytesPerSecondAnnotation]; ok {
		q, err := resource.ParseQuantity(text)
		if err != nil || q.Sign() < 0 || q.Value() == math.MaxInt64 {
			return apierror.Wrong("annotation %s is %q: it must be a quantity of bytes, such as 20Mi",
				v1beta1.BytesPerSecondAnnotation, text)
		}
		s.Request.BytesPerSecond = q.Value()
	}
	return nil
}

// OfDeleted is what is left of a job that is deleted: whose pulls and pins the nodes have to give
// up, and of which image. It cannot fail.
func OfDeleted(job *v1beta1.ImagePullJob) *Spec {
	return &Spec{
		Job: client.ObjectKeyFromObject(job), uid: job.UID, generation: job.Generation,
		parallelism: intstr.FromInt32(1),
		Request:     &opsv1.PullRequest{Image: job.Spec.Image, Owner: owner(job)},
	}
}

// Bound applies the limits of the cluster.
func (s *Spec) Bound(l Limits) {
	r := s.Request
	if asked := r.GetPinFor().AsDuration(); l.PinFor > 0 && asked > l.PinFor {
		r.PinFor = durationpb.New(l.PinFor)
		if s.pinAsked { // nobody misses a part of the default
			s.Shortened = fmt.Sprintf("pinned for %s and not for %s, which is more than this cluster allows "+
				"(--image-pin-max of cri-controller)", l.PinFor, asked)
		}
	}
	r.PinPercent = l.PinPercent
	s.Params = paramsOf(r)
}

func paramsOf(r *opsv1.PullRequest) string {
	parts := []any{
		r.MaxAttempts, r.AttemptTimeout.AsDuration(), r.Deadline.AsDuration(), r.BytesPerSecond, r.PinFor.AsDuration(),
	}
	if percent := r.GetPinPercent(); percent > 0 {
		parts = append(parts, percent)
	}
	return objects.Hash(parts...)
}

// owner is the owner of a job's pulls and pins.
func owner(job *v1beta1.ImagePullJob) string {
	return fmt.Sprintf("ImagePullJob/%s/%s/%s", job.Namespace, job.Name, job.UID)
}

// PinnedUntil is when the last pin of a job that has ended expires.
func PinnedUntil(job *v1beta1.ImagePullJob, limits Limits) time.Time {
	pin := maxSpan
	if s, err := Of(job); err == nil {
		s.Bound(limits)
		pin = s.Request.GetPinFor().AsDuration()
	}
	return job.Status.CompletionTime.Add(pin)
}

// ObservedWork identifies what a job is about, as opposed to how it goes about it.
func ObservedWork(job *v1beta1.ImagePullJob) string {
	s := &job.Spec
	return objects.Hash(s.Image, s.ImagePullPolicy, s.SandboxConfig, s.Selector, s.PodSelector)
}

// ObservedEffort identifies how a job goes about its work and when it ends: what a user may change
// to turn a failure into a success.
func ObservedEffort(job *v1beta1.ImagePullJob) string {
	s := &job.Spec
	return objects.Hash(s.PullSecrets, s.Parallelism, s.PullPolicy,
		s.CompletionPolicy.Type, s.CompletionPolicy.ActiveDeadlineSeconds,
		job.Annotations[v1beta1.PinForAnnotation], job.Annotations[v1beta1.BytesPerSecondAnnotation])
}

// BeginsAnew says that somebody has changed a job that had ended, so that the job begins again: it
// is about something else now, or it failed and the change may help. A job that ended under another
// controller stays as it is.
func BeginsAnew(job *v1beta1.ImagePullJob) bool {
	s := &job.Status
	switch {
	case s.ObservedWork == "":
		return false
	case s.ObservedWork != ObservedWork(job):
		return true
	}
	return meta.IsStatusConditionFalse(s.Conditions, v1beta1.ConditionSucceeded) &&
		s.ObservedEffort != "" && s.ObservedEffort != ObservedEffort(job)
}

// Same says that o is of the same generation of the job, and asks the same of a node.
func (s *Spec) Same(o *Spec) bool {
	return s.generation == o.generation && s.Work == o.Work && s.Params == o.Params && s.Shortened == o.Shortened
}

// SameSecrets says that o names the same pull secrets.
func (s *Spec) SameSecrets(o *Spec) bool { return slices.Equal(s.Secrets, o.Secrets) }

// PullUID is the UID of a pull on each node. A node has one pull for each round.
func (s *Spec) PullUID(round int) string {
	uid := string(s.uid) + "." + s.Work + "." + s.Params
	if round > 0 {
		uid += "." + strconv.Itoa(round)
	}
	return uid
}

// ParseUID takes the UID of a pull apart. ok says that the pull is the job's.
func (s *Spec) ParseUID(uid string) (work, params string, round int, ok bool) {
	rest, ok := strings.CutPrefix(uid, string(s.uid)+".")
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

// PullRequest is the request for a round.
func (s *Spec) PullRequest(round int, credentials []*opsv1.RegistryCredential) *opsv1.PullRequest {
	r := proto.Clone(s.Request).(*opsv1.PullRequest)
	r.Uid, r.Credentials = s.PullUID(round), credentials
	return r
}

// Parallelism is how many nodes may pull at once.
func (s *Spec) Parallelism() int {
	if s.parallelism.Type == intstr.Int {
		return max(s.parallelism.IntValue(), 0)
	}
	if text, ok := strings.CutSuffix(s.parallelism.StrVal, "%"); ok {
		percent, err := strconv.Atoi(text)
		if err != nil {
			return 1
		}
		return (len(s.Nodes)*percent + 99) / 100
	}
	n, err := strconv.Atoi(s.parallelism.StrVal)
	if err != nil {
		return 1
	}
	return max(n, 0)
}

// RenewEvery is how often a job that never ends makes sure that a node still has the image: before
// the pin expires, or daily.
func (s *Spec) RenewEvery() time.Duration {
	if pin := s.Request.GetPinFor().AsDuration(); pin > 0 {
		return pin * 3 / 4
	}
	return defaultPin
}

// SameImage compares references as they are written in pods.
func SameImage(a, b string) bool {
	x, errX := reference.ParseNormalizedNamed(a)
	y, errY := reference.ParseNormalizedNamed(b)
	if errX != nil || errY != nil {
		return a == b
	}
	dx, okX := x.(reference.Digested)
	dy, okY := y.(reference.Digested)
	if okX && okY { // a tag beside a digest does not count
		return x.Name() == y.Name() && dx.Digest() == dy.Digest()
	}
	return reference.TagNameOnly(x).String() == reference.TagNameOnly(y).String()
}
