// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package v1alpha1_test

import (
	"context"
	"os"
	"reflect"
	"strings"
	"testing"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/defaulting"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/listtype"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/pruning"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation/field"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"sigs.k8s.io/yaml"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/api/crdtest"
)

// crd does with a manifest what the API server does with the CRD in deploy/crds,
// through the API server's own packages.
type crd struct {
	crdtest.Schema
	t *testing.T
}

func loadCRD(t *testing.T) *crd {
	t.Helper()
	return &crd{crdtest.Load(t, readCRD(t, "containerrecreaterequests"), "v1alpha1"), t}
}

// create is the object as stored after a strict create, and what was wrong.
func (c *crd) create(manifest string) (map[string]any, []string) {
	c.t.Helper()
	object := c.parse(manifest)
	unknown := c.prune(object)
	// The status subresource drops status before validation.
	delete(object, "status")
	defaulting.Default(object, c.Structural)
	return object, append(unknown, c.validate(object, nil)...)
}

// update is what is wrong with putting after in the place of before.
func (c *crd) update(after, before map[string]any) []string {
	defaulting.Default(after, c.Structural)
	return c.validate(after, before)
}

func (c *crd) parse(manifest string) map[string]any {
	c.t.Helper()
	object := map[string]any{}
	if err := yaml.Unmarshal([]byte(manifest), &object); err != nil {
		c.t.Fatal(err)
	}
	// As from JSON on the wire: integers are int64.
	return runtime.DeepCopyJSON((&unstructured.Unstructured{Object: toInt64(object).(map[string]any)}).Object)
}

func toInt64(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k := range v {
			v[k] = toInt64(v[k])
		}
	case []any:
		for i := range v {
			v[i] = toInt64(v[i])
		}
	case float64:
		if v == float64(int64(v)) {
			return int64(v)
		}
	}
	return v
}

func (c *crd) prune(object map[string]any) []string {
	var wrong []string
	for _, path := range pruning.PruneWithOptions(object, c.Structural, true,
		schema.UnknownFieldPathOptions{TrackUnknownFieldPaths: true}) {
		wrong = append(wrong, "unknown field "+path)
	}
	return wrong
}

func (c *crd) validate(object, old map[string]any) []string {
	errs := validation.ValidateCustomResource(nil, object, c.Validator)
	errs = append(errs, listtype.ValidateListSetsAndMaps(nil, c.Structural, object)...)
	var before any
	if old != nil {
		before = old
	}
	if len(errs) == 0 {
		var more field.ErrorList
		more, _ = c.Rules.Validate(context.Background(), nil, c.Structural, object, before,
			celconfig.RuntimeCELCostBudget)
		errs = append(errs, more...)
	}
	var wrong []string
	for _, err := range errs {
		wrong = append(wrong, err.Error())
	}
	return wrong
}

const head = "apiVersion: apps.kruise.io/v1alpha1\nkind: ContainerRecreateRequest\nmetadata: " +
	"{namespace: ns, name: crr}\n"

// fromTheField is what users apply today.
func fromTheField(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("../../../deploy/examples/restart.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// fromTheManual has every field users of OpenKruise set.
const fromTheManual = `
apiVersion: apps.kruise.io/v1alpha1
kind: ContainerRecreateRequest
metadata:
  namespace: pod-namespace
  name: xxx
spec:
  podName: pod-name
  containers:
  - name: app
  - name: sidecar
  strategy:
    failurePolicy: Fail
    orderedRecreate: false
    forceRecreate: false
    terminationGracePeriodSeconds: 30
    unreadyGracePeriodSeconds: 3
    minStartedSeconds: 10
  activeDeadlineSeconds: 300
  ttlSecondsAfterFinished: 1800
`

func TestCreate(t *testing.T) {
	c := loadCRD(t)
	tests := []struct {
		name, manifest string
		wrong          string // "" for none
	}{
		{"from the field, with a status and an empty strategy of a container", fromTheField(t), ""},
		{"from OpenKruise's manual", fromTheManual, ""},
		{"least", head + `spec: {podName: p, containers: [{name: app}]}`, ""},
		{"every strategy field of a container",
			head + `spec: {podName: p, containers: [{name: app, strategy: {failurePolicy: Ignore, orderedRecreate: true, forceRecreate: true, terminationGracePeriodSeconds: 0, unreadyGracePeriodSeconds: 0, minStartedSeconds: 0}}]}`, ""},
		{"deadline of 3 s", head + `spec: {podName: p, containers: [{name: app}], activeDeadlineSeconds: 3}`, ""},
		{"full status", fromTheField(t) + "    message: m\n    isKilled: true\n  phase: Completed\n  completionTime: " +
			"\"2026-01-01T00:00:00Z\"\n  message: m\n", ""},

		{"no podName", head + `spec: {containers: [{name: app}]}`, "spec.podName: Required value"},
		{"empty podName", head + `spec: {podName: "", containers: [{name: app}]}`, "podName can not be empty"},
		{"no containers", head + `spec: {podName: p}`, "spec.containers: Required value"},
		{"empty containers", head + `spec: {podName: p, containers: []}`, "name at least one container"},
		{"a container twice", head + `spec: {podName: p, containers: [{name: app}, {name: app}]}`, "Duplicate value"},
		{"a container without name", head + `spec: {podName: p, containers: [{}]}`, "Required value"},
		{"deadline of 2 s", head + `spec: {podName: p, containers: [{name: app}], activeDeadlineSeconds: 2}`,
			"activeDeadlineSeconds can not be less than 3"},
		{"negative grace",
			head + `spec: {podName: p, containers: [{name: app}], strategy: {terminationGracePeriodSeconds: -1}}`,
			"should be greater than or equal to 0"},
		{"negative drain",
			head + `spec: {podName: p, containers: [{name: app}], strategy: {unreadyGracePeriodSeconds: -1}}`,
			"should be greater than or equal to 0"},
		{"unknown failurePolicy",
			head + `spec: {podName: p, containers: [{name: app}], strategy: {failurePolicy: Maybe}}`,
			`supported values: "Fail", "Ignore"`},
		{"unknown failurePolicy of a container",
			head + `spec: {podName: p, containers: [{name: app, strategy: {failurePolicy: Maybe}}]}`,
			`supported values: "Fail", "Ignore"`},
		{"unknown field", head + `spec: {podName: p, containers: [{name: app, strategi: {}}]}`,
			"unknown field spec.containers[0].strategi"},
		// The schema is asked after the webhook, which refuses what the user gives.
		{"filled in at admission",
			head + `spec: {podName: p, containers: [{name: app, preStop: {httpGet: {port: web}}, ports: [{name: web, containerPort: 80}], statusContext: {containerID: a, restartCount: 0}}], strategy: {terminationGracePeriodSeconds: 30}}`, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c.t = t
			_, wrong := c.create(tt.manifest)
			got := strings.Join(wrong, "\n")
			if tt.wrong == "" && got != "" || !strings.Contains(got, tt.wrong) {
				t.Errorf("errors:\n%s\nwant: %q", got, tt.wrong)
			}
		})
	}
}

func TestDefaults(t *testing.T) {
	c := loadCRD(t)
	object, wrong := c.create(fromTheField(t))
	if len(wrong) > 0 {
		t.Fatal(wrong)
	}
	var crr appsv1alpha1.ContainerRecreateRequest
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(object, &crr); err != nil {
		t.Fatal(err)
	}
	if crr.Spec.Strategy == nil ||
		crr.Spec.Strategy.FailurePolicy != appsv1alpha1.ContainerRecreateRequestFailurePolicyFail {
		t.Errorf("strategy is %+v, want failurePolicy Fail", crr.Spec.Strategy)
	}
	if s := crr.Spec.Containers[0].Strategy; s == nil ||
		*s != (appsv1alpha1.ContainerRecreateRequestContainerStrategy{}) {
		t.Errorf("strategy of the container is %+v, want it empty as given", s)
	}
}

func TestUpdate(t *testing.T) {
	c := loadCRD(t)
	container := func(o map[string]any) map[string]any {
		return o["spec"].(map[string]any)["containers"].([]any)[0].(map[string]any)
	}
	spec := func(o map[string]any) map[string]any { return o["spec"].(map[string]any) }
	context := func(id string) map[string]any {
		return map[string]any{"containerID": id, "restartCount": int64(1)}
	}
	pinned := func(o map[string]any) { container(o)["statusContext"] = context("containerd://a") }
	hooked := func(o map[string]any) {
		container(o)["preStop"] = map[string]any{"httpGet": map[string]any{"port": "web"}}
		container(o)["ports"] = []any{map[string]any{"name": "web", "containerPort": int64(80), "protocol": "TCP"}}
	}
	tests := []struct {
		name   string
		before func(map[string]any)
		change func(map[string]any)
		wrong  string
	}{
		{"nothing", nil, func(map[string]any) {}, ""},
		{"labels", nil, func(o map[string]any) {
			o["metadata"].(map[string]any)["labels"] = map[string]any{"a": "b"}
		}, ""},
		{"statusContext filled in", nil, pinned, ""},
		{"same manifest applied again", pinned, func(o map[string]any) { delete(container(o), "statusContext") }, ""},
		{"statusContext changed", pinned,
			func(o map[string]any) { container(o)["statusContext"] = context("containerd://b") },
			"statusContext is immutable"},
		{"podName", nil, func(o map[string]any) { spec(o)["podName"] = "other" }, "podName cannot be changed"},
		{"container renamed", nil, func(o map[string]any) { container(o)["name"] = "other" },
			"cannot be added, removed or reordered"},
		{"container added", nil, func(o map[string]any) {
			spec(o)["containers"] = append(spec(o)["containers"].([]any), map[string]any{"name": "third"})
		}, "cannot be added, removed or reordered"},
		{"containers reordered", nil, func(o map[string]any) {
			l := spec(o)["containers"].([]any)
			spec(o)["containers"] = []any{l[1], l[0]}
		}, "cannot be added, removed or reordered"},
		{"strategy", nil, func(o map[string]any) { spec(o)["strategy"] = map[string]any{"orderedRecreate": true} },
			"strategy cannot be changed"},
		{"strategy of a container", nil, func(o map[string]any) {
			container(o)["strategy"] = map[string]any{"orderedRecreate": true}
		}, "strategy of a container cannot be changed"},
		{"deadline", nil, func(o map[string]any) { spec(o)["activeDeadlineSeconds"] = int64(10) },
			"activeDeadlineSeconds cannot be changed"},
		{"deadline taken away", nil, func(o map[string]any) { delete(spec(o), "activeDeadlineSeconds") },
			"activeDeadlineSeconds cannot be changed"},
		{"time to live", nil, func(o map[string]any) { spec(o)["ttlSecondsAfterFinished"] = int64(10) },
			"ttlSecondsAfterFinished cannot be changed"},
		{"preStop added", nil, func(o map[string]any) { container(o)["preStop"] = map[string]any{} },
			"preStop is read-only"},
		{"ports added", nil, func(o map[string]any) { container(o)["ports"] = []any{} }, "ports is read-only"},
		{"a filled-in hook left alone", hooked, func(map[string]any) {}, ""},
		{"the manifest without the hook again", hooked, func(o map[string]any) {
			delete(container(o), "preStop")
			delete(container(o), "ports")
		}, ""},
		{"another hook", hooked, func(o map[string]any) {
			container(o)["preStop"] = map[string]any{"exec": map[string]any{"command": []any{"a"}}}
		}, "preStop is read-only"},
		{"other ports", hooked, func(o map[string]any) {
			container(o)["ports"] = []any{map[string]any{"containerPort": int64(81)}}
		}, "ports is read-only"},
		{"grace taken away", nil, func(o map[string]any) {
			delete(spec(o)["strategy"].(map[string]any), "terminationGracePeriodSeconds")
		}, "strategy cannot be changed"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c.t = t
			before, wrong := c.create(fromTheManual)
			if len(wrong) > 0 {
				t.Fatal(wrong)
			}
			if tt.before != nil {
				tt.before(before)
			}
			after := runtime.DeepCopyJSON(before)
			tt.change(after)
			got := strings.Join(c.update(after, before), "\n")
			if tt.wrong == "" && got != "" || !strings.Contains(got, tt.wrong) {
				t.Errorf("errors:\n%s\nwant: %q", got, tt.wrong)
			}
		})
	}
}

// TestRequestVersions: both versions are served with one schema and no conversion. It is v1alpha1
// that is stored, which every OpenKruise can read.
func TestRequestVersions(t *testing.T) {
	definition := readCRD(t, "containerrecreaterequests")
	if c := definition.Spec.Conversion; c != nil && c.Strategy != apiextensionsv1.NoneConverter {
		t.Errorf("conversion %v", c)
	}
	if got := strings.Join(definition.Spec.Names.ShortNames, ","); got != "crr" {
		t.Errorf("short names %q, want crr", got)
	}
	want := []string{
		"PHASE .status.phase", "POD .spec.podName",
		`NODE .metadata.labels.crr\.apps\.kruise\.io/node-name`, "AGE .metadata.creationTimestamp",
	}
	var versions []string
	for _, v := range definition.Spec.Versions {
		versions = append(versions, v.Name)
		if !v.Served || v.Storage != (v.Name == "v1alpha1") || v.Subresources == nil || v.Subresources.Status == nil {
			t.Errorf("version %s: served %v, storage %v, subresources %v", v.Name, v.Served, v.Storage, v.Subresources)
		}
		if !reflect.DeepEqual(v.Schema, definition.Spec.Versions[0].Schema) {
			t.Errorf("version %s has another schema", v.Name)
		}
		var got []string
		for _, column := range v.AdditionalPrinterColumns {
			got = append(got, column.Name+" "+column.JSONPath)
		}
		if strings.Join(got, "\n") != strings.Join(want, "\n") {
			t.Errorf("columns of %s\n%q\nwant\n%q", v.Name, got, want)
		}
	}
	if strings.Join(versions, " ") != "v1alpha1 v1beta1" {
		t.Errorf("versions %v", versions)
	}
}
