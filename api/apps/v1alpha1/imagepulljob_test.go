// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package v1alpha1_test

import (
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/distribution/reference"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	"github.com/cri-proxy/cri-proxy/api/crdtest"
)

func readCRD(t *testing.T, plural string) *apiextensionsv1.CustomResourceDefinition {
	t.Helper()
	return crdtest.Read(t, "../../../deploy/crds", "apps.kruise.io_"+plural+".yaml")
}

// pullCRD is the schema that both versions of the CRD have.
func pullCRD(t *testing.T, plural string) *crd {
	t.Helper()
	return &crd{crdtest.Load(t, readCRD(t, plural), "v1beta1"), t}
}

const (
	pullHead = "apiVersion: apps.kruise.io/v1alpha1\nkind: ImagePullJob\nmetadata: {namespace: ns, name: job}\n"
	listHead = "apiVersion: apps.kruise.io/v1beta1\nkind: ImageListPullJob\nmetadata: {namespace: ns, name: job}\n"
)

// pullFromTheManual has every field users of OpenKruise set.
const pullFromTheManual = pullHead + `
spec:
  image: nginx:1.9.1
  parallelism: 10
  selector:
    names: [node-1, node-2]
  completionPolicy:
    type: Always
    activeDeadlineSeconds: 1200
    ttlSecondsAfterFinished: 300
  pullPolicy:
    backoffLimit: 3
    timeoutSeconds: 300
  pullSecrets: [secret-name1, secret-name2]
  imagePullPolicy: IfNotPresent
  sandboxConfig:
    annotations: {io.kubernetes.image.metrics.tags: cluster=cn}
    labels: {io.kubernetes.image.app: foo}
`

func preheat(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("../../../deploy/examples/nginx-preheat.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func checkWrong(t *testing.T, wrong []string, want string) {
	t.Helper()
	got := strings.Join(wrong, "\n")
	if want == "" && got != "" || !strings.Contains(got, want) {
		t.Errorf("errors:\n%s\nwant: %q", got, want)
	}
}

func TestPullJobCreate(t *testing.T) {
	c := pullCRD(t, "imagepulljobs")
	spec := func(more string) string {
		return pullHead + "spec: {image: nginx, completionPolicy: {}" + more + "}"
	}
	tests := []struct{ name, manifest, wrong string }{
		{"from the field", preheat(t), ""},
		{"from OpenKruise's manual", pullFromTheManual, ""},
		{"least", spec(""), ""},
		{"labels and expressions",
			spec(", selector: {matchLabels: {a: b}, matchExpressions: [{key: c, operator: Exists}]}"), ""},
		{"by pods, with an empty selector", spec(", selector: {}, podSelector: {matchLabels: {a: b}}"), ""},
		{"by nodes, with an empty podSelector", spec(", selector: {names: [a]}, podSelector: {}"), ""},
		{"paused", spec(", parallelism: 0"), ""},
		{"a number as text", spec(`, parallelism: "5"`), ""},
		{"percentage", spec(", parallelism: 15%"), ""},
		{"all at once", spec(", parallelism: 100%"), ""},
		{"for ever", pullHead + "spec: {image: nginx, completionPolicy: {type: Never}}", ""},
		{"deadline as long as an attempt",
			pullHead + "spec: {image: nginx, pullPolicy: {timeoutSeconds: 50}, completionPolicy: " +
				"{activeDeadlineSeconds: 50}}", ""},

		{"no image", pullHead + "spec: {completionPolicy: {}}", "spec.image: Required value"},
		{"no completionPolicy", pullHead + "spec: {image: nginx}", "spec.completionPolicy: Required value"},
		{"image in upper case", pullHead + "spec: {image: Nginx, completionPolicy: {}}",
			"image must be a reference as in a pod"},
		{"names and labels", spec(", selector: {names: [a], matchLabels: {a: b}}"), "names excludes matchLabels"},
		{"a name twice", spec(", selector: {names: [a, a]}"), "Duplicate value"},
		{"nodes and pods", spec(", selector: {names: [a]}, podSelector: {matchLabels: {a: b}}"),
			"selector and podSelector exclude each other"},
		{"negative parallelism", spec(", parallelism: -1"), "parallelism must be"},
		{"too high a percentage", spec(", parallelism: 101%"), "parallelism must be"},
		{"parallelism in words", spec(", parallelism: some"), "parallelism must be"},
		{"unknown completionPolicy", pullHead + "spec: {image: nginx, completionPolicy: {type: Sometimes}}",
			`supported values: "Always", "Never"`},
		{"deadline of a job without end",
			pullHead + "spec: {image: nginx, completionPolicy: {type: Never, activeDeadlineSeconds: 700}}",
			"can only work with type Always"},
		{"time to live of a job without end",
			pullHead + "spec: {image: nginx, completionPolicy: {type: Never, ttlSecondsAfterFinished: 700}}",
			"can only work with type Always"},
		{"deadline shorter than an attempt",
			pullHead + "spec: {image: nginx, completionPolicy: {activeDeadlineSeconds: 599}}",
			"must not be less than pullPolicy.timeoutSeconds"},
		{"unknown field", spec(", retries: 3"), "unknown field spec.retries"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c.t = t
			_, wrong := c.create(tt.manifest)
			checkWrong(t, wrong, tt.wrong)
		})
	}
}

func TestPullJobDefaults(t *testing.T) {
	c := pullCRD(t, "imagepulljobs")
	object, wrong := c.create(pullHead + "spec: {image: nginx, completionPolicy: {}}")
	if len(wrong) > 0 {
		t.Fatal(wrong)
	}
	var job v1beta1.ImagePullJob
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(object, &job); err != nil {
		t.Fatal(err)
	}
	s := job.Spec
	if s.Parallelism.String() != "1" || *s.PullPolicy.TimeoutSeconds != 600 || *s.PullPolicy.BackoffLimit != 3 ||
		s.CompletionPolicy.Type != v1beta1.Always || s.ImagePullPolicy != v1beta1.PullIfNotPresent {
		t.Errorf("defaults are %+v", s)
	}
}

func TestPullJobUpdate(t *testing.T) {
	c := pullCRD(t, "imagepulljobs")
	tests := []struct {
		name   string
		change func(spec map[string]any)
		wrong  string
	}{
		{"nothing", func(map[string]any) {}, ""},
		{"what can be changed", func(s map[string]any) {
			s["image"], s["parallelism"], s["imagePullPolicy"] = "nginx:2", "50%", "Always"
			s["selector"] = map[string]any{"matchLabels": map[string]any{"a": "b"}}
			s["pullPolicy"] = map[string]any{"timeoutSeconds": int64(10), "backoffLimit": int64(1)}
		}, ""},
		{"secret added", func(s map[string]any) { s["pullSecrets"] = append(s["pullSecrets"].([]any), "c") },
			"pullSecrets is immutable"},
		{"secrets taken away", func(s map[string]any) { delete(s, "pullSecrets") }, "pullSecrets is immutable"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c.t = t
			before, wrong := c.create(pullFromTheManual)
			if len(wrong) > 0 {
				t.Fatal(wrong)
			}
			after := runtime.DeepCopyJSON(before)
			tt.change(after["spec"].(map[string]any))
			checkWrong(t, c.update(after, before), tt.wrong)
		})
	}
	t.Run("no secrets and an empty list are the same", func(t *testing.T) {
		c.t = t
		before, _ := c.create(pullHead + "spec: {image: nginx, completionPolicy: {}}")
		after := runtime.DeepCopyJSON(before)
		after["spec"].(map[string]any)["pullSecrets"] = []any{}
		checkWrong(t, c.update(after, before), "")
	})
}

// The rule of the CRD takes what a container runtime takes.
func TestImageReferences(t *testing.T) {
	c := pullCRD(t, "imagepulljobs")
	list := pullCRD(t, "imagelistpulljobs")
	digest := "sha256:" + strings.Repeat("0a", 32)
	for _, image := range []string{
		"nginx", "nginx:latest", "library/nginx", "docker.io/library/nginx:1.29-alpine", "registry:5000/a/b",
		"registry:5000/a/b:v1",
		"localhost/a", "localhost:5000/a", "a.b.c/d/e_f/g__h/i-j:T.a_g-1", "nginx@" + digest, "nginx:1@" + digest,
		"10.0.0.1:80/x", "[::1]:5000/x",
		"[fd00::1]/x", "UPPER.example.com/x", "a/b/c/d/e",
		"", " nginx", "Nginx", "nginx:", "nginx:-a", "nginx@sha256:12", "a//b", "/a", "a/", "a/-b",
		"a/b:" + strings.Repeat("t", 129), "http://a/b", "a:b:c", "a b", "-a/b", "nginx@" + digest + "x ",
	} {
		_, err := reference.ParseNormalizedNamed(image)
		_, wrong := c.create(pullHead + "spec: {image: '" + image + "', completionPolicy: {}}")
		if (err == nil) != (len(wrong) == 0) {
			t.Errorf("image %q: the CRD says %q, the runtime %v", image, wrong, err)
		}
		_, wrong = list.create(listHead + "spec: {images: ['" + image + "'], completionPolicy: {}}")
		if (err == nil) != (len(wrong) == 0) {
			t.Errorf("image %q: the CRD of the list says %q, the runtime %v", image, wrong, err)
		}
	}
}

func TestListPullJobCreate(t *testing.T) {
	c := pullCRD(t, "imagelistpulljobs")
	tests := []struct{ name, manifest, wrong string }{
		{"least", listHead + "spec: {images: [nginx], completionPolicy: {}}", ""},
		{"more", listHead + "spec: {images: ['nginx:1', 'nginx:2'], parallelism: 10%, selector: {}, podSelector: {}, " +
			"completionPolicy: {ttlSecondsAfterFinished: 10}}", ""},
		{"no images", listHead + "spec: {images: [], completionPolicy: {}}", "should have at least 1"},
		{"an image twice", listHead + "spec: {images: [a, b, a], completionPolicy: {}}", "Duplicate value"},
		{"too many", listHead + "spec: {images: [" + manyImages(256) + "], completionPolicy: {}}", "Too many"},
		{"as many as there may be", listHead + "spec: {images: [" + manyImages(255) + "], completionPolicy: {}}", ""},
		{"deadline shorter than an attempt",
			listHead + "spec: {images: [a], completionPolicy: {activeDeadlineSeconds: 60}}",
			"must not be less than pullPolicy.timeoutSeconds"},
		{"negative parallelism", listHead + "spec: {images: [a], parallelism: -1, completionPolicy: {}}",
			"parallelism must be"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c.t = t
			_, wrong := c.create(tt.manifest)
			checkWrong(t, wrong, tt.wrong)
		})
	}
}

func manyImages(n int) string {
	var names []string
	for i := range n {
		names = append(names, "registry.example.com/team/a"+strings.Repeat("b", i))
	}
	return strings.Join(names, ", ")
}

// Both versions are served with one schema and no conversion, and kubectl shows OpenKruise's
// columns of the version, then ours.
func TestPullJobVersions(t *testing.T) {
	const message = "MESSAGE .status.message" // OpenKruise's in v1alpha1 only
	ours := []string{"PROGRESS .status.progress", "IMAGE .spec.image"}
	for plural, columns := range map[string][]string{
		"imagepulljobs": {
			"TOTAL .status.desired", "ACTIVE .status.active", "SUCCEED .status.succeeded", "FAILED .status.failed",
			"AGE .metadata.creationTimestamp",
		},
		"imagelistpulljobs": {
			"TOTAL .status.desired", "SUCCEEDED .status.succeeded", "COMPLETED .status.completed",
			"AGE .metadata.creationTimestamp",
		},
	} {
		t.Run(plural, func(t *testing.T) {
			crd := readCRD(t, plural)
			if c := crd.Spec.Conversion; c != nil && c.Strategy != apiextensionsv1.NoneConverter {
				t.Errorf("conversion %v", c)
			}
			var versions []string
			for _, v := range crd.Spec.Versions {
				versions = append(versions, v.Name)
				if !v.Served || v.Storage != (v.Name == "v1beta1") || v.Subresources.Status == nil {
					t.Errorf("version %s: served %v, storage %v", v.Name, v.Served, v.Storage)
				}
				if !reflect.DeepEqual(v.Schema, crd.Spec.Versions[0].Schema) {
					t.Errorf("version %s has another schema", v.Name)
				}
				var got []string
				for _, column := range v.AdditionalPrinterColumns {
					got = append(got, column.Name+" "+column.JSONPath)
				}
				want := columns
				switch {
				case plural != "imagepulljobs":
				case v.Name == "v1alpha1":
					want = slices.Concat(columns, []string{message}, ours)
				default:
					want = slices.Concat(columns, ours, []string{message})
				}
				if !slices.Equal(got, want) {
					t.Errorf("columns\n%q\nwant\n%q", got, want)
				}
			}
			if !slices.Equal(versions, []string{"v1alpha1", "v1beta1"}) {
				t.Errorf("versions %v", versions)
			}
		})
	}
}

// The Go types of v1alpha1 read what is written as v1beta1.
func TestPullJobTypes(t *testing.T) {
	var a appsv1alpha1.ImagePullJob
	if err := yaml.UnmarshalStrict([]byte(preheat(t)), &a); err != nil {
		t.Fatal(err)
	}
	b := v1beta1.ImagePullJob{Spec: a.Spec, Status: a.Status}
	if b.Spec.Image != "nginx:latest" || b.Spec.Parallelism.IntValue() != 10 || b.Spec.Selector == nil ||
		b.Spec.PodSelector == nil {
		t.Errorf("%+v", b.Spec)
	}
}
