// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"sigs.k8s.io/controller-runtime/pkg/client"
)

// testHelm moves the cluster from the manifests to the chart, in another namespace, and removes the
// release.
func testHelm(t *testing.T) {
	const namespace = "elsewhere"
	chart := filepath.Join(root, "deploy", "helm", "cri-proxy")
	host, port := apiServer(t)
	values := []string{
		"--namespace", namespace, "--set", "image.repository=" + imageRef, "--set", "image.tag=" + tag, "--set",
		"nodePort=" + opsPort(),
		"--set", "extraEnv[0].name=KUBERNETES_SERVICE_HOST", "--set", "extraEnv[0].value=" + host,
		"--set", "extraEnv[1].name=KUBERNETES_SERVICE_PORT", "--set-string", "extraEnv[1].value=" + port,
	}
	helm := func(args ...string) string {
		t.Helper()
		out, err := program(t, append([]string{"tool", "helm"}, args...)...)
		must(t, err)
		return out
	}
	must(t, bed.CreateNamespace(t.Context(), namespace))
	kubectl(t, "-n", "cri-proxy-system", "delete", "deployment", "cri-controller")

	// The definitions and the ClusterRole are there and must become the release's.
	out := helm(append([]string{"install", "cri-proxy", chart, "--take-ownership", "--force-conflicts"}, values...)...)
	if !strings.Contains(out, "rollout status deployment/cri-controller") {
		t.Errorf("no notes: %s", out)
	}
	controllers(t, namespace)
	leader(t, namespace, "")
	must(t, enrolIn(t.Context(), namespace)) // another controller, with another CA
	must(t, bed.CreateNamespace(t.Context(), "by-helm"))
	// The API server takes up new webhooks, and their CA, some time after they are there.
	eventually(t, "the webhooks of the release refuse what is wrong", func() (string, bool) {
		err := api.Create(t.Context(), wrong("by-helm", "wrong"), client.DryRunAll)
		return fmt.Sprint(err), err != nil && strings.Contains(err.Error(), "no pod by-helm/none")
	})
	startWork(t, "by-helm", 1, 2)
	finishWork(t, "by-helm", 1)

	helm("uninstall", "cri-proxy", "--namespace", namespace)
	if j := job(t, "by-helm"); j.Status.Succeeded != 1 {
		t.Errorf("the job did not outlive the release: %+v", j.Status)
	}
	if out := kubectl(t, "get",
		"clusterrole,clusterrolebinding,validatingwebhookconfiguration,mutatingwebhookconfiguration", "-o",
		"name"); strings.Contains(out, "cri-controller") {
		t.Errorf("the release left permissions or webhooks: %s", out)
	}
}
