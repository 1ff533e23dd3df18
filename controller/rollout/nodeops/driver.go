// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodeops

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/environment"
	"github.com/cri-proxy/cri-proxy/controller/mirrorpod"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
	"github.com/cri-proxy/cri-proxy/controller/retry"
	"github.com/cri-proxy/cri-proxy/controller/rollout/dryrun"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/podtemplate"
	"github.com/cri-proxy/cri-proxy/controller/workerpool"
)

// Driver commands nodes for the pods of rollouts.
type Driver struct {
	Nodes Nodes
	// Client reads from the cache and asks the API server. Live reads past the cache, which has no
	// secrets.
	Client  client.Client
	Live    client.Reader
	Workers *workerpool.Pool
	// Port is for nodes without an address of their own in an annotation.
	Port int
}

// Session tells nodes what to do for the pods of a rollout, during one look at the rollout.
type Session struct {
	Driver   *Driver
	State    *State
	Rollout  *inplace.InPlaceRollout
	Strategy *evaluate.Strategy
	Now      time.Time
	Log      logrus.FieldLogger
	// Wait is when to look again; 0 means when something happens.
	Wait *time.Duration
	// NewLabel returns the label of the revision that a pod gets with its new images; empty if it
	// gets none.
	NewLabel func(*Item) string
}

// node returns where to reach the node of a pod.
func (d *Driver) node(ctx context.Context, pod *corev1.Pod) (nodes.Node, error) {
	var n corev1.Node
	if err := d.Client.Get(ctx, client.ObjectKey{Name: pod.Spec.NodeName}, &n); err != nil {
		return nodes.Node{}, err
	}
	return nodes.Of(&n, d.Port)
}

// Carries returns true if the kubelet of a pod takes new containers for started because the old
// ones were.
func (d *Driver) Carries(ctx context.Context, pod *corev1.Pod) bool {
	var n corev1.Node
	if d.Client.Get(ctx, client.ObjectKey{Name: pod.Spec.NodeName}, &n) != nil {
		return true
	}
	return pods.CarriesStarted(&n)
}

// recheck asks the API server again, before the node is told that the patch comes. The error
// says that admission answers otherwise now.
func (d *Driver) recheck(ctx context.Context, i *Item, change *dryrun.PodChange, before evaluate.Rewrites) error {
	now, more, err := dryrun.Pod(ctx, d.Client, i.Pod, change)
	if err != nil {
		return err
	}
	for name, image := range more {
		// Somebody has changed the pod, or admission has changed since the node was asked: begin
		// anew.
		return apierrors.NewConflict(corev1.Resource("pods"), i.Pod.Name,
			fmt.Errorf("container %s gets image %s", name, image))
	}
	if name, differs := now.Differs(before, change.Images); differs {
		asked := change.Images[name]
		return dryrun.Unsteady("pod "+i.Pod.Name, name, asked, before.Of(name, asked), now.Of(name, asked))
	}
	return nil
}

// commitRequest returns the commit with the environments of the containers. images are the new
// images by container.
func (d *Driver) commitRequest(
	ctx context.Context, w *State, pod *corev1.Pod, label, uid string, images map[string]string,
) (*opsv1.CommitUpgradeRequest, error) {
	now, err := d.launch(ctx, w, pod, label)
	if err != nil {
		return nil, err
	}
	request := &opsv1.CommitUpgradeRequest{Uid: uid}
	for _, name := range objects.SortedKeys(images) {
		_, env, err := now.container(ctx, name, images[name])
		if err != nil {
			return nil, err
		}
		request.Environments = append(request.Environments, &opsv1.ContainerEnvironment{Name: name, Environment: env})
	}
	request.Credentials = now.credentials()
	return request, nil
}

// launch is what kubelet needs to start the containers of a pod: the environment and pull secrets.
type launch struct {
	reader *environment.Reader
	ring   *pullsecrets.Keyring // nil for a pod that a node has made
	pulled []string             // what may be pulled for the containers that were asked for
}

// launch reads what kubelet would start the containers of a pod with; if label is set, once the pod
// has that label of revision.
func (d *Driver) launch(ctx context.Context, w *State, pod *corev1.Pod, label string) (*launch, error) {
	now, err := environment.Read(ctx, d.Live, pod)
	if err != nil {
		return nil, err
	}
	if label != "" {
		now.Label(podtemplate.RevisionLabel, label)
	}
	if mirrorpod.Is(pod) {
		return &launch{reader: now}, nil
	}
	ring, err := d.keyring(ctx, w, pod.Namespace, pod.Spec.ServiceAccountName, secretNames(pod))
	if err != nil {
		return nil, err
	}
	return &launch{reader: now, ring: ring}, nil
}

// container returns what kubelet would start a container with, once the container has that image;
// with an empty one, the image of its spec.
func (l *launch) container(
	ctx context.Context, name, image string,
) (opsv1.PullPolicy, *opsv1.Environment, error) {
	env, err := l.reader.Container(ctx, name)
	if err != nil {
		return 0, nil, err
	}
	c := pods.Changeable(l.reader.Pod(), name)
	policy := environment.PullPolicy(c.ImagePullPolicy)
	l.pulled = append(l.pulled, pullsecrets.Pulled(cmp.Or(image, c.Image), policy, env)...)
	return policy, env, nil
}

// credentials returns the credentials for all that may be pulled for the containers asked for.
func (l *launch) credentials() []*opsv1.RegistryCredential { return l.ring.For(l.pulled...) }

// keyring reads secrets, unless they are fresh.
func (d *Driver) keyring(
	ctx context.Context, w *State, namespace, account string, names []string,
) (*pullsecrets.Keyring, error) {
	if account == "" {
		account = pullsecrets.DefaultAccount
	}
	key := fmt.Sprint(account, names)
	w.mu.Lock()
	k := w.keys[key]
	w.mu.Unlock()
	if k != nil && time.Since(k.at) < secretsFor {
		return k.ring, nil
	}
	ring, err := pullsecrets.Read(ctx, d.Live, namespace, account, names, "imagePullSecrets")
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.keys[key] = &keys{ring, time.Now()}
	return ring, nil
}

func secretNames(pod *corev1.Pod) []string {
	var names []string
	for _, s := range pod.Spec.ImagePullSecrets {
		names = append(names, s.Name)
	}
	return names
}

func podRefOf(pod *corev1.Pod) *opsv1.PodRef {
	return &opsv1.PodRef{Namespace: pod.Namespace, Name: pod.Name, Uid: string(pod.UID)}
}

// orFind looks for the operation that the node has already under the UID of a request that it
// refuses for that: a controller of another version has begun it, with some other detail.
func (d *Driver) orFind(
	ctx context.Context, node nodes.Node, uid string, op *opsv1.Operation, err error,
) (*opsv1.Operation, error) {
	if nodes.Code(err) == codes.AlreadyExists {
		return d.Nodes.GetOperation(ctx, node, uid)
	}
	return op, err
}

// takeBack tells a node to take back an upgrade.
func (d *Driver) takeBack(node nodes.Node, uid, why string) {
	d.Workers.Do(func(ctx context.Context) {
		for tries := range 5 {
			_, err := d.Nodes.AbortUpgrade(ctx, node, uid, why)
			if t := troubleOf(err); err == nil || t.final || t.stale || !retry.Sleep(ctx, backOff(tries)) {
				return
			}
		}
	})
}
