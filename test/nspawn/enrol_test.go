// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nspawn

import (
	"fmt"
	"strings"
	"testing"
)

// startController starts cri-controller outside of the machine, with the permissions that it has as
// a pod. It signs the nodes' certificates.
func startController(t *testing.T, n *node) {
	ctx := t.Context()
	if err := n.bed.InstallCRDs(ctx); err != nil {
		t.Fatal(err)
	}
	n.kubectl(t, "apply", "-f", "../../deploy/controller/namespace.yaml")
	n.kubectl(t, "apply", "-f", "../../deploy/rbac")
	var err error
	n.bed.ControllerKubeconfig, err = n.bed.NewKubeconfig("cri-controller",
		"system:serviceaccount:cri-proxy-system:cri-controller", "system:serviceaccounts")
	if err != nil {
		t.Fatal(err)
	}
	if err := n.bed.StartController(ctx, "--identity=csr", "--identity-namespace=cri-proxy-system", "--tls-cert-file=",
		"--tls-key-file=", "--tls-ca-file=",
		"--node-port=10260"); err != nil {
		t.Fatal(err)
	}
}

// commanded has the controller restart a container of the node, which has asked it for its
// certificate when it was installed.
func (n *node) commanded(t *testing.T) {
	t.Helper()
	err := n.bed.KubectlApply(t.Context(), `
apiVersion: apps.kruise.io/v1alpha1
kind: ContainerRecreateRequest
metadata: {name: enrolled, namespace: default}
spec: {podName: target, containers: [{name: app}]}
`)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if t.Failed() {
			t.Log(n.must(t, "cri-proxy", "ctl", "status"))
		}
	}()
	n.kubectl(t, "wait", "--for=jsonpath={.status.phase}=Completed", "containerrecreaterequest/enrolled",
		"--timeout=60s")
	out := n.kubectl(t, "get", "containerrecreaterequest", "enrolled", "-o",
		"jsonpath={.status.containerRecreateStates[*].phase} {.status.message}")
	if !strings.HasPrefix(out, "Succeeded") {
		t.Error(out)
	}
	if m := n.method(t, "Restart"); m != "gate" {
		t.Errorf("the method was %s", m)
	}
	signed := n.kubectl(t, "get", "certificatesigningrequests", "-o",
		`jsonpath={range .items[*]}{.spec.username} {.spec.signerName} {.status.conditions[*].type}{"\n"}{end}`)
	if want := fmt.Sprintf("system:node:%s cri-proxy.io/node Approved\n", n.NodeName); signed != want {
		t.Errorf("certificates were asked for as %q, not %q", signed, want)
	}
}
