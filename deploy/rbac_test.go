// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/yaml"
)

// granted are the permissions of a role as "group/resource verb".
func granted(t *testing.T, file string) map[string]bool {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]bool{}
	for _, document := range strings.Split(string(text), "\n---\n") {
		var role rbacv1.ClusterRole
		if err := yaml.Unmarshal([]byte(document), &role); err != nil {
			t.Fatal(err)
		}
		for _, rule := range role.Rules {
			if len(rule.NonResourceURLs) > 0 {
				t.Errorf("%s grants URLs %v, which docs/RBAC.md has no column for", file, rule.NonResourceURLs)
			}
			for _, group := range rule.APIGroups {
				for _, resource := range rule.Resources {
					for _, verb := range rule.Verbs {
						if group == "*" || resource == "*" || verb == "*" {
							t.Errorf("%s grants *: name what is needed", file)
						}
						all[group+"/"+resource+" "+verb] = true
					}
				}
			}
		}
	}
	if len(all) == 0 {
		t.Fatalf("%s grants nothing", file)
	}
	return all
}

// explained are the permissions that a section of docs/RBAC.md gives reasons for.
func explained(t *testing.T, section string) map[string]bool {
	t.Helper()
	text, err := os.ReadFile("../docs/RBAC.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(text), "\n## "+section+"\n")
	if !found {
		t.Fatalf("docs/RBAC.md has no section %q", section)
	}
	rest, _, _ = strings.Cut(rest, "\n## ")
	all := map[string]bool{}
	for line := range strings.Lines(rest) {
		cells := strings.Split(strings.TrimSpace(line), "|")
		if len(cells) != 6 || strings.TrimSpace(cells[1]) == "group" || strings.HasPrefix(cells[1], "---") {
			continue
		}
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		if len(cells[4]) < 10 {
			t.Errorf("no reason: %s", line)
		}
		for resource := range strings.SplitSeq(cells[2], ", ") {
			for verb := range strings.SplitSeq(cells[3], ", ") {
				key := cells[1] + "/" + resource + " " + verb
				if all[key] {
					t.Errorf("%s has two rows", key)
				}
				all[key] = true
			}
		}
	}
	return all
}

// TestUserRoles: Kubernetes' own roles take up ours by their labels.
func TestUserRoles(t *testing.T) {
	text, err := os.ReadFile("rbac/users.yaml")
	if err != nil {
		t.Fatal(err)
	}
	got := map[string][]string{}
	for _, document := range strings.Split(string(text), "\n---\n") {
		var role rbacv1.ClusterRole
		if err := yaml.Unmarshal([]byte(document), &role); err != nil {
			t.Fatal(err)
		}
		for label, value := range role.Labels {
			if to, ok := strings.CutPrefix(label, "rbac.authorization.k8s.io/aggregate-to-"); ok && value == "true" {
				got[role.Name] = append(got[role.Name], to)
			}
		}
		slices.Sort(got[role.Name])
	}
	want := map[string][]string{"cri-proxy-edit": {"admin", "edit"}, "cri-proxy-view": {"admin", "edit", "view"}}
	if !maps.EqualFunc(got, want, slices.Equal[[]string]) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestEveryVerbHasAReason(t *testing.T) {
	for section, file := range map[string]string{
		"In all namespaces": "rbac/role.yaml", "In its own namespace": "rbac/leader_election.yaml",
		"For its CA": "rbac/identity.yaml", "What nodes may do": "rbac/nodes.yaml",
		"What users may do": "rbac/users.yaml", "For the webhooks": "webhook/rbac.yaml",
	} {
		t.Run(section, func(t *testing.T) {
			grants, reasons := granted(t, file), explained(t, section)
			for _, key := range slices.Sorted(maps.Keys(grants)) {
				if !reasons[key] {
					t.Errorf("%s grants %q: say in docs/RBAC.md what for", file, key)
				}
			}
			for _, key := range slices.Sorted(maps.Keys(reasons)) {
				if !grants[key] {
					t.Errorf("docs/RBAC.md lists %q, which %s does not grant", key, file)
				}
			}
		})
	}
}
