// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/cri-proxy/cri-proxy/test/metricdoc"
)

const rulesFile = "alerts/cri-proxy.rules.yaml"

// rules are the groups of an alert file.
type rules struct {
	Groups []struct {
		Name  string
		Rules []struct {
			Alert, Expr, For    string
			Labels, Annotations map[string]string
		}
	}
}

// known are the metrics that nodes, controller and libraries have, which other tests compare with
// the programs.
func known(t *testing.T) map[string]metricdoc.Row {
	t.Helper()
	all := map[string]metricdoc.Row{}
	for _, heading := range []string{"Node", "Controller", "Of libraries"} {
		for _, r := range metricdoc.Read(t, "../docs/METRICS.md", heading) {
			all[r.Name] = r
		}
	}
	return all
}

var (
	metricName = regexp.MustCompile(
		`\b((?:criproxy|workqueue|controller_runtime|leader_election|process|go)_\w+)(\{[^}]*\})?`)
	matcher  = regexp.MustCompile(`(\w+)\s*(?:=~|!~|!=|=)\s*"`)
	grouping = regexp.MustCompile(`\b(?:by|on)\s*\(([^)]*)\)`)
)

// checkQuery reports metrics and labels of a query that do not exist.
func checkQuery(t *testing.T, where, query string, metrics map[string]metricdoc.Row) {
	t.Helper()
	labels := []string{"job", "instance", "le"} // of Prometheus itself
	found := false
	for _, m := range metricName.FindAllStringSubmatch(query, -1) {
		row, ok := metrics[m[1]]
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			if r, is := metrics[strings.TrimSuffix(m[1], suffix)]; !ok && is && r.Type == "histogram" {
				row, ok = r, true
			}
		}
		if !ok {
			t.Errorf("%s: there is no metric %s", where, m[1])
			continue
		}
		found = true
		labels = append(labels, row.Labels...)
		for _, l := range matcher.FindAllStringSubmatch(m[2], -1) {
			if l[1] != "job" && l[1] != "instance" && !slices.Contains(row.Labels, l[1]) {
				t.Errorf("%s: %s has no label %s", where, m[1], l[1])
			}
		}
	}
	if !found {
		t.Errorf("%s: no metric in %s", where, query)
	}
	for _, g := range grouping.FindAllStringSubmatch(query, -1) {
		for l := range strings.SplitSeq(g[1], ",") {
			if l = strings.TrimSpace(l); !slices.Contains(labels, l) {
				t.Errorf("%s: grouped by %s, which none of its metrics has", where, l)
			}
		}
	}
}

// TestAlerts: every alert asks for what there is, and says what to do about it in
// docs/OPERATIONS.md.
func TestAlerts(t *testing.T) {
	var all rules
	read(t, rulesFile, &all)
	text, err := os.ReadFile("../docs/OPERATIONS.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n## Alerts\n")
	section, _, _ = strings.Cut(section, "\n## ")
	headings := map[string]bool{}
	for _, h := range regexp.MustCompile(`(?m)^### (.*)$`).FindAllStringSubmatch(section, -1) {
		headings[h[1]] = true
	}
	metrics := known(t)
	seen := map[string]bool{}
	for _, g := range all.Groups {
		for _, r := range g.Rules {
			if seen[r.Alert] {
				t.Errorf("%s is there twice", r.Alert)
			}
			seen[r.Alert] = true
			checkQuery(t, r.Alert, r.Expr, metrics)
			if !slices.Contains([]string{"warning", "critical"}, r.Labels["severity"]) ||
				r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
				t.Errorf("%s says too little: %v %v", r.Alert, r.Labels, r.Annotations)
			}
			if want := "/docs/OPERATIONS.md#" +
				strings.ToLower(r.Alert); !strings.HasSuffix(r.Annotations["runbook_url"], want) {
				t.Errorf("%s: runbook_url %q, want one that ends in %s", r.Alert, r.Annotations["runbook_url"], want)
			}
			if !headings[r.Alert] {
				t.Errorf("docs/OPERATIONS.md has no heading ### %s below ## Alerts", r.Alert)
			}
		}
	}
	for h := range headings {
		if !seen[h] {
			t.Errorf("docs/OPERATIONS.md explains %s, which is no alert", h)
		}
	}
	var operator struct{ Spec rules }
	read(t, "components/prometheusrule/prometheusrule.yaml", &operator)
	if pretty(t, operator.Spec) != pretty(t, all) {
		t.Error("components/prometheusrule differs from " + rulesFile + ": run make generate")
	}
}

// TestAlertsFire: Prometheus' own tool finds the rules right, and they fire when they should.
func TestAlertsFire(t *testing.T) {
	for _, args := range [][]string{{"check", "rules", "--lint=all", "--lint-fatal", rulesFile},
		{"test", "rules", "alerts/cri-proxy.test.yaml"}} {
		args[len(args)-1] = absolute(t, args[len(args)-1])
		cmd := exec.CommandContext(t.Context(), "go", append([]string{"tool", "promtool"}, args...)...)
		cmd.Dir = filepath.Join("..", "tools", "alerts")
		// Without what finds targets in clouds: it is most of the program.
		cmd.Env = append(os.Environ(), "GOFLAGS=-mod=readonly -tags=remove_all_sd", "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

// TestDashboard: every panel asks for what there is, and no two lie upon each other.
func TestDashboard(t *testing.T) {
	text, err := os.ReadFile("grafana/cri-proxy.json")
	if err != nil {
		t.Fatal(err)
	}
	type grid struct{ H, W, X, Y int }
	var dashboard struct {
		UID, Title string
		Templating struct {
			List []struct{ Name, Definition string }
		}
		Panels []struct {
			ID      int
			Type    string
			Title   string
			GridPos grid
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	metrics := known(t)
	shown := map[string]bool{}
	ids := map[int]bool{}
	for i, p := range dashboard.Panels {
		if ids[p.ID] || p.Title == "" {
			t.Errorf("panel %d %q: its number is taken, or it has no title", p.ID, p.Title)
		}
		ids[p.ID] = true
		for _, q := range dashboard.Panels[:i] {
			a, b := p.GridPos, q.GridPos
			if a.X < b.X+b.W && b.X < a.X+a.W && a.Y < b.Y+b.H && b.Y < a.Y+a.H {
				t.Errorf("panels %q and %q lie upon each other", p.Title, q.Title)
			}
		}
		if p.Type == "row" {
			continue
		}
		if len(p.Targets) == 0 {
			t.Errorf("panel %q shows nothing", p.Title)
		}
		for _, target := range p.Targets {
			checkQuery(t, "panel "+p.Title, target.Expr, metrics)
			for _, m := range metricName.FindAllStringSubmatch(target.Expr, -1) {
				shown[m[1]] = true
			}
		}
	}
	for _, v := range dashboard.Templating.List {
		if v.Definition != "" {
			checkQuery(t, "variable "+v.Name, v.Definition, metrics)
		}
	}
	if len(shown) < 30 {
		t.Errorf("only %d metrics are shown", len(shown))
	}
}
