// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
)

// testBypass: the Node says that kubelet is led past cri-proxy, and so does a request for a
// container there; kubelet leaves the condition alone. What the node goes by is the file that
// `cri-proxy bypass on` writes before it moves the symlink.
func testBypass(t *testing.T) {
	n := bed.Node
	condition := func() (c corev1.NodeCondition) {
		var node corev1.Node
		must(t, api.Get(t.Context(), client.ObjectKey{Name: n.NodeName}, &node))
		for _, x := range node.Status.Conditions {
			if x.Type == "CRIProxyBypassed" {
				c = x
			}
		}
		return c
	}
	is := func(status corev1.ConditionStatus, reason string) {
		t.Helper()
		eventually(t, fmt.Sprintf("the condition is %s %s", status, reason), func() (string, bool) {
			c := condition()
			return fmt.Sprintf("%+v", c), c.Status == status && c.Reason == reason
		})
	}
	is(corev1.ConditionFalse, "InPath")
	must(t, os.WriteFile(filepath.Join(n.StateDir, "bypass"),
		[]byte(`{"since":"2026-01-02T03:04:05Z","reason":"a test of it"}`), 0o600))
	defer os.Remove(filepath.Join(n.StateDir, "bypass"))
	is(corev1.ConditionTrue, "Bypassed")
	if c := condition(); !strings.Contains(c.Message, "kubelet is led past cri-proxy since ") ||
		!strings.HasSuffix(c.Message, ": a test of it") {
		t.Errorf("message %q", c.Message)
	}
	eventually(t, "there is an Event", func() (string, bool) {
		var list eventsv1.EventList
		must(t, api.List(t.Context(), &list, client.InNamespace(metav1.NamespaceDefault)))
		said := ""
		for _, e := range list.Items {
			if e.Regarding.Kind == "Node" && e.Reason == "CRIProxyBypassedBypassed" &&
				e.Type == corev1.EventTypeWarning {
				return "", true
			}
			said += e.Reason + " "
		}
		return said, false
	})
	t.Run("a request says why nothing happens", func(t *testing.T) {
		pod := shop(t, "first")[0]
		apply(t, fmt.Sprintf("apiVersion: apps.kruise.io/v1alpha1\nkind: ContainerRecreateRequest\nmetadata: "+
			"{namespace: first, name: bypassed}\nspec: {podName: %s, containers: [{name: app}]}\n", pod.Name))
		eventually(t, "it says so", func() (string, bool) {
			var crr appsv1alpha1.ContainerRecreateRequest
			must(t, api.Get(t.Context(), client.ObjectKey{Namespace: "first", Name: "bypassed"}, &crr))
			text, err := json.Marshal(crr.Status)
			must(t, err)
			return string(text), strings.Contains(string(text), "cri-proxy is bypassed on this node since ")
		})
		kubectl(t, "-n", "first", "delete", "crr", "bypassed")
	})
	t.Run("kubelet leaves it", func(t *testing.T) {
		must(t, n.RestartKubeletReady(t.Context(), syscall.SIGTERM)) // and it has written its own conditions
		is(corev1.ConditionTrue, "Bypassed")
	})
	must(t, os.Remove(filepath.Join(n.StateDir, "bypass")))
	is(corev1.ConditionFalse, "InPath")
}

// testDoctor: nothing is wrong with the node of this bed but what the bed does on purpose.
func testDoctor(t *testing.T) {
	n := bed.Node
	out, err := exec.CommandContext(t.Context(), filepath.Join(bed.Bin, "cri-proxy"), "ctl", "doctor", "--config",
		n.ProxyConfig(), "--admin-socket", n.AdminSocket, "-o", "json").Output()
	t.Logf("%v\n%s", err, out)
	var findings []struct{ Check, Status, Detail string }
	must(t, json.Unmarshal(out, &findings))
	seen := map[string]string{}
	for _, f := range findings {
		if f.Status == "fail" {
			t.Errorf("%s: %s", f.Check, f.Detail)
		}
		seen[f.Check] += f.Status + " " + f.Detail + "\n"
	}
	for check, want := range map[string]string{
		"kubelet":    "is connected to cri-proxy",
		"runtime":    "ok containerd ",
		"restarts":   "ok method gate",
		"controller": "called ",
		"containers": "ok none is left",
		// It is renewed by itself, long before its end, which is days away from its first minute
		// on.
		"certificate": "ok until ",
		"cri":         " with k8s.io/cri-api v0.",
	} {
		if !strings.Contains(seen[check], want) {
			t.Errorf("%s: %q is not in\n%s", check, want, seen[check])
		}
	}
	for _, check := range []string{"certificate", "cri"} {
		if strings.Contains(seen[check], "warn") {
			t.Errorf("%s: %s", check, seen[check])
		}
	}
}
