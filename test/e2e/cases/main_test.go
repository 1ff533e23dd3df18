// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	appsv1beta1 "github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// pidsLimit is kubelet's podPidsLimit: small enough for a shell to use it up.
const pidsLimit = 60

// The cluster of this run. Tests share it and keep to namespaces of their own.
var (
	bed     *testbed.Bed
	api     client.Client
	scratch string
	leaving departures
)

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "cases:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	ctx := context.Background()
	ctrllog.SetLogger(logr.Discard()) // tests tell what clients return
	cache, err := testbed.CacheDir()
	if err != nil {
		return 0, err
	}
	if scratch, err = os.MkdirTemp(cache, "cases-"); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(scratch)) }()
	failed := false
	bed, err = testbed.Start(ctx, testbed.Options{
		Mode: testbed.ModeCluster, Race: true, Log: os.Stderr, KeepLogs: func() bool { return failed },
		KubeletExtra: fmt.Sprintf("podPidsLimit: %d", pidsLimit),
	})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, bed.Close(ctx)) }()
	config, err := clientcmd.BuildConfigFromFlags("", bed.Kubeconfig)
	if err != nil {
		return 0, err
	}
	config.QPS, config.Burst = 200, 400
	scheme := runtime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), appsv1alpha1.AddToScheme(scheme),
		appsv1beta1.AddToScheme(scheme), inplace.AddToScheme(scheme)); err != nil {
		return 0, err
	}
	if api, err = client.New(config, client.Options{Scheme: scheme}); err != nil {
		return 0, err
	}
	if err := bed.InstallCRDs(ctx); err != nil {
		return 0, err
	}
	if err := restrictController(ctx); err != nil {
		return 0, err
	}
	if err := bed.StartController(ctx); err != nil {
		return 0, err
	}
	code = m.Run()
	if err := leaving.wait(); err != nil {
		fmt.Fprintln(os.Stderr, "cases:", err)
		code = 1
	}
	failed = code != 0
	return code, nil
}

// restrictController gives the controller the permissions that the manifests give it, and no
// others.
func restrictController(ctx context.Context) error {
	root, err := testbed.SourceDir("")
	if err != nil {
		return err
	}
	for _, f := range []string{"controller/namespace.yaml", "controller/serviceaccount.yaml", "rbac"} {
		if _, err := bed.Kubectl(ctx, "apply", "-f", filepath.Join(root, "deploy", f)); err != nil {
			return err
		}
	}
	bed.ControllerKubeconfig, err = bed.NewKubeconfig("cri-controller",
		"system:serviceaccount:cri-proxy-system:cri-controller", "system:serviceaccounts")
	return err
}

// departures are namespaces on their way out, which takes some seconds. The next test can begin
// meanwhile.
type departures struct {
	wg   sync.WaitGroup
	mu   sync.Mutex
	errs []error // guarded by mu
}

func (d *departures) add(name string) {
	d.wg.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		if _, err := bed.Kubectl(ctx, "delete", "namespace", name, "--wait=true", "--timeout=4m"); err != nil {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.errs = append(d.errs, fmt.Errorf("remove the namespace of test %s: %w", name, err))
		}
	})
}

func (d *departures) wait() error {
	d.wg.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	return errors.Join(d.errs...)
}

// namespace makes a namespace of the test's own and removes it with everything in it.
func namespace(t testing.TB) string {
	t.Helper()
	return namespaceNamed(t, strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(t.Name())))
}

// namespaceNamed is namespace with a name of the test's choice.
func namespaceNamed(t testing.TB, name string) string {
	t.Helper()
	must(t, bed.CreateNamespace(t.Context(), name))
	t.Cleanup(func() { leaving.add(name) })
	return name
}

// scratchDir returns a new directory of this machine that containers of any user may write to. It
// goes with the run.
func scratchDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(scratch, "dir-")
	must(t, err)
	must(t, os.Chmod(dir, 0o777))
	return dir
}

func apply(t testing.TB, documents string) {
	t.Helper()
	must(t, bed.KubectlApply(t.Context(), documents))
}

func kubectl(t testing.TB, args ...string) string {
	t.Helper()
	out, err := bed.Kubectl(t.Context(), args...)
	must(t, err)
	return strings.TrimSpace(out)
}

// crane runs the registry client on the bed's registry and returns what it says.
func crane(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), filepath.Join(bed.Bin, "crane"),
		append(args, "--insecure")...).CombinedOutput()
	if err != nil {
		t.Fatalf("crane %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// moveTag makes the tag name lead to another image of the registry, and returns its reference.
func moveTag(t testing.TB, name, to string) string {
	t.Helper()
	crane(t, "copy", bed.Image(to), bed.Image(name))
	return bed.Image(name)
}

func getPod(t testing.TB, ns, name string) *corev1.Pod {
	t.Helper()
	p := &corev1.Pod{}
	must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: name}, p))
	return p
}

// statusOf returns the status of one container, nil if there is none yet.
func statusOf(p *corev1.Pod, name string) *corev1.ContainerStatus {
	for _, list := range [][]corev1.ContainerStatus{p.Status.ContainerStatuses, p.Status.InitContainerStatuses} {
		for i := range list {
			if list[i].Name == name {
				return &list[i]
			}
		}
	}
	return nil
}

// container returns the status of one container, which there must be.
func container(t testing.TB, p *corev1.Pod, name string) corev1.ContainerStatus {
	t.Helper()
	s := statusOf(p, name)
	if s == nil {
		t.Fatalf("pod %s has no status of container %s", p.Name, name)
	}
	return *s
}

func isReady(p *corev1.Pod) bool {
	return p.DeletionTimestamp == nil && slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// ready waits until the pod is ready and returns it.
func ready(t testing.TB, ns, name string) *corev1.Pod {
	t.Helper()
	var p *corev1.Pod
	eventually(t, "pod "+name+" is ready", func() bool {
		p = getPod(t, ns, name)
		return isReady(p)
	})
	return p
}

// allReady waits until all pods of the namespace are ready and returns them by name.
func allReady(t testing.TB, ns string) map[string]*corev1.Pod {
	t.Helper()
	pods := map[string]*corev1.Pod{}
	var not []string
	eventuallySaying(t, "all pods are ready", func() string { return strings.Join(not, "\n") }, func() bool {
		list := &corev1.PodList{}
		must(t, api.List(t.Context(), list, client.InNamespace(ns)))
		not = nil
		for i := range list.Items {
			p := &list.Items[i]
			pods[p.Name] = p
			if !isReady(p) {
				not = append(not, fmt.Sprintf("%s: %s\n%s", p.Name, states(p), events(t, ns, p.Name)))
			}
		}
		return len(list.Items) > 0 && len(not) == 0
	})
	return pods
}

// states says how the containers of a pod are.
func states(p *corev1.Pod) string {
	out := []string{string(p.Status.Phase)}
	for _, s := range append(slices.Clone(p.Status.InitContainerStatuses), p.Status.ContainerStatuses...) {
		switch {
		case s.State.Running != nil:
			out = append(out, fmt.Sprintf("%s runs, ready %v, restarts %d", s.Name, s.Ready, s.RestartCount))
		case s.State.Waiting != nil:
			out = append(out, fmt.Sprintf("%s waits, %s: %s", s.Name, s.State.Waiting.Reason, s.State.Waiting.Message))
		case s.State.Terminated != nil:
			out = append(out, fmt.Sprintf("%s has ended with %d, %s", s.Name, s.State.Terminated.ExitCode,
				s.State.Terminated.Reason))
		}
	}
	return strings.Join(out, "; ")
}

// events returns what has been told about an object, "reason message" by line.
func events(t testing.TB, ns, name string) string {
	t.Helper()
	list := &corev1.EventList{}
	must(t, api.List(t.Context(), list, client.InNamespace(ns)))
	var out []string
	for _, e := range list.Items {
		if e.InvolvedObject.Name == name {
			out = append(out, e.Reason+" "+e.Message)
		}
	}
	return strings.Join(out, "\n")
}

// recreate is a request to restart containers of a pod; rest is what its spec has beyond the name
// of the pod.
func recreate(ns, name, pod, rest string) string {
	return fmt.Sprintf(`
apiVersion: apps.kruise.io/v1alpha1
kind: ContainerRecreateRequest
metadata: {namespace: %s, name: %s}
spec:
  podName: %s
  %s
---
`, ns, name, pod, rest)
}

// restart asks for a restart of one container of the pod, by a request with the pod's name, and
// waits until it is completed.
func restart(t testing.TB, ns, pod, name string) *appsv1alpha1.ContainerRecreateRequest {
	t.Helper()
	apply(t, recreate(ns, pod, pod, "containers: [{name: "+name+"}]"))
	return completed(t, ns, pod)
}

// completed waits until the request is completed and returns it.
func completed(t testing.TB, ns, name string) *appsv1alpha1.ContainerRecreateRequest {
	t.Helper()
	crr := &appsv1alpha1.ContainerRecreateRequest{}
	eventuallySaying(t, "request "+name+" is completed", func() string {
		return fmt.Sprintf("%+v\n%s", crr.Status, events(t, ns, name))
	}, func() bool {
		must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: name}, crr))
		return crr.Status.Phase == appsv1alpha1.ContainerRecreateRequestCompleted
	})
	return crr
}

// outcome says how a completed request ended: "" if all containers were restarted, else what it
// tells.
func outcome(crr *appsv1alpha1.ContainerRecreateRequest) string {
	var out []string
	if len(crr.Status.ContainerRecreateStates) != len(crr.Spec.Containers) {
		out = append(out, fmt.Sprintf("%d of %d containers", len(crr.Status.ContainerRecreateStates),
			len(crr.Spec.Containers)))
	}
	for _, s := range crr.Status.ContainerRecreateStates {
		if s.Phase != appsv1alpha1.ContainerRecreateRequestSucceeded {
			out = append(out, fmt.Sprintf("%s is %s: %s", s.Name, s.Phase, s.Message))
		}
	}
	if len(out) == 0 {
		return ""
	}
	return strings.Join(append(out, crr.Status.Message), "; ")
}

// rollout is an InPlaceRollout of container app; an empty image only restarts it.
func rollout(ns, name, target, image, strategy string) string {
	change := "{name: app}"
	if image != "" {
		change = fmt.Sprintf("{name: app, image: %q}", image)
	}
	return fmt.Sprintf(`
apiVersion: cri-proxy.io/v1alpha1
kind: InPlaceRollout
metadata: {namespace: %s, name: %s}
spec:
  target: %s
  containers: [%s]
  strategy: {%s}
---
`, ns, name, target, change, strategy)
}

func getRollout(t testing.TB, ns, name string) *inplace.InPlaceRollout {
	t.Helper()
	r := &inplace.InPlaceRollout{}
	must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: name}, r))
	return r
}

// ended waits until the rollout has ended, well or not, and returns it.
func ended(t testing.TB, ns, name string) *inplace.InPlaceRollout {
	t.Helper()
	var r *inplace.InPlaceRollout
	eventuallySaying(t, "rollout "+name+" has ended", func() string {
		return fmt.Sprintf("%+v\n%s", r.Status, events(t, ns, name))
	}, func() bool {
		r = getRollout(t, ns, name)
		return r.Status.CompletionTime != nil && r.Status.ObservedGeneration == r.Generation
	})
	return r
}

// complete says whether the rollout has done all: "", or what it tells instead.
func complete(r *inplace.InPlaceRollout) string {
	for _, c := range r.Status.Conditions {
		if c.Type == inplace.ConditionComplete && c.Status == "True" {
			return ""
		}
	}
	return fmt.Sprintf("rollout %s: %s; failures %+v; conditions %+v", r.Name, r.Status.Message, r.Status.Failures,
		r.Status.Conditions)
}

// node talks to the node over the admin socket, and waits for a proxy that is away.
func node(t testing.TB) opsv1.OpsClient {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+bed.AdminSocket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	must(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return opsv1.NewOpsClient(conn)
}

// operations returns those of a pod on the node, newest first.
func operations(t testing.TB, ns, pod string) []*opsv1.Operation {
	t.Helper()
	list, err := node(t).ListOperations(t.Context(), &opsv1.ListOperationsRequest{})
	must(t, err)
	return slices.DeleteFunc(list.GetOperations(), func(op *opsv1.Operation) bool {
		return op.GetPod().GetNamespace() != ns || op.GetPod().GetName() != pod
	})
}

// lastOperation waits until the newest operation of a pod has ended and returns its account of
// container app.
func lastOperation(t testing.TB, ns, pod string) *opsv1.ContainerOperation {
	t.Helper()
	var op *opsv1.Operation
	eventuallySaying(t, "the node's last operation on pod "+pod+" has ended", func() string { return op.String() },
		func() bool {
			ops := operations(t, ns, pod)
			if len(ops) == 0 {
				return false
			}
			op = ops[0]
			return op.GetFinishTime() != nil
		})
	for _, c := range op.GetContainers() {
		if c.GetName() == "app" {
			return c
		}
	}
	t.Fatalf("the operation has no container app: %v", op)
	return nil
}

// containersOf returns what the runtime has of a pod's container, around the proxy.
func containersOf(t testing.TB, p *corev1.Pod, name string) []*runtimeapi.Container {
	t.Helper()
	conn, err := bed.DialRuntime()
	must(t, err)
	defer func() { _ = conn.Close() }()
	list, err := runtimeapi.NewRuntimeServiceClient(conn).ListContainers(t.Context(),
		&runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
			LabelSelector: map[string]string{"io.kubernetes.pod.uid": string(p.UID),
				"io.kubernetes.container.name": name},
		}})
	must(t, err)
	return list.GetContainers()
}

// assertOneLive waits until one container of the slot runs and none is only created, as far as the
// runtime knows, and kubelet shows that one.
func assertOneLive(t testing.TB, ns, pod, name string) {
	t.Helper()
	var all []*runtimeapi.Container
	eventuallySaying(t, "one container of "+pod+"/"+name+" runs, the one that kubelet knows",
		func() string { return fmt.Sprint(all) }, func() bool {
			p := getPod(t, ns, pod)
			all = containersOf(t, p, name)
			live := slices.DeleteFunc(slices.Clone(all),
				func(c *runtimeapi.Container) bool {
					return c.GetState() == runtimeapi.ContainerState_CONTAINER_EXITED
				})
			return len(live) == 1 && live[0].GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING &&
				idOf(container(t, p, name)) == live[0].GetId()
		})
}

// idOf is the runtime's ID of a container, empty if it has none yet.
func idOf(s corev1.ContainerStatus) string {
	_, id, _ := strings.Cut(s.ContainerID, "://")
	return id
}

// eventually waits for a condition in the cluster.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	eventuallySaying(t, what, func() string { return "" }, cond)
}

// eventuallySaying is eventually that tells how it is when it does not come.
func eventuallySaying(t testing.TB, what string, now func() string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 2 minutes: %s\n%s", what, now())
		}
		time.Sleep(100 * time.Millisecond) // polling another process
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
