// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package metricdoc reads docs/METRICS.md, the list of all metrics, and compares it with what a
// registry has. Dashboards and alert rules are held to the same list.
package metricdoc

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// Row is one metric.
type Row struct {
	Name, Type, Meaning string
	// Labels are sorted.
	Labels []string
}

// Read returns the rows of the tables below a heading of the file.
func Read(t *testing.T, file, heading string) []Row {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(text), "\n## "+heading+"\n")
	if !found {
		t.Fatalf("%s has no heading %q", file, heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	var rows []Row
	for line := range strings.Lines(section) {
		cells := strings.Split(strings.TrimSpace(line), "|")
		if len(cells) != 6 || !strings.HasPrefix(strings.TrimSpace(cells[1]), "`") {
			continue
		}
		r := Row{Name: strings.Trim(cells[1], " `"), Type: strings.TrimSpace(cells[2]),
			Meaning: strings.TrimSpace(cells[4])}
		for label := range strings.SplitSeq(cells[3], ",") {
			if label = strings.Trim(label, " `"); label != "" {
				r.Labels = append(r.Labels, label)
			}
		}
		slices.Sort(r.Labels)
		if len(r.Meaning) < 5 {
			t.Errorf("%s: %s has no meaning", file, r.Name)
		}
		rows = append(rows, r)
	}
	if len(rows) == 0 {
		t.Fatalf("%s has no metrics below %q", file, heading)
	}
	return rows
}

// Registry is what a [*prometheus.Registry] is.
type Registry interface {
	prometheus.Collector
	prometheus.Gatherer
}

var descText = regexp.MustCompile(
	`^Desc\{fqName: "([^"]*)", help: "(.*)", constLabels: \{(.*)\}, variableLabels: \{(.*)\}\}$`)

// Compare reports what is in the registries with one of the prefixes and not in rows, the other way
// round, and names that are not what Prometheus wants.
func Compare(t *testing.T, rows []Row, prefix string, registries ...Registry) {
	t.Helper()
	have := map[string]Row{}
	for _, r := range registries {
		descs := make(chan *prometheus.Desc)
		go func() {
			defer close(descs)
			r.Describe(descs)
		}()
		for d := range descs {
			m := descText.FindStringSubmatch(d.String())
			if m == nil {
				t.Fatalf("%s is not understood", d)
			}
			if !strings.HasPrefix(m[1], prefix) {
				continue
			}
			row := Row{Name: m[1], Meaning: m[2]}
			for label := range strings.SplitSeq(m[4], ",") {
				if label = strings.TrimSpace(label); label != "" {
					row.Labels = append(row.Labels, label)
				}
			}
			for _, label := range regexp.MustCompile(`(\w+)="`).FindAllStringSubmatch(m[3], -1) {
				row.Labels = append(row.Labels, label[1])
			}
			slices.Sort(row.Labels)
			have[row.Name] = row
		}
		families, err := r.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if row, ok := have[f.GetName()]; ok {
				row.Type = strings.ToLower(f.GetType().String())
				have[f.GetName()] = row
			}
		}
	}
	documented := map[string]bool{}
	for _, want := range rows {
		if documented[want.Name] {
			t.Errorf("%s is documented twice", want.Name)
		}
		documented[want.Name] = true
		got, ok := have[want.Name]
		if !ok {
			t.Errorf("%s is documented and does not exist", want.Name)
			continue
		}
		if !slices.Equal(got.Labels, want.Labels) {
			t.Errorf("%s has labels %v, documented are %v", want.Name, got.Labels, want.Labels)
		}
		if got.Type != "" && got.Type != want.Type { // without a sample there is no telling
			t.Errorf("%s is a %s, documented as a %s", want.Name, got.Type, want.Type)
		}
		if err := wellNamed(want); err != nil {
			t.Error(err)
		}
	}
	for name := range have {
		if !documented[name] {
			t.Errorf("%s is not documented", name)
		}
	}
}

// wellNamed holds a metric to https://prometheus.io/docs/practices/naming/, as far as a program
// can.
func wellNamed(r Row) error {
	total, unit := strings.HasSuffix(r.Name, "_total"),
		regexp.MustCompile(`_(milli|micro|nano)?seconds|_m?s$|_minutes|_(kilo|mega|k|mi)bytes|_percent`)
	if (r.Type == "counter") != total {
		return fmt.Errorf("%s is a %s: counters, and they alone, end in _total", r.Name, r.Type)
	}
	if m := unit.FindString(r.Name); m != "" && m != "_seconds" {
		return fmt.Errorf("%s: the unit is seconds, bytes or a ratio", r.Name)
	}
	for _, label := range r.Labels {
		if slices.Contains([]string{"pod", "namespace", "container", "node", "uid", "image", "le"}, label) {
			return fmt.Errorf("%s: label %s has no bounds", r.Name, label)
		}
	}
	return nil
}
