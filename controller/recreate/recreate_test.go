// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package recreate_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/api/scheme"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
	"github.com/cri-proxy/cri-proxy/controller/pods"
	"github.com/cri-proxy/cri-proxy/controller/recreate"
	"github.com/cri-proxy/cri-proxy/controller/recreate/accept"
	"github.com/cri-proxy/cri-proxy/controller/retry"
	"github.com/cri-proxy/cri-proxy/test/fleet"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what must happen.
const patience = time.Minute

// Short names of the phases.
const (
	pending    = appsv1alpha1.ContainerRecreateRequestPending
	recreating = appsv1alpha1.ContainerRecreateRequestRecreating
	succeeded  = appsv1alpha1.ContainerRecreateRequestSucceeded
	failed     = appsv1alpha1.ContainerRecreateRequestFailed
	completed  = appsv1alpha1.ContainerRecreateRequestCompleted
)

type (
	request = appsv1alpha1.ContainerRecreateRequest
	spec    = appsv1alpha1.ContainerRecreateRequestSpec
	how     = appsv1alpha1.ContainerRecreateRequestStrategy
)

func pointer[T any](v T) *T { return &v }

// bed is a cluster of one node and one pod, with the API server in memory and the
// node behind real mutual TLS.
type bed struct {
	t        *testing.T
	node     *fleet.Node
	client   client.Client
	files    nodes.Files
	recorder *events.FakeRecorder

	offset  atomic.Int64 // the clock runs this many ns ahead
	stopped atomic.Int64 // in ns since 1970 when the clock stands still, else 0
	podWake chan struct{}
	// nodeWake has an element when the tracker has woken the reconciler.
	nodeWake chan struct{}
	unready  atomic.Bool // new containers do not become ready by themselves
	denies   atomic.Bool // the status of pods must not be changed

	mu     sync.Mutex
	writes []string
	told   []string

	r       *recreate.Reconciler
	tracker *nodes.Tracker[*opsv1.Operation]
	stop    func()
}

const podUID = "pod-uid"

// maxStreams is how many operations the controller follows at once.
const maxStreams = 16

// requestOf is the name of a request to the reconciler.
func requestOf(name string) reconcile.Request {
	return reconcile.Request{NamespacedName: types.NamespacedName{Namespace: "ns", Name: name}}
}

// onNode is the operation on a container for a request.
func onNode(name, container string) nodes.Key {
	return nodes.Key{For: requestOf(name), Node: "node-1", UID: "uid-" + name + "." + container}
}

func newBed(t *testing.T, change ...func(*corev1.Pod)) *bed {
	t.Helper()
	ca := fleet.NewCA(t)
	b := &bed{t: t, files: ca.Issue("cri-controller"), podWake: make(chan struct{}, 1),
		nodeWake: make(chan struct{}, 1),
		recorder: events.NewFakeRecorder(1000)}
	b.node = fleet.Serve(t, ca.Issue("node-1"))
	b.node.Swapped = b.kubelet

	sidecar := corev1.ContainerRestartPolicyAlways
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "pod", UID: podUID},
		Spec: corev1.PodSpec{
			NodeName: "node-1", RestartPolicy: corev1.RestartPolicyAlways,
			Containers: []corev1.Container{{Name: "app"}, {Name: "web"}},
			InitContainers: []corev1.Container{
				{Name: "setup"}, {Name: "mesh", RestartPolicy: &sidecar},
			},
		},
		Status: corev1.PodStatus{Phase: corev1.PodRunning,
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
	}
	running := corev1.ContainerState{
		Running: &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(time.Now().Add(-time.Hour))}}
	for _, name := range []string{"app", "web"} {
		pod.Status.ContainerStatuses = append(pod.Status.ContainerStatuses,
			corev1.ContainerStatus{Name: name, ContainerID: "containerd://old-" + name, Ready: true, State: running})
		b.node.Run(podUID, name, "old-"+name, 0)
	}
	pod.Status.InitContainerStatuses = []corev1.ContainerStatus{
		{Name: "setup", ContainerID: "containerd://old-setup",
			State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}},
		{Name: "mesh", ContainerID: "containerd://old-mesh", Ready: true, State: running},
	}
	b.node.Run(podUID, "mesh", "old-mesh", 0)
	for _, f := range change {
		f(pod)
	}
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-1",
		Annotations: map[string]string{nodes.AddressAnnotation: b.node.Address}}}

	types, err := scheme.New()
	if err != nil {
		t.Fatal(err)
	}
	// Without managed fields, which nobody reads and most of the time would go into.
	tracker := clienttesting.NewObjectTracker(types, serializer.NewCodecFactory(types).UniversalDecoder())
	b.client = fake.NewClientBuilder().WithScheme(types).WithObjectTracker(tracker).WithObjects(pod, node).
		WithStatusSubresource(&request{}, &corev1.Pod{}).
		WithIndex(&request{}, recreate.PodNameIndex, recreate.IndexPodName).Build()
	b.start()
	t.Cleanup(func() { b.stop() })
	return b
}

// start runs a controller; a second call is a controller restart.
func (b *bed) start() {
	b.t.Helper()
	if b.stop != nil {
		b.stop()
	}
	commands, err := nodes.New(b.files, nil, logrus.New())
	if err != nil {
		b.t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	wrote := func(what string, o client.Object) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.writes = append(b.writes, fmt.Sprintf("%s %T", what, o))
	}
	counting := interceptor.NewClient(b.client.(client.WithWatch), interceptor.Funcs{
		Patch: func(ctx context.Context, c client.WithWatch, o client.Object, p client.Patch,
			opts ...client.PatchOption) error {
			wrote("patch", o)
			return c.Patch(ctx, o, p, opts...)
		},
		SubResourcePatch: func(ctx context.Context, c client.Client, sub string, o client.Object, p client.Patch,
			opts ...client.SubResourcePatchOption) error {
			if _, ok := o.(*corev1.Pod); ok && b.denies.Load() {
				return apierrors.NewForbidden(schema.GroupResource{Resource: "pods"}, o.GetName(),
					errors.New("a policy keeps pods in service"))
			}
			wrote("patch "+sub, o)
			return c.SubResource(sub).Patch(ctx, o, p, opts...)
		},
		Delete: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.DeleteOption) error {
			wrote("delete", o)
			return c.Delete(ctx, o, opts...)
		},
	})
	b.r = &recreate.Reconciler{
		Client: counting, APIReader: b.client, Nodes: commands, Recorder: b.recorder, Log: log,
		Now: func() time.Time {
			now := time.Now()
			if at := b.stopped.Load(); at != 0 {
				now = time.Unix(0, at)
			}
			return now.Add(time.Duration(b.offset.Load()))
		},
	}
	b.tracker = b.r.Prepare(commands, maxStreams)
	ctx, cancel := context.WithCancel(context.Background())
	if err := b.tracker.Source().Start(ctx, wakes{to: b.nodeWake}); err != nil {
		b.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = b.tracker.Start(ctx)
	}()
	b.stop = sync.OnceFunc(func() {
		cancel()
		<-done
		_ = commands.Close()
	})
}

// kubelet shows a new container in the pod status.
func (b *bed) kubelet(_, name, id string, attempt int32) {
	b.setStatus(name, func(s *corev1.ContainerStatus) {
		s.ContainerID, s.RestartCount, s.Ready = "containerd://"+id, attempt, !b.unready.Load()
		s.State = corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(b.r.Clock())}}
	})
}

func (b *bed) setStatus(name string, change func(*corev1.ContainerStatus)) {
	b.changePod(func(p *corev1.Pod) {
		if s := pods.Status(p, name); s != nil {
			change(s)
		}
	})
}

func (b *bed) changePod(change func(*corev1.Pod)) {
	for {
		var pod corev1.Pod
		if b.client.Get(context.Background(), types.NamespacedName{Namespace: "ns", Name: "pod"}, &pod) != nil {
			return // deleted
		}
		change(&pod)
		err := b.client.Status().Update(context.Background(), &pod)
		if apierrors.IsConflict(err) {
			continue
		}
		if err != nil {
			b.t.Error(err)
		}
		b.wake()
		return
	}
}

func (b *bed) wake() { signal(b.podWake) }

func signal(to chan<- struct{}) {
	select {
	case to <- struct{}{}:
	default:
	}
}

// wakes is the part of a work queue by which the tracker wakes the reconciler.
type wakes struct {
	workqueue.TypedRateLimitingInterface[reconcile.Request]
	to chan<- struct{}
}

func (w wakes) AddAfter(reconcile.Request, time.Duration) { signal(w.to) }

// after moves the clock ahead.
func (b *bed) after(d time.Duration) {
	b.offset.Add(int64(d))
	b.wake()
}

// stopClock lets no time pass but what after adds: how often a status is written that has only
// other numbers depends on how long things take.
func (b *bed) stopClock() { b.stopped.Store(time.Now().UnixNano()) }

func (b *bed) create(name string, s spec) {
	b.t.Helper()
	s.PodName = "pod"
	b.createFor(name, s)
}

func (b *bed) createFor(name string, s spec) {
	b.t.Helper()
	b.createWith(name, s, nil)
}

func (b *bed) createWith(name string, s spec, annotations map[string]string) {
	b.t.Helper()
	if s.Strategy == nil {
		s.Strategy = &how{}
	}
	crr := &request{ObjectMeta: metav1.ObjectMeta{
		Namespace: "ns", Name: name, UID: types.UID("uid-" + name), CreationTimestamp: metav1.NewTime(b.r.Clock()),
		Annotations: annotations,
	}, Spec: s}
	if err := b.client.Create(context.Background(), crr); err != nil {
		b.t.Fatal(err)
	}
}

func containers(names ...string) []appsv1alpha1.ContainerRecreateRequestContainer {
	var list []appsv1alpha1.ContainerRecreateRequestContainer
	for _, n := range names {
		list = append(list, appsv1alpha1.ContainerRecreateRequestContainer{Name: n})
	}
	return list
}

// get is the request, or nil when it is gone.
func (b *bed) get(name string) *request {
	b.t.Helper()
	var crr request
	err := b.client.Get(context.Background(), types.NamespacedName{Namespace: "ns", Name: name}, &crr)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		b.t.Fatal(err)
	}
	return &crr
}

// until reconciles the requests as a manager would, on the events a manager gets
// and when the reconciler asked for it, until done says so of the first. Time alone
// brings nothing further: what no event and no requeue reaches fails the test.
func (b *bed) until(what string, done func(*request) bool, names ...string) *request {
	b.t.Helper()
	late := time.After(patience)
	versions := map[string]string{}
	for {
		var wait time.Duration
		for _, name := range names {
			result, err := b.r.Reconcile(context.Background(),
				reconcile.Request{NamespacedName: types.NamespacedName{Namespace: "ns", Name: name}})
			if err != nil {
				b.t.Fatal(err)
			}
			wait = retry.Sooner(wait, result.RequeueAfter)
			if crr := b.get(name); crr != nil && versions[name] != crr.ResourceVersion {
				versions[name], wait = crr.ResourceVersion, 1 // its own watch event
			}
		}
		if crr := b.get(names[0]); done(crr) {
			return crr
		}
		var timer <-chan time.Time
		if wait > 0 {
			timer = time.After(wait)
		}
		select {
		case <-timer:
		case <-b.nodeWake:
		case <-b.podWake:
		case <-late:
			b.t.Fatalf("waiting until %s: request is %s; node got %v", what, describe(b.get(names[0])),
				b.node.Commanded())
		}
	}
}

func describe(crr *request) string {
	if crr == nil {
		return "gone"
	}
	text, err := json.Marshal(crr.Status)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

func isCompleted(crr *request) bool { return crr != nil && crr.Status.CompletionTime != nil }

func retired(crr *request) bool { return isCompleted(crr) && len(crr.Finalizers) == 0 }

// states writes the container states as "app Succeeded killed; web Failed: message".
func states(crr *request) string {
	var list []string
	for _, s := range crr.Status.ContainerRecreateStates {
		text := s.Name + " " + string(s.Phase)
		if s.IsKilled {
			text += " killed"
		}
		if s.Message != "" {
			text += ": " + s.Message
		}
		list = append(list, text)
	}
	return strings.Join(list, "; ")
}

func (b *bed) wantStates(crr *request, want string) {
	b.t.Helper()
	if got := states(crr); got != want {
		b.t.Errorf("states:\n  %s\nwant:\n  %s", got, want)
	}
}

func wantContains(t *testing.T, what, got, want string) {
	t.Helper()
	if !strings.Contains(got, want) {
		t.Errorf("%s is %q, want it to contain %q", what, got, want)
	}
}

// eventsSoFar are all Events, "type reason note".
func (b *bed) eventsSoFar() string {
	for {
		select {
		case e := <-b.recorder.Events:
			b.told = append(b.told, e)
		default:
			return strings.Join(b.told, "\n")
		}
	}
}

func (b *bed) phaseIs(phase appsv1alpha1.ContainerRecreateRequestPhase, container string) func(*request) bool {
	return func(crr *request) bool {
		return slices.ContainsFunc(crr.Status.ContainerRecreateStates,
			func(s appsv1alpha1.ContainerRecreateRequestContainerRecreateState) bool {
				return s.Name == container && s.Phase == phase
			})
	}
}

// restarted says that the new container of request a's app runs, as the controller knows, and that
// the request goes on. The states alone are the same from when the old container was stopped.
func (b *bed) restarted(crr *request) bool {
	op := b.r.LastHeard(onNode("a", "app"))
	return op.GetPhase() == opsv1.Phase_PHASE_SUCCEEDED && states(crr) == "app Recreating killed"
}

func TestRecreate(t *testing.T) {
	b := newBed(t)
	b.stopClock()
	b.create("a", spec{Containers: containers("app")})
	crr := b.until("completed", retired, "a")
	b.wantStates(crr, "app Succeeded killed")
	if crr.Status.Phase != completed || crr.Status.Message != "" {
		t.Errorf("phase %s, message %q", crr.Status.Phase, crr.Status.Message)
	}
	for label, want := range map[string]string{appsv1alpha1.PodUIDLabel: podUID, appsv1alpha1.NodeNameLabel: "node-1",
		appsv1alpha1.ActiveLabel: ""} {
		if got := crr.Labels[label]; got != want {
			t.Errorf("label %s is %q, want %q", label, got, want)
		}
	}
	if c := crr.Spec.Containers[0].StatusContext; c == nil || c.ContainerID != "containerd://old-app" ||
		c.RestartCount != 0 {
		t.Errorf("statusContext is %+v", c)
	}
	if got, want := crr.Annotations[appsv1alpha1.SyncContainerStatusesAnnotation],
		`[{"name":"app","ready":true,"restartCount":1,"containerID":"containerd://new1"}]`; got != want {
		t.Errorf("snapshot is %s, want %s", got, want)
	}
	req := b.node.Requests()[0]
	if len(b.node.Requests()) != 1 || req.GetUid() != "uid-a.app" || req.GetPod().GetUid() != podUID ||
		req.GetForce() ||
		req.GetContainers()[0].GetExpectedContainerId() != "containerd://old-app" ||
		req.GetContainers()[0].GracePeriodSeconds != nil ||
		req.GetRequester() != "ContainerRecreateRequest/ns/a/uid-a" {
		t.Errorf("node got %v", b.node.Requests())
	}
	b.mu.Lock()
	writes := b.writes
	b.mu.Unlock()
	if len(writes) > 4 {
		t.Errorf("%d writes, want at most 4: %q", len(writes), writes)
	}
	told := b.eventsSoFar()
	wantContains(t, "events", told,
		"Normal RestartedContainer Restarted container app in place for ContainerRecreateRequest a, it was "+
			"down for 6ms")
	if strings.Contains(told, "Warning") {
		t.Errorf("events: %s", told)
	}
}

func TestTwoContainers(t *testing.T) {
	t.Run("one after another: the second waits for the end of the first", func(t *testing.T) {
		b := newBed(t)
		b.unready.Store(true)
		stop, start := b.node.Hold("app", opsv1.Phase_PHASE_STOPPING), b.node.Hold("app", opsv1.Phase_PHASE_STARTING)
		b.create("a", spec{Containers: containers("app", "web")})
		b.wantStates(b.until("app is being stopped", b.phaseIs(recreating, "app"), "a"), "app Recreating; web Pending")
		b.after(time.Minute)
		if got := b.node.Commanded(); !slices.Equal(got, []string{"app"}) {
			t.Errorf("node got %v before app had been stopped", got)
		}
		stop()
		b.until("web is stopped while app is not back",
			func(crr *request) bool { return states(crr) == "app Recreating killed; web Recreating killed" }, "a")
		start()
		b.unready.Store(false)
		b.until("both are new",
			func(*request) bool { return b.node.Operation("uid-a.app").GetPhase() == opsv1.Phase_PHASE_SUCCEEDED }, "a")
		for _, name := range []string{"app", "web"} {
			b.setStatus(name, func(s *corev1.ContainerStatus) { s.Ready = true })
		}
		b.wantStates(b.until("completed", isCompleted, "a"), "app Succeeded killed; web Succeeded killed")
		if got := b.node.Commanded(); !slices.Equal(got, []string{"app", "web"}) {
			t.Errorf("node got %v", got)
		}
	})
	t.Run("one after another, with another controller in the middle", func(t *testing.T) {
		b := newBed(t)
		stop := b.node.Hold("app", opsv1.Phase_PHASE_STOPPING)
		b.create("a", spec{Containers: containers("app", "web")})
		b.until("app is being stopped", b.phaseIs(recreating, "app"), "a")
		b.start()
		stop()
		b.wantStates(b.until("completed", isCompleted, "a"), "app Succeeded killed; web Succeeded killed")
		if got := b.node.Commanded(); !slices.Equal(got, []string{"app", "web"}) {
			t.Errorf("node got %v", got)
		}
	})
	t.Run("one had ended by itself", func(t *testing.T) {
		b := newBed(t)
		b.node.Fail("app", &opsv1.ContainerOperation{Phase: opsv1.Phase_PHASE_FAILED, Reason: "ContainerNotRunning",
			Message: "container is not running"})
		stop := b.node.Hold("web", opsv1.Phase_PHASE_STOPPING)
		b.create("a", spec{Containers: containers("app", "web", "mesh")})
		b.until("web is being stopped", b.phaseIs(recreating, "web"), "a")
		stop() // what was found out of app is not in what comes after
		b.wantStates(b.until("completed", isCompleted, "a"),
			"app Failed: container is not running; web Succeeded killed; mesh Succeeded killed")
	})
	// Another controller finds out again what the one before knew.
	t.Run("one had ended by itself, and another controller comes", func(t *testing.T) {
		for name, end := range map[string]func(b *bed) (kubelet func()){
			"the node knows": func(b *bed) func() {
				b.node.Fail("app",
					&opsv1.ContainerOperation{Phase: opsv1.Phase_PHASE_FAILED, Reason: "ContainerNotRunning",
						Message: "it ended"})
				return func() {}
			},
			"the pod tells that it ended": func(b *bed) func() {
				b.node.Run(podUID, "app", "another", 1) // refused
				return func() {
					b.setStatus("app", func(s *corev1.ContainerStatus) {
						s.State = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}
					})
				}
			},
			"the pod tells that kubelet started it": func(b *bed) func() {
				b.node.Run(podUID, "app", "another", 1)
				return func() { b.kubelet("", "app", "another", 1) }
			},
		} {
			for _, silent := range []bool{false, true} {
				if silent && name != "the node knows" {
					continue // it takes seconds
				}
				t.Run(fmt.Sprintf("%s, silent %v", name, silent), func(t *testing.T) {
					b := newBed(t)
					kubelet := end(b)
					stop := b.node.Hold("web", opsv1.Phase_PHASE_STOPPING)
					b.create("a", spec{Containers: containers("app", "web", "mesh")})
					b.until("web is being stopped", b.phaseIs(recreating, "web"), "a")
					kubelet()
					var up func()
					if silent {
						up = b.node.Down()
					}
					b.start()
					if silent {
						b.until("the node is missed", func(crr *request) bool { return crr.Status.Message != "" }, "a")
						up()
					}
					stop()
					crr := b.until("completed", isCompleted, "a")
					if got := states(crr); !strings.HasPrefix(got, "app Failed") ||
						!strings.HasSuffix(got, "web Succeeded killed; mesh Succeeded killed") {
						t.Errorf("got %s", got)
					}
				})
			}
		}
	})
	t.Run("together", func(t *testing.T) {
		b := newBed(t)
		release := b.node.Hold("app", opsv1.Phase_PHASE_STOPPING)
		b.createWith("a", spec{PodName: "pod", Containers: containers("app", "web")},
			map[string]string{appsv1alpha1.ParallelRecreateAnnotation: "true"})
		crr := b.until("web is done while app is not", func(crr *request) bool {
			return b.phaseIs(succeeded, "web")(crr) && b.phaseIs(recreating, "app")(crr)
		}, "a")
		b.wantStates(crr, "app Recreating; web Succeeded killed")
		release()
		b.wantStates(b.until("completed", isCompleted, "a"), "app Succeeded killed; web Succeeded killed")
	})
	t.Run("ordered: the second waits until the first is ready", func(t *testing.T) {
		b := newBed(t)
		b.unready.Store(true)
		b.create("a", spec{Containers: containers("app", "web"), Strategy: &how{OrderedRecreate: true}})
		crr := b.until("app is stopped and new", func(crr *request) bool {
			return b.node.ID(podUID, "app") == "new1" && strings.HasPrefix(states(crr), "app Recreating killed")
		}, "a")
		b.wantStates(crr, "app Recreating killed; web Pending")
		if got := b.node.Commanded(); !slices.Equal(got, []string{"app"}) {
			t.Errorf("node got %v before app was ready", got)
		}
		b.unready.Store(false)
		b.setStatus("app", func(s *corev1.ContainerStatus) { s.Ready = true })
		b.wantStates(b.until("completed", isCompleted, "a"), "app Succeeded killed; web Succeeded killed")
		if got := b.node.Commanded(); !slices.Equal(got, []string{"app", "web"}) {
			t.Errorf("node got %v", got)
		}
	})
	t.Run("a container's own strategy", func(t *testing.T) {
		b := newBed(t)
		list := containers("app", "web")
		list[1].Strategy = &appsv1alpha1.ContainerRecreateRequestContainerStrategy{
			ForceRecreate: pointer(true), TerminationGracePeriodSeconds: pointer(int64(7)),
		}
		b.create("a", spec{Containers: list, Strategy: &how{TerminationGracePeriodSeconds: pointer(int64(3))}})
		b.until("completed", isCompleted, "a")
		app, web := b.node.Requests()[0], b.node.Requests()[1]
		if app.GetForce() || app.GetContainers()[0].GetGracePeriodSeconds() != 3 || !web.GetForce() ||
			web.GetContainers()[0].GetGracePeriodSeconds() != 7 {
			t.Errorf("node got %v", b.node.Requests())
		}
	})
}

func TestFailure(t *testing.T) {
	broken := &opsv1.ContainerOperation{Phase: opsv1.Phase_PHASE_FAILED, Reason: "StartFailed",
		Message: "starting the new container: no such file", Warnings: []string{"preStop hook failed: exit 1"}}
	t.Run("Fail leaves the rest alone", func(t *testing.T) {
		b := newBed(t)
		b.node.Fail("app", broken)
		b.create("a", spec{Containers: containers("app", "web"), Strategy: &how{OrderedRecreate: true}})
		crr := b.until("completed", isCompleted, "a")
		b.wantStates(crr,
			"app Failed: starting the new container: no such file; web Failed: left alone: container app "+
				"failed and failurePolicy is Fail")
		wantContains(t, "message", crr.Status.Message, "2 of 2 containers failed: app: starting")
		if got := b.node.Commanded(); !slices.Equal(got, []string{"app"}) {
			t.Errorf("node got %v", got)
		}
		wantContains(t, "events", b.eventsSoFar(), "Warning RestartFailed")
		wantContains(t, "events", b.eventsSoFar(), "Warning FailedPreStopHook PreStopHook failed")
	})
	t.Run("Ignore goes on", func(t *testing.T) {
		b := newBed(t)
		b.node.Fail("app", broken)
		b.create("a",
			spec{Containers: containers("app", "web"), Strategy: &how{OrderedRecreate: true, FailurePolicy: "Ignore"}})
		b.wantStates(b.until("completed", isCompleted, "a"),
			"app Failed: starting the new container: no such file; web Succeeded killed")
	})
	t.Run("Fail cancels what waits on the node", func(t *testing.T) {
		b := newBed(t)
		// Another operation holds web's slot, and app's own one until web waits.
		web := b.node.Hold("web", opsv1.Phase_PHASE_STOPPING)
		defer web()
		b.create("first", spec{Containers: containers("web")})
		b.until("web is being stopped", func(*request) bool {
			return b.node.Operation("uid-first.web").GetPhase() == opsv1.Phase_PHASE_STOPPING
		}, "first")
		app := b.node.Hold("app", opsv1.Phase_PHASE_STAGING)
		b.node.Fail("app", broken)
		b.createWith("a", spec{PodName: "pod", Containers: containers("app", "web")},
			map[string]string{appsv1alpha1.ParallelRecreateAnnotation: "true"})
		b.until("both commanded", func(*request) bool { return len(b.node.Commanded()) == 3 }, "a")
		app()
		b.wantStates(b.until("completed", isCompleted, "a"),
			"app Failed: starting the new container: no such file; web Failed: not recreated: an earlier container "+
				"of the "+
				"request failed and failurePolicy is Fail")
		if id := b.node.ID(podUID, "web"); id != "old-web" {
			t.Errorf("web is %s", id)
		}
	})
	t.Run("refused by the node", func(t *testing.T) {
		b := newBed(t)
		b.node.Refuse(status.Error(codes.FailedPrecondition, `container "app" is not running`))
		b.create("a", spec{Containers: containers("app")})
		b.wantStates(b.until("completed", isCompleted, "a"), `app Failed: container "app" is not running`)
	})
}

func TestDeadline(t *testing.T) {
	tests := []struct {
		name   string
		hold   opsv1.Phase
		want   string
		killed bool
	}{
		{"cancels what has not stopped anything", opsv1.Phase_PHASE_STAGING,
			"app Failed: recreating has exceeded the activeDeadlineSeconds: the container had not been stopped and " +
				"was left alone", false},
		{"is too late once it has", opsv1.Phase_PHASE_STARTING,
			"app Failed killed: recreating has exceeded the activeDeadlineSeconds: the container was already being " +
				"stopped, " +
				"the node finishes the restart", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBed(t)
			release := b.node.Hold("app", tt.hold)
			defer release()
			b.create("a", spec{Containers: containers("app"), ActiveDeadlineSeconds: pointer(int64(300))})
			b.until("the node works on it", func(*request) bool {
				return b.node.Operation("uid-a.app").GetPhase() == tt.hold
			}, "a")
			b.until("the status says so", func(crr *request) bool {
				return len(crr.Status.ContainerRecreateStates) == 1 &&
					crr.Status.ContainerRecreateStates[0].IsKilled == tt.killed &&
					crr.Status.ContainerRecreateStates[0].Phase == recreating
			}, "a")
			b.after(301 * time.Second)
			crr := b.until("completed", retired, "a")
			b.wantStates(crr, tt.want)
			wantContains(t, "message", crr.Status.Message, "recreating has exceeded the activeDeadlineSeconds")
			if crr.Status.Message != "recreating has exceeded the activeDeadlineSeconds" {
				t.Errorf("message %q", crr.Status.Message)
			}
			if !slices.Equal(b.node.Cancels(), []string{"uid-a.app"}) {
				t.Errorf("cancelled: %v", b.node.Cancels())
			}
		})
	}
	t.Run("new container not ready in time", func(t *testing.T) {
		b := newBed(t)
		b.unready.Store(true)
		b.create("a", spec{Containers: containers("app"), ActiveDeadlineSeconds: pointer(int64(300))})
		b.until("the new container runs", b.restarted, "a")
		b.after(301 * time.Second)
		b.wantStates(b.until("completed", isCompleted, "a"),
			"app Failed killed: recreating has exceeded the activeDeadlineSeconds: the new container is not ready")
	})
	t.Run("passed before the controller saw the request", func(t *testing.T) {
		b := newBed(t)
		b.create("a", spec{Containers: containers("app"), ActiveDeadlineSeconds: pointer(int64(300))})
		b.after(301 * time.Second)
		crr := b.until("completed", isCompleted, "a")
		b.wantStates(crr, "app Failed: recreating has exceeded the activeDeadlineSeconds: nothing had been done yet")
		if len(b.node.Requests()) != 0 {
			t.Errorf("node got %v", b.node.Requests())
		}
	})
}

func TestDeleted(t *testing.T) {
	b := newBed(t)
	release := b.node.Hold("app", opsv1.Phase_PHASE_STAGING)
	defer release()
	b.create("a", spec{Containers: containers("app")})
	crr := b.until("under way", b.phaseIs(recreating, "app"), "a")
	if err := b.client.Delete(context.Background(), crr); err != nil {
		t.Fatal(err)
	}
	b.until("gone", func(crr *request) bool { return crr == nil }, "a")
	if op := b.node.Operation("uid-a.app"); op.GetPhase() != opsv1.Phase_PHASE_CANCELLED ||
		op.GetMessage() != "the ContainerRecreateRequest was deleted" {
		t.Errorf("operation is %v", op)
	}
	if id := b.node.ID(podUID, "app"); id != "old-app" {
		t.Errorf("container is %s", id)
	}
}

func TestDeletedWhileNodeIsDown(t *testing.T) {
	b := newBed(t)
	release := b.node.Hold("app", opsv1.Phase_PHASE_STAGING)
	defer release()
	b.create("a", spec{Containers: containers("app")})
	crr := b.until("under way", b.phaseIs(recreating, "app"), "a")
	b.node.Down()
	if err := b.client.Delete(context.Background(), crr); err != nil {
		t.Fatal(err)
	}
	if r, err := b.r.Reconcile(context.Background(),
		reconcile.Request{NamespacedName: client.ObjectKeyFromObject(crr)}); err != nil ||
		r.RequeueAfter == 0 || b.get("a") == nil {
		t.Fatalf("result %v, error %v, request %s; want it to wait for the node", r, err, describe(b.get("a")))
	}
	b.after(31 * time.Second)
	b.until("gone", func(crr *request) bool { return crr == nil }, "a")
}

func TestNodeUnreachable(t *testing.T) {
	t.Run("and back", func(t *testing.T) {
		b := newBed(t)
		up := b.node.Down()
		b.create("a", spec{Containers: containers("app"), ActiveDeadlineSeconds: pointer(int64(300))})
		crr := b.until("the message says so",
			func(crr *request) bool { return strings.HasPrefix(crr.Status.Message, "NodeUnreachable: ") }, "a")
		wantContains(t, "message", crr.Status.Message, "node node-1 does not answer at "+b.node.Address)
		wantContains(t, "message", crr.Status.Message, "is cri-proxy running on the node")
		b.wantStates(crr, "app Pending")
		b.after(2 * time.Minute) // there is a deadline: it decides
		up()
		crr = b.until("completed", isCompleted, "a")
		b.wantStates(crr, "app Succeeded killed")
		if crr.Status.Message != "" {
			t.Errorf("message %q", crr.Status.Message)
		}
		if got := strings.Count(b.eventsSoFar(), "Warning NodeUnreachable"); got != 1 {
			t.Errorf("%d events of it, want 1:\n%s", got, b.eventsSoFar())
		}
	})
	t.Run("for good, without a deadline", func(t *testing.T) {
		b := newBed(t)
		b.node.Down()
		b.create("a", spec{Containers: containers("app")})
		b.until("noticed", func(*request) bool { return !b.r.SilentSince(b.get("a")).IsZero() }, "a")
		b.after(time.Minute + time.Second)
		crr := b.until("completed", retired, "a")
		wantContains(t, "message", crr.Status.Message,
			"daemon has not responded for a long time: node node-1 does not answer")
		wantContains(t, "states", states(crr), "app Failed: not recreated: node node-1 does not answer")
	})
	t.Run("in the middle of an operation", func(t *testing.T) {
		b := newBed(t)
		release := b.node.Hold("app", opsv1.Phase_PHASE_STOPPING)
		b.create("a", spec{Containers: containers("app")})
		b.until("under way", b.phaseIs(recreating, "app"), "a")
		up := b.node.Down()
		release()
		b.until("the message says so",
			func(crr *request) bool { return strings.HasPrefix(crr.Status.Message, "NodeUnreachable: ") }, "a")
		b.after(2 * time.Minute)
		up()
		b.wantStates(b.until("completed", isCompleted, "a"), "app Succeeded killed")
		if got := b.node.Commanded(); len(got) != 1 {
			t.Errorf("node got %v", got)
		}
	})
	t.Run("answers that it cannot now", func(t *testing.T) {
		b := newBed(t)
		b.node.Refuse(status.Error(codes.Unavailable, "the runtime is away"))
		b.create("a", spec{Containers: containers("app")})
		crr := b.until("the message says so", func(crr *request) bool { return crr.Status.Message != "" }, "a")
		if crr.Status.Message != "NodeUnavailable: the runtime is away" {
			t.Errorf("message %q", crr.Status.Message)
		}
		b.node.Refuse(nil)
		b.wantStates(b.until("completed", isCompleted, "a"), "app Succeeded killed")
	})
}

func TestSecondRequest(t *testing.T) {
	for _, force := range []bool{false, true} {
		t.Run(fmt.Sprintf("force %v", force), func(t *testing.T) {
			b := newBed(t)
			release := b.node.Hold("app", opsv1.Phase_PHASE_STOPPING)
			b.create("a", spec{Containers: containers("app")})
			b.until("under way", b.phaseIs(recreating, "app"), "a")
			b.create("b", spec{Containers: containers("app"), Strategy: &how{ForceRecreate: force}})
			crr := b.until("the second waits",
				func(crr *request) bool { return len(crr.Status.ContainerRecreateStates) > 0 },
				"b")
			b.wantStates(crr, "app Pending: waits for an earlier operation on this container")
			if crr.Status.Phase != pending {
				t.Errorf("phase %s", crr.Status.Phase)
			}
			release()
			second := b.until("both complete",
				func(crr *request) bool { return isCompleted(crr) && isCompleted(b.get("a")) },
				"b", "a")
			b.wantStates(b.get("a"), "app Succeeded killed")
			want, id := "app Succeeded", "new1"
			if force {
				want, id = "app Succeeded killed", "new2"
			}
			b.wantStates(second, want)
			if got := b.node.ID(podUID, "app"); got != id {
				t.Errorf("container is %s, want %s", got, id)
			}
		})
	}
	t.Run("accepted before, commanded after", func(t *testing.T) {
		b := newBed(t)
		up := b.node.Down()
		b.create("b", spec{Containers: containers("app"), ActiveDeadlineSeconds: pointer(int64(300))})
		b.until("accepted", func(crr *request) bool { return accept.Of(crr) != nil }, "b")
		up()
		b.create("a", spec{Containers: containers("app")})
		b.until("the first is done", isCompleted, "a")
		b.wantStates(b.until("completed", isCompleted, "b"), "app Succeeded")
	})
}

func TestContainerReplacedOtherwise(t *testing.T) {
	b := newBed(t)
	up := b.node.Down()
	b.create("a", spec{Containers: containers("app"), ActiveDeadlineSeconds: pointer(int64(300))})
	b.until("accepted", func(crr *request) bool { return accept.Of(crr) != nil }, "a")
	b.node.Run(podUID, "app", "crashed", 1)
	b.kubelet(podUID, "app", "crashed", 1)
	up()
	crr := b.until("completed", isCompleted, "a")
	wantContains(t, "states", states(crr),
		"app Failed: container app is no longer the one the request was made for (containerd://old-app)")
	if id := b.node.ID(podUID, "app"); id != "crashed" {
		t.Errorf("container is %s, want it left alone", id)
	}
}

func TestControllerRestart(t *testing.T) {
	for _, at := range []opsv1.Phase{opsv1.Phase_PHASE_STAGING, opsv1.Phase_PHASE_STOPPING,
		opsv1.Phase_PHASE_STARTING} {
		t.Run(at.String(), func(t *testing.T) {
			b := newBed(t)
			release := b.node.Hold("app", at)
			b.create("a", spec{Containers: containers("app", "web"), Strategy: &how{OrderedRecreate: true}})
			b.until("at the phase", func(*request) bool { return b.node.Operation("uid-a.app").GetPhase() == at }, "a")
			b.start()
			release()
			b.wantStates(b.until("completed", isCompleted, "a"), "app Succeeded killed; web Succeeded killed")
			if b.node.Started() != 2 {
				t.Errorf("%d containers were started, want 2", b.node.Started())
			}
		})
	}
	t.Run("after the node has forgotten the operation", func(t *testing.T) {
		b := newBed(t)
		b.unready.Store(true)
		b.create("a", spec{Containers: containers("app"), Strategy: &how{ForceRecreate: true}})
		b.until("the new container runs", b.restarted, "a")
		b.node.ForgetAll()
		b.start()
		b.unready.Store(false)
		b.setStatus("app", func(s *corev1.ContainerStatus) { s.Ready = true })
		b.wantStates(b.until("completed", isCompleted, "a"), "app Succeeded killed")
		if b.node.Started() != 1 {
			t.Errorf("%d containers were started, want 1", b.node.Started())
		}
	})
}

func TestStaleCache(t *testing.T) {
	b := newBed(t)
	b.create("a", spec{Containers: containers("app")})
	before := b.get("a")
	b.until("completed", retired, "a")
	// A reconcile that still sees the request as it was created.
	b.r.Client = interceptor.NewClient(b.client.(client.WithWatch), interceptor.Funcs{
		Get: func(ctx context.Context, c client.WithWatch, key client.ObjectKey, o client.Object,
			opts ...client.GetOption) error {
			if crr, ok := o.(*request); ok {
				before.DeepCopyInto(crr)
				return nil
			}
			return c.Get(ctx, key, o, opts...)
		},
	})
	result, err := b.r.Reconcile(context.Background(),
		reconcile.Request{NamespacedName: types.NamespacedName{Namespace: "ns", Name: "a"}})
	if err != nil || result.RequeueAfter != 200*time.Millisecond {
		t.Errorf("result %v, error %v", result, err)
	}
	if len(b.node.Requests()) != 1 || b.node.Started() != 1 {
		t.Errorf("node got %v", b.node.Commanded())
	}
	b.wantStates(b.get("a"), "app Succeeded killed")
}

func TestTTL(t *testing.T) {
	b := newBed(t)
	b.create("a", spec{Containers: containers("app"), TTLSecondsAfterFinished: pointer(int32(600))})
	b.until("completed", retired, "a")
	key := reconcile.Request{NamespacedName: types.NamespacedName{Namespace: "ns", Name: "a"}}
	result, err := b.r.Reconcile(context.Background(), key)
	if err != nil || result.RequeueAfter < 300*time.Second || result.RequeueAfter > 600*time.Second {
		t.Errorf("result %v, error %v", result, err)
	}
	b.after(601 * time.Second)
	b.until("gone", func(crr *request) bool { return crr == nil }, "a")
}

func TestDrain(t *testing.T) {
	gate := func(p *corev1.Pod) {
		p.Spec.ReadinessGates = []corev1.PodReadinessGate{{ConditionType: appsv1alpha1.KruisePodReadyConditionType}}
		p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{
			Type: appsv1alpha1.KruisePodReadyConditionType, Status: corev1.ConditionFalse,
			Message: `[{"userAgent":"Other","key":"x"}]`,
		})
	}
	conditions := func(b *bed) (gate, ready *corev1.PodCondition) {
		var pod corev1.Pod
		if err := b.client.Get(context.Background(), types.NamespacedName{Namespace: "ns", Name: "pod"},
			&pod); err != nil {
			b.t.Fatal(err)
		}
		return pods.Condition(&pod, appsv1alpha1.KruisePodReadyConditionType), pods.Condition(&pod, corev1.PodReady)
	}
	t.Run("with the gate", func(t *testing.T) {
		b := newBed(t, gate)
		b.stopClock()
		b.create("a",
			spec{Containers: containers("app"), Strategy: &how{UnreadyGracePeriodSeconds: pointer(int64(30))}})
		crr := b.until("draining", func(crr *request) bool { return crr.Status.Phase == recreating }, "a")
		b.wantStates(crr, "app Pending")
		if !slices.Contains(crr.Finalizers, appsv1alpha1.UnreadyAcquiredFinalizer) ||
			crr.Annotations[appsv1alpha1.UnreadyAcquiredAnnotation] == "" {
			t.Errorf("finalizers %v, annotations %v", crr.Finalizers, crr.Annotations)
		}
		c, ready := conditions(b)
		const want = `[{"userAgent":"Other","key":"x"},{"userAgent":"ContainerRecreateRequest","key":"ns/a"}]`
		if c.Status != corev1.ConditionFalse || c.Message != want {
			t.Errorf("condition %+v, want message %s", c, want)
		}
		if ready.Status != corev1.ConditionFalse {
			t.Errorf("pod is Ready")
		}
		if len(b.node.Requests()) != 0 {
			t.Errorf("node got %v before the drain was over", b.node.Commanded())
		}
		b.start() // the drain goes on where it was
		b.after(32 * time.Second)
		crr = b.until("completed", retired, "a")
		b.wantStates(crr, "app Succeeded killed")
		if c, _ := conditions(b); c.Status != corev1.ConditionFalse ||
			c.Message != `[{"userAgent":"Other","key":"x"}]` {
			t.Errorf("condition %+v, want only the other's key", c)
		}
		// One of the status for each state that is seen on the way (Pending, Recreating, killed,
		// Succeeded), the rest once each.
		if len(b.writes) > 9 {
			t.Errorf("%d writes, want at most 9: %q", len(b.writes), b.writes)
		}
	})
	t.Run("deleted while draining", func(t *testing.T) {
		b := newBed(t, gate)
		b.changePod(func(p *corev1.Pod) { pods.Condition(p, appsv1alpha1.KruisePodReadyConditionType).Message = "" })
		b.create("a",
			spec{Containers: containers("app"), Strategy: &how{UnreadyGracePeriodSeconds: pointer(int64(30))}})
		crr := b.until("draining", func(crr *request) bool { return crr.Status.Phase == recreating }, "a")
		if err := b.client.Delete(context.Background(), crr); err != nil {
			t.Fatal(err)
		}
		b.until("gone", func(crr *request) bool { return crr == nil }, "a")
		if c, _ := conditions(b); c.Status != corev1.ConditionTrue || c.Message != "" {
			t.Errorf("condition %+v, want True", c)
		}
	})
	t.Run("the API server does not have it", func(t *testing.T) {
		b := newBed(t, gate)
		b.denies.Store(true)
		b.create("a",
			spec{Containers: containers("app"), Strategy: &how{UnreadyGracePeriodSeconds: pointer(int64(30))}})
		crr := b.until("completed", retired, "a")
		wantContains(t, "states", states(crr), "app Failed")
		wantContains(t, "message", crr.Status.ContainerRecreateStates[0].Message, "a policy keeps pods in service")
		wantContains(t, "events", b.eventsSoFar(), "a policy keeps pods in service")
		if len(b.node.Commanded()) > 0 {
			t.Errorf("the node was told %q", b.node.Commanded())
		}
	})
	t.Run("without the gate there is no wait", func(t *testing.T) {
		b := newBed(t)
		b.create("a",
			spec{Containers: containers("app"), Strategy: &how{UnreadyGracePeriodSeconds: pointer(int64(3600))}})
		b.wantStates(b.until("completed", isCompleted, "a"), "app Succeeded killed")
		wantContains(t, "events", b.eventsSoFar(),
			"Warning NoReadinessGate pod pod has no readiness gate KruisePodReady")
	})
}

func TestSidecar(t *testing.T) {
	b := newBed(t)
	b.create("a", spec{Containers: containers("mesh")})
	b.wantStates(b.until("completed", isCompleted, "a"), "mesh Succeeded killed")
}

func TestRefused(t *testing.T) {
	tests := []struct {
		name      string
		pod       func(*corev1.Pod)
		podName   string
		container string
		want      string
	}{
		{"no such pod", nil, "nope", "app", "no pod ns/nope"},
		{"no such container", nil, "", "nope", "pod pod has no container nope; it has app, web, mesh"},
		{"plain init container", nil, "", "setup", "container setup is an init container that runs to its end"},
		{"ephemeral container", func(p *corev1.Pod) {
			p.Spec.EphemeralContainers = []corev1.EphemeralContainer{
				{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: "debug"}}}
		}, "", "debug", "container debug is an ephemeral container"},
		{"not started", func(p *corev1.Pod) {
			p.Status.ContainerStatuses[0] = corev1.ContainerStatus{Name: "app",
				State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ContainerCreating"}}}
		}, "", "app", "container app has not been started yet (ContainerCreating)"},
		{"not scheduled", func(p *corev1.Pod) { p.Spec.NodeName, p.Status.Phase = "", corev1.PodPending }, "", "app",
			"pod ns/pod is not on a node yet"},
		{"ended", func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }, "", "app",
			"pod ns/pod has ended (phase Succeeded)"},
		{"going away", func(p *corev1.Pod) {
			p.DeletionTimestamp, p.Finalizers = pointer(metav1.Now()), []string{"test/hold"}
		}, "", "app", "pod ns/pod is being deleted"},
		{"no node", func(p *corev1.Pod) { p.Spec.NodeName = "node-2" }, "", "app",
			"node node-2 of pod ns/pod does not exist"},
		{"postStart that cannot be run", func(p *corev1.Pod) {
			p.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{
				PostStart: &corev1.LifecycleHandler{TCPSocket: &corev1.TCPSocketAction{}}}
		}, "", "app", "container app has a postStart handler that kubelet would stop the new container for " +
			"(tcpSocket is " +
			"not a handler kubelet runs)"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var change []func(*corev1.Pod)
			if tt.pod != nil {
				change = append(change, tt.pod)
			}
			b := newBed(t, change...)
			podName := "pod"
			if tt.podName != "" {
				podName = tt.podName
			}
			b.createFor("a", spec{PodName: podName, Containers: containers(tt.container, "web")})
			crr := b.until("completed", retired, "a")
			if crr.Status.Phase != completed {
				t.Errorf("phase %s", crr.Status.Phase)
			}
			wantContains(t, "message", crr.Status.Message, tt.want)
			for _, s := range crr.Status.ContainerRecreateStates {
				if s.Phase != failed {
					t.Errorf("state %+v, want Failed", s)
				}
				wantContains(t, "message of "+s.Name, s.Message, tt.want)
			}
			if len(b.node.Requests()) != 0 {
				t.Errorf("node got %v", b.node.Commanded())
			}
			wantContains(t, "events", b.eventsSoFar(), "Warning Refused "+tt.want)
		})
	}
}

func TestPodGone(t *testing.T) {
	for _, phase := range []opsv1.Phase{opsv1.Phase_PHASE_STAGING, opsv1.Phase_PHASE_STARTING} {
		t.Run(phase.String(), func(t *testing.T) {
			b := newBed(t)
			release := b.node.Hold("app", phase)
			defer release()
			b.create("a", spec{Containers: containers("app")})
			b.until("at the phase", func(crr *request) bool {
				return b.node.Operation("uid-a.app").GetPhase() == phase && len(crr.Status.ContainerRecreateStates) > 0
			}, "a")
			pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "pod"}}
			if err := b.client.Delete(context.Background(), pod); err != nil {
				t.Fatal(err)
			}
			b.wake()
			crr := b.until("completed", retired, "a")
			if crr.Status.Message != "pod has gone" {
				t.Errorf("message %q", crr.Status.Message)
			}
			wantContains(t, "states", states(crr), "app Failed")
		})
	}
	t.Run("another pod of that name", func(t *testing.T) {
		b := newBed(t)
		release := b.node.Hold("app", opsv1.Phase_PHASE_STAGING)
		defer release()
		b.create("a", spec{Containers: containers("app")})
		b.until("under way", b.phaseIs(recreating, "app"), "a")
		ctx := context.Background()
		var pod corev1.Pod
		if err := b.client.Get(ctx, types.NamespacedName{Namespace: "ns", Name: "pod"}, &pod); err != nil {
			t.Fatal(err)
		}
		if err := b.client.Delete(ctx, &pod); err != nil {
			t.Fatal(err)
		}
		pod.UID, pod.ResourceVersion = "another", ""
		if err := b.client.Create(ctx, &pod); err != nil {
			t.Fatal(err)
		}
		b.wake()
		crr := b.until("completed", retired, "a")
		if crr.Status.Message != "pod has gone" || b.node.Operation("uid-a.app").
			GetPhase() != opsv1.Phase_PHASE_CANCELLED {
			t.Errorf("message %q, operation %v", crr.Status.Message, b.node.Operation("uid-a.app"))
		}
	})
}

func TestMinStartedSeconds(t *testing.T) {
	b := newBed(t)
	b.create("a", spec{Containers: containers("app"), Strategy: &how{MinStartedSeconds: 300}})
	crr := b.until("the new container runs", b.restarted, "a")
	result, err := b.r.Reconcile(context.Background(),
		reconcile.Request{NamespacedName: client.ObjectKeyFromObject(crr)})
	if err != nil || result.RequeueAfter <= 0 || result.RequeueAfter > 300*time.Second || isCompleted(b.get("a")) {
		t.Fatalf("result %v, error %v, %s", result, err, describe(b.get("a")))
	}
	b.after(301 * time.Second)
	b.wantStates(b.until("completed", isCompleted, "a"), "app Succeeded killed")
}

// TestStartFirst asks for the new container to run before the old one is stopped. The node waits
// for minStartedSeconds then, and the controller does not wait again.
func TestStartFirst(t *testing.T) {
	create := func(b *bed, order string, s how) *request {
		b.createWith("a", spec{PodName: "pod", Containers: containers("app"), Strategy: &s},
			map[string]string{"cri-proxy.io/restart-order": order})
		return b.until("completed", retired, "a")
	}
	t.Run("StartFirst", func(t *testing.T) {
		b := newBed(t)
		b.wantStates(create(b, "StartFirst", how{MinStartedSeconds: 3600}), "app Succeeded killed")
		if got := b.node.Requests()[0].GetContainers()[0]; got.GetOrder() != opsv1.Order_ORDER_START_FIRST ||
			got.GetMinReadySeconds() != 3600 {
			t.Errorf("node got %v", got)
		}
		wantContains(t, "events", b.eventsSoFar(), "the old one was stopped after the new one had started")
	})
	t.Run("a container that kubelet started after it has to run as long itself", func(t *testing.T) {
		b := newBed(t)
		release := b.node.Hold("app", opsv1.Phase_PHASE_STOPPING)
		b.createWith("a", spec{PodName: "pod", Containers: containers("app"), Strategy: &how{MinStartedSeconds: 300}},
			map[string]string{"cri-proxy.io/restart-order": "StartFirst"})
		b.until("under way", b.phaseIs(recreating, "app"), "a")
		b.node.Swapped = func(uid, name, _ string, attempt int32) { b.kubelet(uid, name, "later", attempt+1) }
		release()
		b.until("the later one runs", b.restarted, "a")
		b.after(301 * time.Second)
		b.wantStates(b.until("completed", isCompleted, "a"), "app Succeeded killed")
	})
	t.Run("StopFirst", func(t *testing.T) {
		b := newBed(t)
		b.wantStates(create(b, "StopFirst", how{}), "app Succeeded killed")
		if got := b.node.Requests()[0].GetContainers()[0]; got.GetOrder() != opsv1.Order_ORDER_UNSPECIFIED ||
			got.GetMinReadySeconds() != 0 {
			t.Errorf("node got %v", got)
		}
	})
	t.Run("changed after it was accepted", func(t *testing.T) {
		b := newBed(t)
		release := b.node.Hold("app", opsv1.Phase_PHASE_STAGING)
		b.create("a", spec{Containers: containers("app")})
		crr := b.until("under way", b.phaseIs(recreating, "app"), "a")
		crr.Annotations["cri-proxy.io/restart-order"] = "Sideways"
		if err := b.client.Update(t.Context(), crr); err != nil {
			t.Fatal(err)
		}
		release()
		b.wantStates(b.until("completed", isCompleted, "a"), "app Succeeded killed")
	})
	for _, order := range []string{"", "startfirst", "Both"} {
		t.Run(fmt.Sprintf("refused: %q", order), func(t *testing.T) {
			b := newBed(t)
			crr := create(b, order, how{})
			wantContains(t, "message", crr.Status.Message,
				fmt.Sprintf("annotation cri-proxy.io/restart-order is %q: it must be StopFirst or StartFirst, or "+
					"left out", order))
			if len(b.node.Requests()) != 0 {
				t.Errorf("node got %v", b.node.Commanded())
			}
		})
	}
	t.Run("refused: minStartedSeconds that no node takes", func(t *testing.T) {
		b := newBed(t)
		crr := create(b, "StartFirst", how{MinStartedSeconds: 3601})
		wantContains(t, "message", crr.Status.Message,
			"container app: minStartedSeconds is 3601, and at most 3600 with annotation cri-proxy.io/restart-order: "+
				"StartFirst")
	})
}

func TestNewContainerEnds(t *testing.T) {
	b := newBed(t, func(p *corev1.Pod) { p.Spec.RestartPolicy = corev1.RestartPolicyNever })
	b.unready.Store(true)
	b.create("a", spec{Containers: containers("app")})
	b.until("the new container runs", b.restarted, "a")
	b.setStatus("app", func(s *corev1.ContainerStatus) {
		s.State = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 3, Reason: "Error"}}
	})
	b.wantStates(b.until("completed", isCompleted, "a"),
		"app Failed killed: the new container ended (exit code 3, Error) and its restartPolicy does not start it again")
}

func TestStaticPod(t *testing.T) {
	b := newBed(t,
		func(p *corev1.Pod) { p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "static-uid"} })
	b.node.Run("static-uid", "app", "old-app", 0)
	b.create("a", spec{Containers: containers("app")})
	b.wantStates(b.until("completed", isCompleted, "a"), "app Succeeded killed")
	if uid := b.node.Requests()[0].GetPod().GetUid(); uid != "static-uid" {
		t.Errorf("node got pod UID %s", uid)
	}
}
