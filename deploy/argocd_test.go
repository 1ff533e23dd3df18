// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// health is what kstatus and Argo CD make of objects, a line for each.
func health(t *testing.T, documents string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "run", "./health", absolute(t, "argocd/health.lua"))
	cmd.Dir = filepath.Join("..", "tools", "deploy")
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=readonly", "CGO_ENABLED=0")
	cmd.Stdin = strings.NewReader(documents)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, &stderr)
	}
	return string(out)
}

// TestHealth: objects as the controllers write them, which the tests of controllers and of the
// cluster look at, each with what kstatus itself and the script for Argo CD say.
func TestHealth(t *testing.T) {
	const conditions = `conditions: [{type: Available, status: "True"}, ` +
		`{type: Ready, status: "READY", reason: R, message: M}, ` +
		`{type: Reconciling, status: "WORK", reason: R, message: M}, ` +
		`{type: Stalled, status: "STALL", reason: R, message: M}]`
	status := func(reason, message, is string) string {
		text := strings.NewReplacer("reason: R", "reason: "+reason, "message: M", "message: "+message).
			Replace(conditions)
		for _, word := range []string{"READY", "WORK", "STALL"} {
			to := "False"
			if word == is {
				to = "True"
			}
			text = strings.ReplaceAll(text, word, to)
		}
		return text
	}
	var documents, want strings.Builder
	for _, tt := range []struct{ name, status, want string }{
		{"new", "observedGeneration: -1", "InProgress Progressing cri-controller has not seen it yet"},
		{"changed", "observedGeneration: 1, " + status("RolledOut", "done", "READY"),
			"InProgress Progressing cri-controller has not seen it yet"},
		{"at-work", "observedGeneration: 2, message: 1 of 3, " + status("RollingOut", `""`, "WORK"),
			"InProgress Progressing 1 of 3"},
		{"paused", "observedGeneration: 2, " + status("Paused", "paused", "WORK"), "InProgress Suspended paused"},
		{"done", "observedGeneration: 2, " + status("RolledOut", "done", "READY"), "Current Healthy done"},
		{"failed", "observedGeneration: 2, " + status("StoppedOnFailure", "stopped", "STALL"),
			"Failed Degraded stopped"},
		{"rolled-back", "observedGeneration: 2, " + status("RolledBack", "rolled back", "STALL"),
			"Failed Degraded rolled back"},
		{"of-openkruise", "completionTime: '2026-11-30T00:00:00Z', message: over", "Current Healthy over"},
		{"of-openkruise-at-work", "phase: Recreating", "Current Progressing cri-controller has not seen it yet"},
	} {
		for _, kind := range []string{"cri-proxy.io/v1alpha1 InPlaceRollout",
			"apps.kruise.io/v1alpha1 ContainerRecreateRequest", "apps.kruise.io/v1beta1 ImagePullJob",
			"apps.kruise.io/v1beta1 ImageListPullJob"} {
			version, kind, _ := strings.Cut(kind, " ")
			documents.WriteString("---\napiVersion: " + version + "\nkind: " + kind + "\nmetadata: {name: " + tt.name +
				", generation: 2}\nstatus: {" + tt.status + "}\n")
			want.WriteString(kind + "/" + tt.name + " " + tt.want + "\n")
		}
	}
	if got := health(t, documents.String()); got != want.String() {
		t.Errorf("got\n%s\nwant\n%s", got, want.String())
	}
}

// TestArgoCD: the component puts the script, as it is, under a key of each kind, beside what Argo
// CD's own ConfigMap has.
func TestArgoCD(t *testing.T) {
	script, err := os.ReadFile("argocd/health.lua")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	relative, err := filepath.Rel(dir, absolute(t, "argocd"))
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"cm.yaml": "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: argocd-cm, namespace: " +
			"argocd}\ndata: {url: x}\n",
		"kustomization.yaml": "resources: [cm.yaml]\ncomponents: [" + relative + "]\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	built, err := tool(t, "kustomize", "build", "--load-restrictor=LoadRestrictionsNone", dir)
	if err != nil {
		t.Fatal(err)
	}
	data, _ := objects(t, built)["ConfigMap argocd/argocd-cm"]["data"].(object)
	if len(data) != 5 || data["url"] != "x" {
		t.Fatalf("data %v", data)
	}
	crds, err := filepath.Glob("crds/*.yaml")
	if err != nil || len(crds) != 4 {
		t.Fatal(crds, err)
	}
	for _, file := range crds {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, crd := range objects(t, string(text)) {
			spec := crd["spec"].(object)
			key := "resource.customizations.health." + spec["group"].(string) + "_" +
				spec["names"].(object)["kind"].(string)
			if data[key] != string(script) {
				t.Errorf("%s is\n%v", key, data[key])
			}
		}
	}
}
