// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/api/scheme"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/jobbudget"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/retry"
	"github.com/cri-proxy/cri-proxy/controller/rollout/check"
	"github.com/cri-proxy/cri-proxy/controller/rollout/follow"
	"github.com/cri-proxy/cri-proxy/controller/rollout/gates"
	"github.com/cri-proxy/cri-proxy/controller/rollout/requeue"
	"github.com/cri-proxy/cri-proxy/controller/rollout/workload"
	"github.com/cri-proxy/cri-proxy/controller/slimcache"
)

type (
	rollout  = inplace.InPlaceRollout
	spec     = inplace.InPlaceRolloutSpec
	change   = inplace.ContainerChange
	settings = inplace.Strategy
)

// cacheLag is how long the controller's cache is behind the API server.
const cacheLag = 20 * time.Millisecond

// workers is how many rollouts are reconciled at the same time.
const workers = 4

// bed is a cluster: an API server in memory that counts writes, nodes with kubelets, and a
// controller that can be killed. It lives in a synctest bubble, so that hours take no time.
type bed struct {
	t     *testing.T
	fleet *fleet
	api   client.WithWatch

	mu sync.Mutex
	// cache are the pods as the controller's cache has them, real as they are.
	cache, real map[types.NamespacedName]*corev1.Pod
	// rollouts are those of the controller's cache.
	rollouts map[types.NamespacedName]*rollout
	nodes    map[string]*corev1.Node
	writes   map[string]int
	events   []string
	// notReady is how many pods are not ready, and peak the most there were.
	notReady, peak int
	kubelet        kubelet
	// serves says from when on the application of a pod answers, where that has a startupProbe.
	serves    map[types.UID]time.Time
	tags      sync.Mutex
	contents  map[string]string // of tags that have moved; guarded by tags
	running   bool
	ctx       context.Context
	stop      context.CancelFunc
	wg        sync.WaitGroup
	transform func(any) (any, error)
	watches   map[string]func(before, now *corev1.Pod)
	serial    int
	version   int
	webhook   bool // asked for what the controller writes of rollouts
	// moves counts the changes of the API server's objects.
	moves atomic.Int64
	// policy is what the admission of the cluster makes of pods and templates that the controller
	// writes; dry says that nothing is stored.
	policy func(o client.Object, dry bool) error
	// statusPolicy is the same for what the controller writes of pods' status.
	statusPolicy func(*corev1.Pod) error

	r     *Reconciler
	queue workqueue.TypedRateLimitingInterface[reconcile.Request]
	// follows are the queues of the FollowReconcilers by kind, gates that of the GateReconciler.
	follows map[string]workqueue.TypedRateLimitingInterface[reconcile.Request]
	gates   workqueue.TypedRateLimitingInterface[reconcile.Request]
	kill    func()
}

// inBed runs f in a bubble with a bed.
func inBed(t *testing.T, f func(*testing.T, *bed)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		scheme, err := scheme.New()
		if err != nil {
			t.Fatal(err)
		}
		b := &bed{
			t: t, fleet: newFleet(), writes: map[string]int{},
			cache: map[types.NamespacedName]*corev1.Pod{}, real: map[types.NamespacedName]*corev1.Pod{},
			nodes:   map[string]*corev1.Node{},
			kubelet: kubelet{sync: time.Second, start: 3 * time.Second}, serves: map[types.UID]time.Time{},
		}
		for o, by := range slimcache.Options().ByObject {
			if _, ok := o.(*corev1.Pod); ok {
				b.transform = by.Transform
			}
		}
		b.ctx, b.stop = context.WithCancel(context.Background())
		b.fleet.swap, b.fleet.runs, b.fleet.moved = b.swapped, b.runs, b.moved
		// Without managed fields, which nobody reads and most of the time would go into.
		tracker := clienttesting.NewObjectTracker(scheme, serializer.NewCodecFactory(scheme).UniversalDecoder())
		b.api = b.counting(fake.NewClientBuilder().WithScheme(scheme).WithObjectTracker(tracker).
			WithStatusSubresource(&rollout{}).Build())
		b.start()
		defer func() {
			b.kill()
			b.stop()
			b.fleet.end()
			b.wg.Wait()
			synctest.Wait()
		}()
		f(t, b)
	})
}

// counting is the API server with a count of its changes, for those who look whether there is
// something to do.
func (b *bed) counting(api client.WithWatch) client.WithWatch {
	return interceptor.NewClient(api, interceptor.Funcs{
		Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
			defer b.moves.Add(1)
			return c.Create(ctx, o, opts...)
		},
		Update: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.UpdateOption) error {
			defer b.moves.Add(1)
			return c.Update(ctx, o, opts...)
		},
		Patch: func(ctx context.Context, c client.WithWatch, o client.Object, p client.Patch,
			opts ...client.PatchOption) error {
			defer b.moves.Add(1)
			return c.Patch(ctx, o, p, opts...)
		},
		Delete: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.DeleteOption) error {
			defer b.moves.Add(1)
			return c.Delete(ctx, o, opts...)
		},
		SubResourceUpdate: func(ctx context.Context, c client.Client, sub string, o client.Object,
			opts ...client.SubResourceUpdateOption) error {
			defer b.moves.Add(1)
			return c.SubResource(sub).Update(ctx, o, opts...)
		},
		SubResourcePatch: func(ctx context.Context, c client.Client, sub string, o client.Object, p client.Patch,
			opts ...client.SubResourcePatchOption) error {
			defer b.moves.Add(1)
			return c.SubResource(sub).Patch(ctx, o, p, opts...)
		},
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
	b.writes[fmt.Sprintf("%s %s", what, strings.TrimPrefix(fmt.Sprintf("%T", o), "*"))]++
	b.mu.Unlock()
}

func (b *bed) counted(what string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.writes[what]
}

// start runs a controller; it ends with kill.
func (b *bed) start() {
	log := logrus.New()
	log.SetOutput(io.Discard)
	c := interceptor.NewClient(b.api, interceptor.Funcs{
		List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, opts ...client.ListOption) error {
			o := (&client.ListOptions{}).ApplyOptions(opts)
			switch l := list.(type) {
			case *corev1.PodList:
				b.mu.Lock()
				defer b.mu.Unlock()
				for key, pod := range b.cache {
					if key.Namespace == o.Namespace && (o.LabelSelector == nil ||
						o.LabelSelector.Matches(labels.Set(pod.Labels))) {
						l.Items = append(l.Items, *pod)
					}
				}
				return nil
			case *inplace.InPlaceRolloutList:
				b.mu.Lock()
				defer b.mu.Unlock()
				for _, r := range b.rollouts {
					l.Items = append(l.Items, *r)
				}
				return nil
			}
			return c.List(ctx, list, opts...)
		},
		Get: func(ctx context.Context, c client.WithWatch, key client.ObjectKey, o client.Object,
			opts ...client.GetOption) error {
			b.mu.Lock()
			defer b.mu.Unlock()
			switch into := o.(type) { // of the rest there is no cache
			case *corev1.Pod:
				if pod := b.cache[key]; pod != nil {
					pod.DeepCopyInto(into)
					return nil
				}
				return apierrors.NewNotFound(schema.GroupResource{Resource: "pods"}, key.Name)
			case *rollout:
				if r := b.rollouts[key]; r != nil {
					r.DeepCopyInto(into)
					return nil
				}
				return apierrors.NewNotFound(schema.GroupResource{Resource: "inplacerollouts"}, key.Name)
			case *corev1.Node:
				if node := b.nodes[key.Name]; node != nil {
					*into = *node
					return nil
				}
				return apierrors.NewNotFound(schema.GroupResource{Resource: "nodes"}, key.Name)
			}
			return c.Get(ctx, key, o, opts...)
		},
		Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
			o.SetUID(types.UID("uid-" + o.GetName()))
			o.SetGeneration(1)
			o.SetCreationTimestamp(metav1.Now())
			err := b.admit(ctx, o)
			if err == nil {
				err = c.Create(ctx, o, opts...)
			}
			if err == nil {
				b.wrote("create", o)
				b.changed(o)
			}
			return err
		},
		Patch: func(ctx context.Context, c client.WithWatch, o client.Object, p client.Patch,
			opts ...client.PatchOption) error {
			dry := isDryRun(opts)
			if pod, ok := o.(*corev1.Pod); ok {
				err := b.patchPod(pod, p, false, dry)
				if err == nil && !dry {
					b.wrote("patch", o)
				}
				return err
			}
			err := b.admit(ctx, o)
			if err == nil {
				err = b.patch(ctx, c, o, p, opts...)
			}
			if err == nil && !dry {
				b.wrote("patch", o)
				b.changed(o)
			}
			return err
		},
		SubResourcePatch: func(ctx context.Context, c client.Client, sub string, o client.Object, p client.Patch,
			opts ...client.SubResourcePatchOption) error {
			if pod, ok := o.(*corev1.Pod); ok {
				err := b.patchPod(pod, p, true, false)
				if err == nil {
					b.wrote("status", o)
				}
				return err
			}
			err := c.SubResource(sub).Patch(ctx, o, p, opts...)
			if err == nil {
				b.wrote("status", o)
				b.changed(o)
			}
			return err
		},
		Delete: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.DeleteOption) error {
			err := c.Delete(ctx, o, opts...)
			if err == nil {
				b.wrote("delete", o)
				b.changed(o)
			}
			return err
		},
	})
	live := interceptor.NewClient(b.api, interceptor.Funcs{
		List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, opts ...client.ListOption) error {
			pods, ok := list.(*corev1.PodList)
			if !ok {
				return c.List(ctx, list, opts...)
			}
			o := (&client.ListOptions{}).ApplyOptions(opts)
			for _, pod := range b.pods() {
				if o.LabelSelector == nil || o.LabelSelector.Matches(labels.Set(pod.Labels)) {
					pods.Items = append(pods.Items, *pod)
				}
			}
			return nil
		},
	})
	b.r = &Reconciler{Client: c, APIReader: uncached{live, b}, Jobs: &jobbudget.Budgets{}, Nodes: b.fleet,
		NodePort: nodes.DefaultPort, Recorder: b, Log: log}
	b.r.prepare()
	newQueue := func() workqueue.TypedRateLimitingInterface[reconcile.Request] {
		return workqueue.NewTypedRateLimitingQueue(
			workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](50*time.Millisecond, 30*time.Second))
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	b.mu.Lock()
	b.queue, b.gates = newQueue(), newQueue()
	b.follows = map[string]workqueue.TypedRateLimitingInterface[reconcile.Request]{workload.KindStatefulSet: newQueue(),
		workload.KindDaemonSet: newQueue()}
	b.mu.Unlock()
	all := []workqueue.TypedRateLimitingInterface[reconcile.Request]{b.queue, b.gates}
	for kind, q := range b.follows {
		all = append(all, q)
		b.work(ctx, &wg, q, &follow.Reconciler{Client: c, Recorder: b, Log: log, Kind: kind})
	}
	b.work(ctx, &wg, b.gates, &gates.Reconciler{Client: c, APIReader: b.api, Log: log})
	pool, tracker := b.r.workers, b.r.tracker
	wg.Go(func() { _ = pool.Start(ctx) })
	if err := tracker.Source().Start(ctx, b.queue); err != nil {
		b.t.Fatal(err)
	}
	wg.Go(func() { _ = tracker.Start(ctx) })
	for range workers {
		b.work(ctx, &wg, b.queue, b.r)
	}
	b.kill = sync.OnceFunc(func() {
		b.mu.Lock()
		b.running = false
		b.mu.Unlock()
		cancel()
		for _, q := range all {
			q.ShutDown()
		}
		wg.Wait()
	})
	// What an informer does at first.
	var list inplace.InPlaceRolloutList
	if err := b.api.List(ctx, &list); err != nil {
		b.t.Fatal(err)
	}
	b.mu.Lock()
	b.running = true
	b.cache, b.rollouts = map[types.NamespacedName]*corev1.Pod{}, map[types.NamespacedName]*rollout{}
	for key, pod := range b.real {
		b.cache[key] = b.slim(pod)
	}
	for i := range list.Items {
		b.rollouts[client.ObjectKeyFromObject(&list.Items[i])] = &list.Items[i]
	}
	b.mu.Unlock()
	for i := range list.Items {
		b.queue.Add(reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&list.Items[i])})
	}
	for _, q := range b.follows {
		q.Add(reconcile.Request{NamespacedName: types.NamespacedName{Namespace: "ns", Name: "web"}})
	}
	for _, pod := range b.pods() {
		if gates.Needs(pod) {
			b.gates.Add(reconcile.Request{NamespacedName: client.ObjectKeyFromObject(pod)})
		}
	}
}

// admit is the webhook's answer to what is written of a rollout.
func (b *bed) admit(ctx context.Context, o client.Object) error {
	after, ok := o.(*rollout)
	if !ok || !b.webhook || after.DeletionTimestamp != nil {
		return nil
	}
	_, err := check.Rollout(ctx, b.api, b.get(after.Name), after)
	if why := (*apierror.SpecError)(nil); errors.As(err, &why) {
		b.mu.Lock()
		b.writes["refused"]++
		b.mu.Unlock()
		return apierrors.NewBadRequest("admission webhook denied the request: " + why.Message)
	}
	return err
}

// patch is the API server's, with generations of pods' owners and what admission makes of their
// templates.
func (b *bed) patch(
	ctx context.Context, c client.WithWatch, o client.Object, p client.Patch, opts ...client.PatchOption,
) error {
	dry := isDryRun(opts)
	if b.policy == nil && !dry {
		return b.generation(ctx, o, func() error { return c.Patch(ctx, o, p, opts...) })
	}
	if p.Type() != types.StrategicMergePatchType {
		return c.Patch(ctx, o, p, opts...)
	}
	before := o.DeepCopyObject().(client.Object)
	if err := b.api.Get(ctx, client.ObjectKeyFromObject(o), before); err != nil {
		return err
	}
	data, err := p.Data(o)
	if err != nil {
		return err
	}
	old, err := json.Marshal(before)
	if err != nil {
		return err
	}
	merged, err := strategicpatch.StrategicMergePatch(old, data, before)
	if err != nil {
		return err
	}
	after := reflect.New(reflect.TypeOf(o).Elem()).Interface().(client.Object)
	if err := json.Unmarshal(merged, after); err != nil {
		return err
	}
	if after.GetUID() != before.GetUID() || after.GetResourceVersion() != before.GetResourceVersion() {
		return apierrors.NewConflict(schema.GroupResource{Resource: "workloads"}, o.GetName(),
			errors.New("it has changed"))
	}
	if b.policy != nil {
		if err := b.policy(after, dry); err != nil {
			return err
		}
	}
	if !dry {
		if err := b.generation(ctx, after, func() error { return c.Update(ctx, after) }); err != nil {
			return err
		}
	}
	reflect.ValueOf(o).Elem().Set(reflect.ValueOf(after).Elem())
	return nil
}

func isDryRun(opts []client.PatchOption) bool {
	return len((&client.PatchOptions{}).ApplyOptions(opts).DryRun) > 0
}

func (b *bed) slim(pod *corev1.Pod) *corev1.Pod {
	out, err := b.transform(pod)
	if err != nil {
		b.t.Error(err)
	}
	return out.(*corev1.Pod)
}

func (b *bed) work(ctx context.Context, wg *sync.WaitGroup,
	queue workqueue.TypedRateLimitingInterface[reconcile.Request], r reconcile.Reconciler) {
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

// restart kills the controller and starts another one.
func (b *bed) restart() {
	b.kill()
	b.start()
}

// changed is what the watches make of a write.
func (b *bed) changed(o client.Object) {
	switch o := o.(type) {
	case *rollout:
		key, owners := client.ObjectKeyFromObject(o), o.OwnerReferences
		b.wg.Go(func() {
			if !retry.Sleep(b.ctx, cacheLag) {
				return
			}
			b.mu.Lock()
			defer b.mu.Unlock()
			if !b.running {
				return
			}
			now, old := b.get(key.Name), b.rollouts[key]
			if now == nil {
				delete(b.rollouts, key)
			} else {
				b.rollouts[key] = now
			}
			if now == nil || old == nil || now.DeletionTimestamp != nil ||
				requeue.RolloutChanges().Update(event.UpdateEvent{ObjectOld: old, ObjectNew: now}) {
				b.queue.Add(reconcile.Request{NamespacedName: key})
			}
			for _, owner := range owners {
				b.follows[owner.Kind].Add(reconcile.Request{NamespacedName: types.NamespacedName{Namespace: "ns",
					Name: owner.Name}})
			}
		})
	case *appsv1.StatefulSet:
		b.workloadWritten(o, func() []reconcile.Request {
			return b.r.rolloutsOfWorkload(workload.KindStatefulSet)(b.ctx,
				o)
		})
	case *appsv1.DaemonSet:
		b.workloadWritten(o, func() []reconcile.Request {
			return b.r.rolloutsOfWorkload(workload.KindDaemonSet)(b.ctx,
				o)
		})
	case *appsv1.Deployment:
		b.workloadWritten(o, func() []reconcile.Request {
			return b.r.rolloutsOfWorkload(workload.KindDeployment)(b.ctx,
				o)
		})
	case *appsv1.ReplicaSet:
		b.workloadWritten(o, func() []reconcile.Request { return b.r.rolloutsOfReplicaSet(b.ctx, o) })
	}
}

// workloadWritten wakes the rollouts of a workload.
func (b *bed) workloadWritten(o client.Object, requests func() []reconcile.Request) {
	b.mu.Lock()
	running, queue, follows := b.running, b.queue, b.follows
	b.mu.Unlock()
	if running {
		kind := strings.TrimPrefix(fmt.Sprintf("%T", o), "*v1.")
		if q := follows[kind]; q != nil {
			q.Add(reconcile.Request{NamespacedName: client.ObjectKeyFromObject(o)})
		}
		for _, request := range requests() {
			queue.AddAfter(request, gatherFor)
		}
	}
}

// podWritten lets the kubelet know of a pod at once, and the cache after a while.
func (b *bed) podWritten(key types.NamespacedName, now *corev1.Pod) {
	if now != nil {
		b.wg.Go(func() { b.kubeletSync(key) })
	}
	b.wg.Go(func() {
		if !retry.Sleep(b.ctx, cacheLag) {
			return
		}
		b.mu.Lock()
		old := b.cache[key]
		var seen *corev1.Pod
		if now == nil {
			if b.real[key] != nil {
				b.mu.Unlock()
				return // made anew since
			}
			delete(b.cache, key)
		} else if old == nil || outdated(old, now) {
			seen = b.slim(now)
			b.cache[key] = seen
		}
		running, r, queue, gateQueue := b.running, b.r, b.queue, b.gates
		b.mu.Unlock()
		if !running || seen == nil && now != nil {
			return
		}
		of := old
		if seen != nil {
			of = seen
		}
		if of == nil || old != nil && seen != nil &&
			!podChanges().Update(event.UpdateEvent{ObjectOld: old, ObjectNew: seen}) {
			return
		}
		if seen != nil && gates.Needs(seen) {
			gateQueue.Add(reconcile.Request{NamespacedName: key})
		}
		for _, request := range r.rolloutsOfPod(context.Background(), of) {
			queue.AddAfter(request, r.gather(request))
		}
	})
}

// watch calls f with every write of a pod.
func (b *bed) watch(name string, f func(before, now *corev1.Pod)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.watches == nil {
		b.watches = map[string]func(before, now *corev1.Pod){}
	}
	b.watches[name] = f
}

// count keeps notReady; the caller holds the mutex.
func (b *bed) count(before, now *corev1.Pod) {
	is := func(p *corev1.Pod) int {
		if p == nil {
			return 0
		}
		if c := pods.Condition(p, corev1.PodReady); c != nil && c.Status == corev1.ConditionTrue {
			return 0
		}
		return 1
	}
	b.notReady += is(now) - is(before)
	b.peak = max(b.peak, b.notReady)
}

func (b *bed) unready() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.notReady
}

// addNodes adds nodes with their proxies.
func (b *bed) addNodes(n int) {
	for i := range n {
		name := fmt.Sprintf("node-%d", i)
		b.fleet.add(name)
		b.mu.Lock()
		b.nodes[name] = &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Status: corev1.NodeStatus{
				Addresses:  []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}},
				Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}},
			},
		}
		b.mu.Unlock()
	}
}

// addPod adds a pod that runs and is ready.
func (b *bed) addPod(name, node string, change ...func(*corev1.Pod)) {
	b.t.Helper()
	yes := true
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: b.uid(),
			Labels: map[string]string{"app": "web"}, CreationTimestamp: metav1.Now(),
			Annotations: map[string]string{"other": "kept"}},
		Spec: corev1.PodSpec{
			NodeName: node, ServiceAccountName: "web", RestartPolicy: corev1.RestartPolicyAlways,
			Containers: []corev1.Container{
				{Name: "app", Image: "app:1", SecurityContext: &corev1.SecurityContext{RunAsNonRoot: &yes},
					Env: []corev1.EnvVar{{Name: "A", Value: "b"}}},
				{Name: "side", Image: "side:1"},
			},
		},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "192.0.2.9"},
	}
	for _, f := range change {
		f(pod)
	}
	if pod.Status.ContainerStatuses == nil && node != "" {
		for _, c := range pod.Spec.Containers {
			pod.Status.ContainerStatuses = append(pod.Status.ContainerStatuses, corev1.ContainerStatus{
				Name: c.Name, Image: "docker.io/library/" + c.Image, ImageID: "id of " + c.Image,
				ContainerID: "containerd://first-" + c.Name + "-" + string(pod.UID), Ready: true,
				State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.Now()}},
			})
		}
		setReady(pod, true)
	}
	if err := b.store(client.ObjectKeyFromObject(pod), nil, pod); err != nil {
		b.t.Error(err)
	}
}

func (b *bed) uid() types.UID {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.serial++
	return types.UID(fmt.Sprintf("pod-uid-%05d", b.serial))
}

// addPods adds n pods on as many of the nodes as there are.
func (b *bed) addPods(n, nodes int, change ...func(*corev1.Pod)) {
	for i := range n {
		b.addPod(fmt.Sprintf("web-%d", i), fmt.Sprintf("node-%d", i%nodes), change...)
	}
	time.Sleep(2 * cacheLag) // the cache has them all
}

func gated(p *corev1.Pod) {
	p.Spec.ReadinessGates = []corev1.PodReadinessGate{{ConditionType: inplace.ReadyGate}}
	p.Status.Conditions = []corev1.PodCondition{{Type: inplace.ReadyGate, Status: corev1.ConditionTrue,
		LastTransitionTime: metav1.Now()}}
}

func (b *bed) pod(name string) *corev1.Pod {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.real[types.NamespacedName{Namespace: "ns", Name: name}]
}

func (b *bed) pods() []*corev1.Pod {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.SortedFunc(maps.Values(b.real), func(x, y *corev1.Pod) int { return strings.Compare(x.Name, y.Name) })
}

// images are those that run in a container of the pods, by image.
func (b *bed) images(container string) map[string]int {
	counts := map[string]int{}
	for _, pod := range b.pods() {
		counts[runningImage(pod, container)]++
	}
	return counts
}

func runningImage(pod *corev1.Pod, name string) string {
	cs := pods.Status(pod, name)
	if cs == nil || cs.State.Running == nil {
		return ""
	}
	return strings.TrimPrefix(cs.Image, "docker.io/library/")
}

func number(n int) *intstr.IntOrString {
	v := intstr.FromInt32(int32(n))
	return &v
}

func percent(text string) *intstr.IntOrString {
	v := intstr.FromString(text)
	return &v
}

func all() inplace.Target {
	return inplace.Target{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}}
}

func to(image string) []change { return []change{{Name: "app", Image: image}} }

// create makes a rollout as the API server does with the CRD's defaults.
func (b *bed) create(name string, s spec) {
	b.t.Helper()
	if s.Strategy.ProgressDeadlineSeconds == 0 {
		s.Strategy.ProgressDeadlineSeconds = 600
	}
	if s.Strategy.OnFailure == "" {
		s.Strategy.OnFailure = inplace.Rollback
	}
	r := &rollout{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID("uid-" + name),
		Generation: 1, CreationTimestamp: metav1.Now()}, Spec: s}
	if err := b.api.Create(context.Background(), r); err != nil {
		b.t.Fatal(err)
	}
	b.changed(r)
}

// edit changes a rollout as a user does.
func (b *bed) edit(name string, change func(*rollout)) {
	b.t.Helper()
	for {
		r := b.get(name)
		change(r)
		r.Generation++
		err := b.api.Update(context.Background(), r)
		if apierrors.IsConflict(err) {
			continue
		}
		if err != nil {
			b.t.Fatal(err)
		}
		b.changed(r)
		return
	}
}

func (b *bed) delete(o client.Object) {
	b.t.Helper()
	o.SetNamespace("ns")
	if err := b.api.Delete(context.Background(), o); err != nil {
		b.t.Fatal(err)
	}
	b.changed(o)
}

// get is the rollout, or nil when it is gone.
func (b *bed) get(name string) *rollout {
	b.t.Helper()
	var r rollout
	err := b.api.Get(context.Background(), types.NamespacedName{Namespace: "ns", Name: name}, &r)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		b.t.Fatal(err)
	}
	return &r
}

// until waits for the rollout to be so, in the bubble's time, and returns it.
func (b *bed) until(what, name string, within time.Duration, so func(*rollout) bool) *rollout {
	b.t.Helper()
	step := max(within/1000, 10*time.Millisecond)
	for end := time.Now().Add(within); ; time.Sleep(step) {
		synctest.Wait()
		r := b.get(name)
		if so(r) {
			return r
		}
		if time.Now().After(end) {
			if r != nil {
				b.t.Fatalf("rollout %s not %s within %s: %+v\nevents:\n%s\nimages %v\n%s", name, what, within, r.Status,
					b.told(), b.images("app"), b.dump())
			}
			b.t.Fatalf("rollout %s not %s within %s: it is gone", name, what, within)
		}
	}
}

// dump is what there is to know of pods that do not run what they should.
func (b *bed) dump() string {
	var lines []string
	for _, pod := range b.pods() {
		if len(lines) > 5 || runningImage(pod, "app") == pod.Spec.Containers[0].Image &&
			pod.Spec.Containers[0].Image == "app:2" {
			continue
		}
		lines = append(lines, fmt.Sprintf("%s %s: spec %s, status %+v, mark %s", pod.Name, pod.UID,
			pod.Spec.Containers[0].Image, pod.Status.ContainerStatuses[:min(1, len(pod.Status.ContainerStatuses))],
			pod.Annotations[inplace.PodStateAnnotation]))
		if w := b.r.knownWork(types.NamespacedName{Namespace: "ns", Name: "all"}); w != nil {
			lines = append(lines, fmt.Sprintf("   %+v", w))
		}
	}
	return strings.Join(lines, "\n")
}

// outdated returns true if a pod is of an older version than the other one.
func outdated(a, b *corev1.Pod) bool {
	var f objects.Freshness
	f.Wrote(b)
	return f.Stale(a)
}

func ended(r *rollout) bool {
	return r != nil && r.Status.CompletionTime != nil && len(r.Finalizers) == 0
}
func gone(r *rollout) bool { return r == nil }

// condition is a condition's status and reason: "True RolledOut".
func condition(r *rollout, kind string) string {
	c := meta.FindStatusCondition(r.Status.Conditions, kind)
	if c == nil {
		return ""
	}
	return string(c.Status) + " " + c.Reason
}

func (b *bed) want(r *rollout, complete, numbers string) {
	b.t.Helper()
	s := r.Status
	got := fmt.Sprintf("%d/%d/%d/%d/%d", s.Desired, s.Updated, s.Ready, s.Unavailable, s.Failed)
	if got != numbers || condition(r, inplace.ConditionComplete) != complete {
		b.t.Errorf("rollout %s: desired/updated/ready/unavailable/failed %s, Complete %q; want %s, %q; status %+v",
			r.Name, got, condition(r, inplace.ConditionComplete), numbers, complete, s)
	}
}
