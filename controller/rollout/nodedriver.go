// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller"
	"github.com/cri-proxy/cri-proxy/controller/crew"
	"github.com/cri-proxy/cri-proxy/controller/environment"
	"github.com/cri-proxy/cri-proxy/controller/mirrorpod"
	"github.com/cri-proxy/cri-proxy/controller/pullsecrets"
)

// driver commands nodes for the pods of rollouts.
type driver struct {
	nodes Nodes
	// client reads from the cache and asks the API server. live reads past the cache, which has no secrets.
	client client.Client
	live   client.Reader
	crew   *crew.Crew
	// port is for nodes without an address of their own in an annotation.
	port int
}

// session tells nodes what to do for the pods of a rollout, during one look at the rollout.
type session struct {
	driver   *driver
	state    *state
	rollout  *inplace.InPlaceRollout
	strategy *strategy
	now      time.Time
	log      logrus.FieldLogger
	// wait is when to look again; 0 means when something happens.
	wait *time.Duration
	// newLabel returns the label of the revision that a pod gets with its new images; empty if it gets none.
	newLabel func(*item) string
}

// node returns where to reach the node of a pod.
func (d *driver) node(ctx context.Context, pod *corev1.Pod) (controller.Node, error) {
	var n corev1.Node
	if err := d.client.Get(ctx, client.ObjectKey{Name: pod.Spec.NodeName}, &n); err != nil {
		return controller.Node{}, err
	}
	return controller.NodeOf(&n, d.port)
}

// carries returns true if the kubelet of a pod takes new containers for started because the old ones were.
func (d *driver) carries(ctx context.Context, pod *corev1.Pod) bool {
	var n corev1.Node
	if d.client.Get(ctx, client.ObjectKey{Name: pod.Spec.NodeName}, &n) != nil {
		return true
	}
	return controller.CarriesStarted(&n)
}

// stillSo asks the API server once more, before the node is told that the patch comes. The error says that admission answers otherwise now.
func (d *driver) stillSo(ctx context.Context, i *item, change *podChange, before rewrites) error {
	now, more, err := dryRun(ctx, d.client, i.pod, change)
	if err != nil {
		return err
	}
	for name, image := range more {
		// Somebody has changed the pod, or admission has changed since the node was asked: begin anew.
		return apierrors.NewConflict(corev1.Resource("pods"), i.pod.Name, fmt.Errorf("container %s gets image %s", name, image))
	}
	if name, differs := now.differs(before, change.images); differs {
		asked := change.images[name]
		return unsteady("pod "+i.pod.Name, name, asked, before.of(name, asked), now.of(name, asked))
	}
	return nil
}

// commitRequest returns the commit with the environments of the containers. images are the new images by container.
func (d *driver) commitRequest(ctx context.Context, w *state, pod *corev1.Pod, label, uid string, images map[string]string) (*opsv1.CommitUpgradeRequest, error) {
	now, err := d.launch(ctx, w, pod, label)
	if err != nil {
		return nil, err
	}
	request := &opsv1.CommitUpgradeRequest{Uid: uid}
	var pulled []string
	for _, name := range slices.Sorted(maps.Keys(images)) {
		policy, env, err := now.container(ctx, name)
		if err != nil {
			return nil, err
		}
		pulled = append(pulled, pullsecrets.Pulled(images[name], policy, env)...)
		request.Environments = append(request.Environments, &opsv1.ContainerEnvironment{Name: name, Environment: env})
	}
	request.Credentials = now.ring.For(pulled...)
	return request, nil
}

// launch is what kubelet needs to start the containers of a pod: the environment and pull secrets.
type launch struct {
	reader *environment.Reader
	ring   *pullsecrets.Keyring // nil for a pod that a node has made
}

// launch reads what kubelet would start the containers of a pod with; if label is set, once the pod has that label of revision.
func (d *driver) launch(ctx context.Context, w *state, pod *corev1.Pod, label string) (*launch, error) {
	now, err := environment.Read(ctx, d.live, pod)
	if err != nil {
		return nil, err
	}
	if label != "" {
		now.Label(revisionLabel, label)
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

func (l *launch) container(ctx context.Context, name string) (opsv1.PullPolicy, *opsv1.Environment, error) {
	env, err := l.reader.Container(ctx, name)
	if err != nil {
		return 0, nil, err
	}
	c, _ := containerOf(l.reader.Pod(), name)
	return environment.PullPolicy(c.ImagePullPolicy), env, nil
}

func (l *launch) image(name string) string {
	c, _ := containerOf(l.reader.Pod(), name)
	return c.Image
}

// keyring reads secrets, unless they are fresh.
func (d *driver) keyring(ctx context.Context, w *state, namespace, account string, names []string) (*pullsecrets.Keyring, error) {
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
	ring, err := pullsecrets.Read(ctx, d.live, namespace, account, names, "imagePullSecrets")
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

func refOf(pod *corev1.Pod) *opsv1.PodRef {
	return &opsv1.PodRef{Namespace: pod.Namespace, Name: pod.Name, Uid: string(pod.UID)}
}
