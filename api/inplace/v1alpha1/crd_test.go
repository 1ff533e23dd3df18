// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package v1alpha1_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/defaulting"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/listtype"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/pruning"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/json"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"sigs.k8s.io/yaml"

	"github.com/cri-proxy/cri-proxy/api/crdtest"
	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
)

// crd does with a manifest what the API server does with the CRD in deploy/crds, through the API
// server's own packages.
type crd struct {
	crdtest.Schema
	definition *apiextensionsv1.CustomResourceDefinition
}

func load(t *testing.T) *crd {
	t.Helper()
	definition := crdtest.Read(t, "../../../deploy/crds", "cri-proxy.io_inplacerollouts.yaml")
	return &crd{crdtest.Load(t, definition, "v1alpha1"), definition}
}

// apply is the object as stored after a strict create, or an update of before, and what was wrong.
func (c *crd) apply(t *testing.T, manifest string, before map[string]any) (map[string]any, string) {
	t.Helper()
	text, err := yaml.YAMLToJSON([]byte(manifest))
	if err != nil {
		t.Fatal(err)
	}
	object := map[string]any{}
	if err := json.Unmarshal(text, &object); err != nil {
		t.Fatal(err)
	}
	var wrong []string
	for _, path := range pruning.PruneWithOptions(object, c.Structural, true,
		schema.UnknownFieldPathOptions{TrackUnknownFieldPaths: true}) {
		wrong = append(wrong, "unknown field "+path)
	}
	defaulting.Default(object, c.Structural)
	errs := validation.ValidateCustomResource(nil, object, c.Validator)
	errs = append(errs, listtype.ValidateListSetsAndMaps(nil, c.Structural, object)...)
	if len(errs) == 0 {
		var old any
		if before != nil {
			old = before
		}
		more, _ := c.Rules.Validate(t.Context(), nil, c.Structural, object, old, celconfig.RuntimeCELCostBudget)
		errs = append(errs, more...)
	}
	for _, err := range errs {
		wrong = append(wrong, err.Error())
	}
	return object, strings.Join(wrong, "\n")
}

const (
	head   = "apiVersion: cri-proxy.io/v1alpha1\nkind: InPlaceRollout\nmetadata: {namespace: ns, name: r}\nspec: "
	change = "containers: [{name: app, image: 'app:2'}]"
)

func TestCreate(t *testing.T) {
	c := load(t)
	with := func(strategy string) string {
		return head + "{target: {podName: p}, " + change + ", strategy: {" + strategy + "}}"
	}
	tests := []struct{ name, manifest, wrong string }{
		{"least", head + "{target: {podName: p}, " + change + "}", ""},
		{"selector", head + "{target: {selector: {matchLabels: {a: b}}}, " + change + "}", ""},
		{"workload", head + "{target: {workloadRef: {kind: Deployment, name: d}}, " + change + "}", ""},
		{"restart", head + "{target: {podName: p}, containers: [{name: app}, {name: b, image: 'r:5000/a/b@sha256:" +
			strings.Repeat("a", 64) + "'}]}", ""},
		{"every field",
			with("maxUnavailable: 10%, partition: 0%, order: StartFirst, drainSeconds: 5, minReadySeconds: 3, " +
				"progressDeadlineSeconds: 60, onFailure: Continue, terminationGracePeriodSeconds: 0"), ""},
		{"partition of 0", with("partition: 0, maxUnavailable: 1"), ""},

		{"no target", head + "{target: {}, " + change + "}", "exactly one of podName, selector and workloadRef"},
		{"two targets", head + "{target: {podName: p, workloadRef: {kind: Deployment, name: d}}, " + change + "}",
			"exactly one of podName, selector and workloadRef"},
		{"a selector of everything", head + "{target: {selector: {}}, " + change + "}",
			"an empty one would choose every pod of the namespace"},
		{"an unknown kind", head + "{target: {workloadRef: {kind: Job, name: d}}, " + change + "}",
			`supported values: "Deployment", "StatefulSet", "DaemonSet"`},
		{"another group", head + "{target: {workloadRef: {apiVersion: apps.kruise.io/v1alpha1, kind: StatefulSet, " +
			"name: d}}, " + change + "}", `supported values: "apps/v1"`},
		{"no containers", head + "{target: {podName: p}, containers: []}", "should have at least 1 items"},
		{"a container twice", head + "{target: {podName: p}, containers: [{name: a}, {name: a, image: b}]}",
			"Duplicate value"},
		{"an image that is none", head + "{target: {podName: p}, containers: [{name: a, image: 'A B'}]}",
			"image must be a reference as in a pod"},
		{"maxUnavailable 0", with("maxUnavailable: 0"),
			"maxUnavailable must be a number from 1 or a percentage from 1% to 100%"},
		{"maxUnavailable 0%", with("maxUnavailable: 0%"),
			"maxUnavailable must be a number from 1 or a percentage from 1% to 100%"},
		{"partition -1", with("partition: -1"), "partition must be a number from 0 or a percentage from 0% to 100%"},
		{"partition of words", with("partition: some"),
			"partition must be a number from 0 or a percentage from 0% to 100%"},
		{"an unknown order", with("order: Both"), `supported values: "StopFirst", "StartFirst"`},
		{"an unknown policy", with("onFailure: Ignore"), `supported values: "Rollback", "Pause", "Continue"`},
		{"too short a deadline", with("minReadySeconds: 50, drainSeconds: 10, progressDeadlineSeconds: 60"),
			"progressDeadlineSeconds must be greater than minReadySeconds and drainSeconds together"},
		{"an unknown field", with("maxSurge: 1"), "unknown field spec.strategy.maxSurge"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, got := c.apply(t, tt.manifest, nil)
			if tt.wrong == "" && got != "" || !strings.Contains(got, tt.wrong) {
				t.Errorf("errors:\n%s\nwant: %q", got, tt.wrong)
			}
		})
	}
}

func TestDefaults(t *testing.T) {
	object, wrong := load(t).apply(t, head+"{target: {workloadRef: {kind: Deployment, name: d}}, "+change+"}", nil)
	if wrong != "" {
		t.Fatal(wrong)
	}
	var r inplace.InPlaceRollout
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(object, &r); err != nil {
		t.Fatal(err)
	}
	s := r.Spec.Strategy
	if s.MaxUnavailable.IntValue() != 1 || s.Order != inplace.StopFirst || s.ProgressDeadlineSeconds != 600 ||
		s.OnFailure != inplace.Rollback || r.Spec.Target.WorkloadRef.APIVersion != "apps/v1" {
		t.Errorf("spec %+v", r.Spec)
	}
}

func TestUpdate(t *testing.T) {
	c := load(t)
	pod, selector := head+"{target: {podName: p}, "+change+"}",
		head+"{target: {selector: {matchLabels: {a: b}}}, "+change+"}"
	tests := []struct{ name, before, after, wrong string }{
		{"the next image", pod, strings.Replace(pod, "app:2", "app:3", 1), ""},
		{"a pause", pod, strings.Replace(pod, "spec: {", "spec: {paused: true, ", 1), ""},
		{"another pod", pod, strings.Replace(pod, "podName: p", "podName: q", 1), "the target is immutable"},
		{"a pod instead of a selector", selector, pod, "the target is immutable"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before, wrong := c.apply(t, tt.before, nil)
			if wrong != "" {
				t.Fatal(wrong)
			}
			_, got := c.apply(t, tt.after, before)
			if tt.wrong == "" && got != "" || !strings.Contains(got, tt.wrong) {
				t.Errorf("errors:\n%s\nwant: %q", got, tt.wrong)
			}
		})
	}
}

func TestExamples(t *testing.T) {
	c := load(t)
	files, err := filepath.Glob("../../../deploy/examples/rollout-*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if _, wrong := c.apply(t, string(text), nil); wrong != "" {
			t.Errorf("%s: %s", file, wrong)
		}
	}
}

func TestNamesAndColumns(t *testing.T) {
	d := load(t).definition
	if got := strings.Join(d.Spec.Names.ShortNames, ","); got != "ipr" {
		t.Errorf("short names %q", got)
	}
	version := d.Spec.Versions[0]
	if version.Subresources == nil || version.Subresources.Status == nil {
		t.Error("no status subresource")
	}
	var columns []string
	for _, c := range version.AdditionalPrinterColumns {
		columns = append(columns, c.Name)
	}
	if got := strings.Join(columns, " "); got != "DESIRED UPDATED READY UNAVAILABLE FAILED STATE AGE CONTAINERS "+
		"IMAGES MESSAGE" {
		t.Errorf("columns %s", got)
	}
}
