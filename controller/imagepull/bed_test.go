// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	apischeme "github.com/cri-proxy/cri-proxy/api/scheme"
	"github.com/cri-proxy/cri-proxy/controller/imagepull"
	joblist "github.com/cri-proxy/cri-proxy/controller/imagepull/list"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

// How long the reconciler waits, for users to rely on.
const (
	cleanUpTimeout = 30 * time.Second
	noNodesTimeout = 30 * time.Second
	nodeTimeout    = 10 * time.Minute
	silenceTimeout = 30 * time.Second
	newsTimeout    = 20 * time.Second
	overdueSlack   = 2 * time.Minute
	queueAllowance = 6 * time.Hour
	// maxDetails is how many nodes a status describes.
	maxDetails = 20
)

type (
	job  = v1beta1.ImagePullJob
	spec = v1beta1.ImagePullJobSpec
)

// bed is a cluster: an API server in memory that counts writes, a fleet of nodes, and a controller
// that a test can kill. It lives in a synctest bubble, so that hours take no time.
type bed struct {
	t     *testing.T
	fleet *fleet
	api   client.WithWatch

	mu     sync.Mutex
	nodes  map[string]*corev1.Node // served without the cost of the fake client
	looks  int                     // at all nodes
	writes map[string]int
	events []string
	// history has the statuses that the controller has written, by job.
	history map[string][]v1beta1.ImagePullJobStatus
	refuse  func(client.Object) error // reads past the cache
	deny    string                    // the image whose job must not be made
	slow    func() time.Duration      // how long a write of a status takes
	clashes int                       // so many writes of metadata fail, since somebody else has written

	r     *imagepull.Reconciler
	queue workqueue.TypedRateLimitingInterface[reconcile.Request]
	lists workqueue.TypedRateLimitingInterface[reconcile.Request]
	kill  func()
}

// inBed runs f in a bubble with a bed.
func inBed(t *testing.T, f func(*testing.T, *bed)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		scheme, err := apischeme.New()
		if err != nil {
			t.Fatal(err)
		}
		b := &bed{t: t, fleet: newFleet(), nodes: map[string]*corev1.Node{}, writes: map[string]int{},
			history: map[string][]v1beta1.ImagePullJobStatus{}}
		// Leave out managed fields: nobody reads them, and they would take most of the time.
		tracker := clienttesting.NewObjectTracker(scheme, serializer.NewCodecFactory(scheme).UniversalDecoder())
		b.api = fake.NewClientBuilder().WithScheme(scheme).WithObjectTracker(tracker).
			WithStatusSubresource(&job{}, &v1beta1.ImageListPullJob{}).Build()
		b.start()
		defer func() {
			b.kill()
			b.fleet.end()
			synctest.Wait()
		}()
		f(t, b)
	})
}

// Eventf implements events.EventRecorder.
func (b *bed) Eventf(about, _ runtime.Object, kind, reason, _, note string, args ...any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	name := about.(metav1.Object).GetName()
	b.events = append(b.events, fmt.Sprintf("%s %s %s: ", name, kind, reason)+fmt.Sprintf(note, args...))
}

func (b *bed) told() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Join(b.events, "\n")
}

func (b *bed) wrote(what string, o client.Object) {
	b.mu.Lock()
	b.writes[fmt.Sprintf("%s %T", what, o)]++
	b.writes[o.GetName()]++
	if j, ok := o.(*job); ok && what == "status" {
		b.history[o.GetName()] = append(b.history[o.GetName()], *j.Status.DeepCopy())
	}
	b.mu.Unlock()
	b.notice(o)
}

// notice does what the watches of a controller do.
func (b *bed) notice(o client.Object) {
	if _, ok := o.(*job); !ok {
		return
	}
	for _, ref := range o.GetOwnerReferences() {
		b.lists.Add(reconcile.Request{NamespacedName: types.NamespacedName{Namespace: o.GetNamespace(),
			Name: ref.Name}})
	}
}

// start runs a controller until kill is called.
func (b *bed) start() {
	log := logrus.New()
	log.SetOutput(io.Discard)
	c := interceptor.NewClient(b.api, interceptor.Funcs{
		List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, opts ...client.ListOption) error {
			if l, ok := list.(*corev1.NodeList); ok {
				b.mu.Lock()
				defer b.mu.Unlock()
				b.looks++
				for _, n := range b.nodes {
					l.Items = append(l.Items, *n)
				}
				return nil
			}
			return c.List(ctx, list, opts...)
		},
		Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
			o.SetUID(types.UID("uid-" + o.GetName()))
			if j, ok := o.(*job); ok && b.denies(j.Spec.Image) {
				return apierrors.NewForbidden(schema.GroupResource{Resource: "imagepulljobs"}, o.GetName(),
					errors.New("exceeded quota: jobs"))
			}
			err := c.Create(ctx, o, opts...)
			if err == nil {
				b.wrote("create", o)
				b.queue.Add(reconcile.Request{NamespacedName: client.ObjectKeyFromObject(o)})
			}
			return err
		},
		Patch: func(ctx context.Context, c client.WithWatch, o client.Object, p client.Patch,
			opts ...client.PatchOption) error {
			if b.clash() {
				return apierrors.NewConflict(schema.GroupResource{Resource: "imagepulljobs"}, o.GetName(), nil)
			}
			err := c.Patch(ctx, o, p, opts...)
			b.wrote("patch", o)
			return err
		},
		SubResourcePatch: func(ctx context.Context, c client.Client, sub string, o client.Object, p client.Patch,
			opts ...client.SubResourcePatchOption) error {
			b.mu.Lock()
			slow := b.slow
			b.mu.Unlock()
			if slow != nil {
				time.Sleep(slow())
			}
			err := c.SubResource(sub).Patch(ctx, o, p, opts...)
			b.wrote("status", o)
			return err
		},
		Delete: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.DeleteOption) error {
			last := &job{}
			seen := b.api.Get(ctx, client.ObjectKeyFromObject(o), last) == nil
			err := c.Delete(ctx, o, opts...)
			b.wrote("delete", o)
			if seen && apierrors.IsNotFound(b.api.Get(ctx, client.ObjectKeyFromObject(o), &job{})) {
				b.r.Deleted(last)
			}
			b.queue.Add(reconcile.Request{NamespacedName: client.ObjectKeyFromObject(o)})
			return err
		},
	})
	past := interceptor.NewClient(b.api, interceptor.Funcs{
		Get: func(ctx context.Context, c client.WithWatch, key client.ObjectKey, o client.Object,
			opts ...client.GetOption) error {
			b.mu.Lock()
			refuse := b.refuse
			b.mu.Unlock()
			if refuse != nil {
				if err := refuse(o); err != nil {
					return err
				}
			}
			return c.Get(ctx, key, o, opts...)
		},
	})
	b.r = &imagepull.Reconciler{Client: c, APIReader: past, Nodes: b.fleet, NodePort: nodes.DefaultPort,
		Recorder: b, Log: log}
	b.r.Prepare()
	lists := &joblist.Reconciler{Client: c, Recorder: b, Log: log}
	limiter := func() workqueue.TypedRateLimiter[reconcile.Request] {
		return workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](50*time.Millisecond,
			30*time.Second)
	}
	b.queue, b.lists = workqueue.NewTypedRateLimitingQueue(limiter()), workqueue.NewTypedRateLimitingQueue(limiter())
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	r, queue := b.r, b.queue
	wg.Go(func() { r.Run(ctx, queue) })
	for range 2 {
		b.work(ctx, &wg, b.queue, b.r)
		b.work(ctx, &wg, b.lists, lists)
	}
	b.kill = sync.OnceFunc(func() {
		cancel()
		b.queue.ShutDown()
		b.lists.ShutDown()
		wg.Wait()
	})
	// An informer first reports all objects.
	var list v1beta1.ImagePullJobList
	if err := b.api.List(ctx, &list); err != nil {
		b.t.Fatal(err)
	}
	for i := range list.Items {
		b.queue.Add(reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&list.Items[i])})
	}
}

func (b *bed) work(
	ctx context.Context, wg *sync.WaitGroup, queue workqueue.TypedRateLimitingInterface[reconcile.Request],
	r reconcile.Reconciler,
) {
	wg.Go(func() {
		for {
			request, over := queue.Get()
			if over {
				return
			}
			result, err := r.Reconcile(ctx, request)
			switch {
			case ctx.Err() != nil:
			case err != nil:
				b.t.Errorf("reconciling %s: %v", request, err)
				queue.AddRateLimited(request)
			case result.RequeueAfter > 0:
				queue.Forget(request)
				queue.AddAfter(request, result.RequeueAfter)
			}
			queue.Done(request)
		}
	})
}

// denyImage makes the API server refuse jobs for an image.
func (b *bed) denyImage(image string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.deny = image
}

func (b *bed) denies(image string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return image == b.deny
}

// clash says that a write fails because somebody else has written.
func (b *bed) clash() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.clashes == 0 {
		return false
	}
	b.clashes--
	return true
}

// restart kills the controller and starts another one.
func (b *bed) restart() {
	b.kill()
	b.start()
}

// node adds a node, or changes one.
func (b *bed) node(name string, change ...func(*corev1.Node)) {
	b.mu.Lock()
	n := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"kubernetes.io/hostname": name}},
		Status: corev1.NodeStatus{
			Addresses:  []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}},
			Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}},
		},
	}
	if old := b.nodes[name]; old != nil {
		n = old.DeepCopy()
	}
	for _, f := range change {
		f(n)
	}
	b.nodes[name] = n
	b.mu.Unlock()
	b.crowd()
}

func (b *bed) removeNode(name string) {
	b.mu.Lock()
	delete(b.nodes, name)
	b.mu.Unlock()
	b.crowd()
}

// crowd does what the watch of nodes does.
func (b *bed) crowd() {
	for _, r := range b.r.JobsOfNode(context.Background()) {
		b.queue.AddAfter(r, imagepull.GatherInterval)
	}
}

func ready(is corev1.ConditionStatus) func(*corev1.Node) {
	return func(n *corev1.Node) { n.Status.Conditions[0].Status = is }
}

// add adds a node with its proxy.
func (b *bed) add(name string, n *simNode) {
	b.fleet.add(name, n)
	b.node(name)
}

func (b *bed) addMany(n int, takes time.Duration) {
	for i := range n {
		b.add(fmt.Sprintf("node-%d", i), &simNode{takes: takes})
	}
}

func parallel(n int) *intstr.IntOrString {
	p := intstr.FromInt32(int32(n))
	return &p
}

// create creates a job with the CRD's defaults, as the API server does.
func (b *bed) create(name string, s spec, annotations ...string) {
	b.t.Helper()
	if s.Image == "" {
		s.Image = "nginx"
	}
	if s.CompletionPolicy.Type == "" {
		s.CompletionPolicy.Type = v1beta1.Always
	}
	j := &job{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID("uid-" + name), Generation: 1,
		Annotations: map[string]string{}}, Spec: s}
	for i := 0; i < len(annotations); i += 2 {
		j.Annotations[annotations[i]] = annotations[i+1]
	}
	if err := b.api.Create(context.Background(), j); err != nil {
		b.t.Fatal(err)
	}
	b.queue.Add(reconcile.Request{NamespacedName: types.NamespacedName{Namespace: "ns", Name: name}})
}

// edit changes a job as a user does.
func (b *bed) edit(name string, change func(*job)) {
	b.t.Helper()
	for {
		j := b.get(name)
		change(j)
		j.Generation++
		err := b.api.Update(context.Background(), j)
		if apierrors.IsConflict(err) {
			continue
		}
		if err != nil {
			b.t.Fatal(err)
		}
		b.queue.Add(reconcile.Request{NamespacedName: types.NamespacedName{Namespace: "ns", Name: name}})
		return
	}
}

func (b *bed) delete(name string) {
	b.t.Helper()
	last := b.get(name)
	if err := b.api.Delete(context.Background(),
		&job{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name}}); err != nil {
		b.t.Fatal(err)
	}
	if b.get(name) == nil {
		b.r.Deleted(last) // what an informer does
	}
	b.queue.Add(reconcile.Request{NamespacedName: types.NamespacedName{Namespace: "ns", Name: name}})
}

// get returns the job, or nil if the job is gone.
func (b *bed) get(name string) *job {
	b.t.Helper()
	var j job
	err := b.api.Get(context.Background(), types.NamespacedName{Namespace: "ns", Name: name}, &j)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		b.t.Fatal(err)
	}
	return &j
}

// until waits, in the bubble's time, until the job is so, and returns it.
func (b *bed) until(what, name string, within time.Duration, so func(*job) bool) *job {
	b.t.Helper()
	step := max(within/1000, time.Millisecond)
	for end := time.Now().Add(within); ; time.Sleep(step) {
		synctest.Wait()
		j := b.get(name)
		if so(j) {
			return j
		}
		if time.Now().After(end) {
			b.t.Fatalf("job %s not %s within %s: %+v\nevents:\n%s", name, what, within, j, b.told())
		}
	}
}

func completed(j *job) bool { return j != nil && j.Status.CompletionTime != nil }
func gone(j *job) bool      { return j == nil }

func (b *bed) writesOf(name string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.writes[name]
}

// condition is the status and reason of a condition: "True Succeeded".
func condition(j *job, kind string) string {
	c := meta.FindStatusCondition(j.Status.Conditions, kind)
	if c == nil {
		return ""
	}
	return string(c.Status) + " " + c.Reason
}

func (b *bed) want(j *job, complete string, numbers string) {
	b.t.Helper()
	s := j.Status
	got := fmt.Sprintf("%d/%d/%d/%d", s.Desired, s.Active, s.Succeeded, s.Failed)
	if got != numbers || condition(j, v1beta1.ConditionComplete) != complete {
		b.t.Errorf("job %s: desired/active/succeeded/failed %s, Complete %q; want %s, %q; status %+v", j.Name, got,
			condition(j, v1beta1.ConditionComplete), numbers, complete, s)
	}
}
