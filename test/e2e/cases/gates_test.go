// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/test/testbed"
)

// TestKruisePodReady: the pods of a Deployment whose template has OpenKruise's gate are Ready, are
// taken out of service by a request with unreadyGracePeriodSeconds and come back. What another
// writer keeps out of service stays so, through a drain too.
func TestKruisePodReady(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	apply(t, fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {namespace: %s, name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      readinessGates: [{conditionType: KruisePodReady}]
      containers: [{name: app, image: %s, command: [sh, -c, %s]}]
---
`, ns, bed.Image("busybox:1.0"), loop))
	kubectl(t, "-n", ns, "rollout", "status", "deployment/web", "--timeout=120s")
	list := &corev1.PodList{}
	must(t, api.List(t.Context(), list, client.InNamespace(ns)))
	pod := list.Items[0].Name

	says := func() string {
		p := getPod(t, ns, pod)
		var out []string
		for _, c := range p.Status.Conditions {
			if c.Type == appsv1alpha1.KruisePodReadyConditionType {
				out = append(out, string(c.Status)+" "+c.Message)
			}
		}
		return fmt.Sprintf("%s, Ready %v", strings.Join(out, "; "), isReady(p))
	}
	is := func(want string) {
		t.Helper()
		eventuallySaying(t, "the pod is "+want, says, func() bool { return says() == want })
	}
	is("True , Ready true")
	drained := func(name, seconds string) string {
		return recreate(ns, name, pod,
			"strategy: {unreadyGracePeriodSeconds: "+seconds+"}\n  containers: [{name: app}]")
	}
	mine := func(name string) string {
		return fmt.Sprintf(`{"userAgent":"ContainerRecreateRequest","key":"%s/%s"}`, ns, name)
	}

	// One drain is long, so that it is seen, and is ended by its request's.
	apply(t, drained("long", "600"))
	is("False [" + mine("long") + "], Ready false")
	kubectl(t, "-n", ns, "delete", "crr", "long")
	is("True , Ready true")
	if n := container(t, getPod(t, ns, pod), "app").RestartCount; n != 0 {
		t.Errorf("%d restarts", n)
	}
	apply(t, drained("short", "1"))
	if out := outcome(completed(t, ns, "short")); out != "" {
		t.Error(out)
	}
	is("True , Ready true")

	// Another writer, and a request past whose finalizer somebody goes.
	const other = `{"userAgent":"Lifecycle","key":"x"}`
	kubectl(t, "-n", ns, "patch", "pod", pod, "--subresource=status", "-p",
		`{"status":{"conditions":[{"type":"KruisePodReady","status":"False","message":"[`+strings.ReplaceAll(other, `"`,
			`\"`)+`]"}]}}`)
	apply(t, drained("other", "1"))
	if out := outcome(completed(t, ns, "other")); out != "" {
		t.Error(out)
	}
	is("False [" + other + "], Ready false")
	kubectl(t, "-n", ns, "patch", "pod", pod, "--subresource=status", "-p",
		`{"status":{"conditions":[{"type":"KruisePodReady","status":"False","message":"[`+strings.ReplaceAll(
			mine("never-was"), `"`, `\"`)+`]"}]}}`)
	is("True , Ready true")
}

// TestOneAfterAnother: containers of a request are stopped one after another, in their order, and
// at the same time where the request says so. Their preStop hooks write down when they are: with a
// hook each that ends only when both have begun, at the same time is the only way for them to end
// well.
func TestOneAfterAnother(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	with := func(name, hook string) string {
		return fmt.Sprintf(`
  - name: %[1]s
    image: %[2]s
    command: [sh, -c, %[3]s]
    volumeMounts: [{name: work, mountPath: /work}]
    lifecycle: {preStop: {exec: {command: [sh, -c, '%[4]s']}}}`, name, bed.Image("busybox:1.0"), loop, strings.ReplaceAll(hook, "NAME", name))
	}
	pod := func(name, hook string) string {
		return podWith(ns, name, "Always", "30", "\n  volumes: [{name: work, emptyDir: {}}]\n  containers:"+with("one",
			hook)+with("two", hook)+with("three", hook))
	}
	const lines = "echo begin NAME >> /work/log; sleep 1; echo end NAME >> /work/log"
	apply(t, pod("orderly", lines))
	apply(t, pod("together", "echo begin NAME >> /work/log; until [ $(wc -l < /work/log) -ge 3 ]; do sleep 0.1; done"))
	ready(t, ns, "orderly")
	ready(t, ns, "together")

	const rest = "containers: [{name: three}, {name: one}, {name: two}]"
	apply(t, recreate(ns, "orderly", "orderly", rest))
	apply(t, strings.Replace(recreate(ns, "together", "together", rest), "name: together}",
		"name: together, annotations: {"+
			appsv1alpha1.ParallelRecreateAnnotation+`: "true"}}`, 1))
	for _, name := range []string{"orderly", "together"} {
		crr := completed(t, ns, name)
		if out := outcome(crr); out != "" {
			t.Errorf("%s: %s", name, out)
		}
		if told := events(t, ns, name); strings.Contains(told, "FailedPreStopHook") {
			t.Errorf("%s: a hook was cut off:\n%s", name, told)
		}
	}
	log := strings.ReplaceAll(kubectl(t, "-n", ns, "exec", "orderly", "-c", "one", "--", "cat", "/work/log"), "\n",
		", ")
	if want := "begin three, end three, begin one, end one, begin two, end two"; log != want {
		t.Errorf("hooks: %s; want %s", log, want)
	}
	// The container itself has ended too before the next hook begins; its successor need not have
	// begun.
	ends, begins := map[string]int64{}, map[string]int64{}
	for _, op := range operations(t, ns, "orderly") {
		c := op.GetContainers()[0]
		begins[c.GetName()], ends[c.GetName()] = op.GetCreateTime().AsTime().UnixNano(), c.GetStopTime().
			AsTime().UnixNano()
	}
	if len(ends) != 3 || begins["one"] < ends["three"] || begins["two"] < ends["one"] {
		t.Errorf("operations began %v, containers ended %v", begins, ends)
	}
}

// TestSchedule does what the pod of deploy/examples/prepull-schedule.yaml does, with its
// ServiceAccount's token, its arguments and its list: each run is a list of its own that is carried
// out and goes by itself, and the account may do nothing else. The image is not in this bed, and no
// pod reaches the API server: the pod is only shown to the API server, in a namespace as strict as
// there is.
func TestSchedule(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	kubectl(t, "label", "namespace", ns, "pod-security.kubernetes.io/enforce=restricted")
	root, err := testbed.SourceDir("")
	must(t, err)
	manifest, err := os.ReadFile(filepath.Join(root, "deploy", "examples", "prepull-schedule.yaml"))
	must(t, err)
	apply(t, strings.ReplaceAll(string(manifest), "pod-namespace", ns))

	cron, list := &batchv1.CronJob{}, &corev1.ConfigMap{}
	must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "prepull"}, cron))
	template := cron.Spec.JobTemplate.Spec.Template
	must(t, api.Create(t.Context(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "try"},
		Spec: template.Spec}, client.DryRunAll))
	pod := template.Spec.Containers[0]
	must(t, api.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: template.Spec.Volumes[0].ConfigMap.Name}, list))
	dir := scratchDir(t)
	for name, text := range list.Data {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	args := slices.Clone(pod.Args)
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], pod.VolumeMounts[0].MountPath, dir)
	}

	config, err := clientcmd.LoadFromFile(bed.Kubeconfig)
	must(t, err)
	for name := range config.AuthInfos {
		config.AuthInfos[name] = &clientcmdapi.AuthInfo{Token: kubectl(t, "-n", ns, "create", "token",
			template.Spec.ServiceAccountName)}
	}
	for _, c := range config.Contexts {
		c.Namespace = ns // as in a pod
	}
	account := filepath.Join(dir, "kubeconfig")
	must(t, clientcmd.WriteToFile(*config, account))
	as := func(args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), filepath.Join(bed.Bin, "kubectl"), args...)
		cmd.Env = []string{"KUBECONFIG=" + account, "HOME=" + dir}
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	for range 2 {
		out, err := as(args...)
		if err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	const lists = "imagelistpulljobs.v1beta1.apps.kruise.io"
	eventually(t, "both runs have put two images on the node", func() bool {
		return kubectl(t, "-n", ns, "get", lists, "-l", "schedule=prepull", "-o",
			"jsonpath={range .items[*]}{.status.succeeded}/{.status.completed} {end}") == "2/2 2/2"
	})
	for _, args := range [][]string{
		{"get", lists}, {"delete", lists, "--all"}, {"get", "secrets"}, {"get", "pods"},
		{"-n", "default", "create", "-f", filepath.Join(dir, "list.yaml")},
	} {
		if out, err := as(args...); err == nil || !strings.Contains(out, "orbidden") {
			t.Errorf("the account may %v: %v %s", args, err, out)
		}
	}
	// The time of a run is over.
	for _, name := range strings.Fields(kubectl(t, "-n", ns, "get", lists, "-o", "name")) {
		kubectl(t, "-n", ns, "patch", name, "--type=merge", "-p",
			`{"spec":{"completionPolicy":{"ttlSecondsAfterFinished":1}}}`)
	}
	eventually(t, "no run is left", func() bool {
		return kubectl(t, "-n", ns, "get", lists+",imagepulljobs.v1beta1.apps.kruise.io", "-o", "name") == ""
	})
}
