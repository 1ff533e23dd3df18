// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// TestInstaller: what kustomize makes of deploy/installer is what docs/RBAC.md says, and one
// namespace holds it all.
func TestInstaller(t *testing.T) {
	built, err := tool(t, "kustomize", "build", absolute(t, "installer"))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"ClusterRole <nil>/cri-proxy-installer", "ClusterRoleBinding <nil>/cri-proxy-installer",
		"DaemonSet cri-proxy-installer/cri-proxy-installer",
		"Namespace <nil>/cri-proxy-installer", "ServiceAccount cri-proxy-installer/cri-proxy-installer",
		"ValidatingAdmissionPolicy <nil>/cri-proxy-installer",
		"ValidatingAdmissionPolicyBinding <nil>/cri-proxy-installer",
	}
	all := objects(t, built)
	if got := slices.Sorted(maps.Keys(all)); !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	if rules := pretty(t, all[want[0]]["rules"]); rules != "- apiGroups:\n  - \"\"\n  resources:\n  - nodes\n  "+
		"verbs:\n  - patch\n" {
		t.Errorf("the role has\n%s", rules)
	}
}

// TestInstallerPolicy: it denies what it cannot judge, and is about the label and the annotation
// that the installer sets.
func TestInstallerPolicy(t *testing.T) {
	text, err := os.ReadFile("installer/policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	all := objects(t, string(text))
	policy, _ := all["ValidatingAdmissionPolicy <nil>/cri-proxy-installer"]["spec"].(object)
	if policy["failurePolicy"] != "Fail" {
		t.Errorf("failurePolicy %v", policy["failurePolicy"])
	}
	if spec := pretty(t,
		all["ValidatingAdmissionPolicyBinding <nil>/cri-proxy-installer"]["spec"]); spec != "policyName: "+
		"cri-proxy-installer\nvalidationActions:\n- Deny\n" {
		t.Errorf("the binding has\n%s", spec)
	}
	source, err := os.ReadFile("../systemd/node/installer/installer.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"cri-proxy.io/installed", "cri-proxy.io/installed-version"} {
		if !strings.Contains(string(source), `"`+key+`"`) || !strings.Contains(string(text), "'"+key+"'") {
			t.Errorf("%s is not what both the installer and its policy have", key)
		}
	}
}

// TestCloudInit: the snippet is what cloud-init takes, and points kubelet where cri-proxy listens.
func TestCloudInit(t *testing.T) {
	text, err := os.ReadFile("cloud-init.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(string(text), "#cloud-config\n") {
		t.Error("cloud-init knows it by its first line")
	}
	var c struct {
		WriteFiles []struct {
			Path    string `json:"path"`
			Content string `json:"content"`
		} `json:"write_files"`
		RunCmd [][]string `json:"runcmd"`
	}
	if err := yaml.UnmarshalStrict(text, &c); err != nil {
		t.Fatal(err)
	}
	if len(c.WriteFiles) != 1 ||
		c.WriteFiles[0].Content != "KUBELET_EXTRA_ARGS="+
			"--container-runtime-endpoint=unix:///run/cri-proxy/kubelet.sock\n" {
		t.Errorf("%+v", c.WriteFiles)
	}
	if !slices.ContainsFunc(c.RunCmd,
		func(cmd []string) bool { return slices.Equal(cmd, []string{"cri-proxy", "install", "--no-kubelet"}) }) {
		t.Errorf("%q", c.RunCmd)
	}
}
