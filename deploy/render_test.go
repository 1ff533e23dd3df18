// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

const chart = "helm/cri-proxy"

// tool runs helm or kustomize, as tools/deploy pins them, and returns what it prints.
func tool(t *testing.T, args ...string) (string, error) {
	t.Helper()
	home := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"tool"}, args...)...)
	cmd.Dir = filepath.Join("..", "tools", "deploy")
	// Nothing of the user's own settings and plugins.
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=readonly", "CGO_ENABLED=0", "HELM_CACHE_HOME="+home,
		"HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s%s", strings.Join(args, " "), err, &out, &stderr)
	}
	return out.String(), nil
}

func absolute(t *testing.T, path string) string {
	t.Helper()
	path, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func template(t *testing.T, args ...string) (string, error) {
	t.Helper()
	return tool(t,
		append([]string{"helm", "template", "cri-proxy", absolute(t, chart), "--namespace", "cri-proxy-system"},
			args...)...)
}

type object = map[string]any

// objects reads YAML documents, by kind, namespace and name.
func objects(t *testing.T, documents string) map[string]object {
	t.Helper()
	all := map[string]object{}
	for _, document := range regexp.MustCompile(`(?m)^---.*$`).Split(documents, -1) {
		var o object
		if err := yaml.Unmarshal([]byte(document), &o); err != nil {
			t.Fatalf("%v in\n%s", err, document)
		}
		if o == nil {
			continue
		}
		meta, _ := o["metadata"].(object)
		key := fmt.Sprintf("%s %v/%v", o["kind"], meta["namespace"], meta["name"])
		if all[key] != nil {
			t.Errorf("%s is there twice", key)
		}
		all[key] = o
	}
	return all
}

// unhelm takes away what helm adds to an object for itself.
func unhelm(o object) object {
	meta, _ := o["metadata"].(object)
	for field, keys := range map[string][]string{
		"labels":      {"app.kubernetes.io/instance", "app.kubernetes.io/managed-by", "helm.sh/chart"},
		"annotations": {"helm.sh/resource-policy"},
	} {
		if m, ok := meta[field].(object); ok {
			for _, key := range keys {
				delete(m, key)
			}
		}
	}
	return o
}

func pretty(t *testing.T, v any) string {
	t.Helper()
	out, err := yaml.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// TestSameObjects: with its defaults the chart is the kustomize base. Helm makes the Namespace
// itself.
func TestSameObjects(t *testing.T) {
	for _, tt := range []struct {
		name      string
		component string
		values    []string
	}{
		{name: "defaults"},
		{name: "without asking for rights", component: "components/without-rights",
			values: []string{"--set", "rights.enabled=false"}},
		{name: "identity from files", component: "components/identity-files",
			values: []string{"--set", "identity.mode=files"}},
		{name: "with the ServiceMonitor", component: "components/servicemonitor",
			values: []string{"--set", "serviceMonitor.enabled=true"}},
		{name: "without webhooks", component: "components/without-webhooks",
			values: []string{"--set", "webhook.enabled=false"}},
		{name: "without roles for users", component: "components/without-user-roles",
			values: []string{"--set", "rbac.aggregate=false"}},
		{name: "webhooks with cert-manager", component: "components/webhook-cert-manager",
			values: []string{"--set", "webhook.certManager.enabled=true"}},
		{name: "with the PrometheusRule", component: "components/prometheusrule",
			values: []string{"--set", "prometheusRule.enabled=true"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			base := absolute(t, ".")
			if tt.component != "" {
				base = t.TempDir()
				writeOverlay(t, base, tt.component)
			}
			built, err := tool(t, "kustomize", "build", "--load-restrictor=LoadRestrictionsNone", base)
			if err != nil {
				t.Fatal(err)
			}
			rendered, err := template(t, tt.values...)
			if err != nil {
				t.Fatal(err)
			}
			want, got := objects(t, built), objects(t, rendered)
			if want["Namespace <nil>/cri-proxy-system"] == nil {
				t.Errorf("the base has no namespace: %v", slices.Sorted(maps.Keys(want)))
			}
			delete(want, "Namespace <nil>/cri-proxy-system")
			delete(got, "Job cri-proxy-system/cri-controller-uninstall") // TestUninstall
			if a, b := slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(got)); !slices.Equal(a, b) {
				t.Fatalf("kustomize makes\n%s\nhelm makes\n%s", strings.Join(a, "\n"), strings.Join(b, "\n"))
			}
			for key, o := range want {
				if h := unhelm(got[key]); !reflect.DeepEqual(o, h) {
					t.Errorf("%s differs, kustomize:\n%s\nhelm:\n%s", key, pretty(t, o), pretty(t, h))
				}
			}
		})
	}
}

// writeOverlay writes a kustomization of the base with a component.
func writeOverlay(t *testing.T, dir, component string) {
	t.Helper()
	relative := func(path string) string {
		r, err := filepath.Rel(dir, absolute(t, path))
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	text := pretty(t, object{
		"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
		"resources": []string{relative(".")}, "components": []string{relative(component)},
	})
	if err := os.WriteFile(filepath.Join(dir, "kustomization.yaml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestLint(t *testing.T) {
	if _, err := tool(t, "helm", "lint", "--strict", absolute(t, chart)); err != nil {
		t.Error(err)
	}
}

// TestCopies: the chart's copies are those that `make generate` makes.
func TestCopies(t *testing.T) {
	pairs := map[string]string{"rbac/role.yaml": chart + "/files/role.yaml", "rights/policies.yaml": chart +
		"/files/rights.yaml", "alerts/cri-proxy.rules.yaml": chart + "/files/alerts.yaml"}
	crds, err := filepath.Glob("crds/*.yaml")
	if err != nil || len(crds) == 0 {
		t.Fatalf("no CRDs: %v", err)
	}
	for _, f := range crds {
		pairs[f] = chart + "/files/" + f
	}
	copies, err := filepath.Glob(chart + "/files/crds/*")
	if err != nil || len(copies) != len(crds) {
		t.Errorf("the chart has %v, the base %v (%v): run make generate", copies, crds, err)
	}
	for original, duplicate := range pairs {
		a, err := os.ReadFile(original)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(duplicate)
		if err != nil || !bytes.Equal(a, b) {
			t.Errorf("%s is not %s (%v): run make generate", duplicate, original, err)
		}
	}
}

// TestValues gives the chart other values and looks for what must come of them.
func TestValues(t *testing.T) {
	digest := "sha256:" + strings.Repeat("0", 64)
	for _, tt := range []struct {
		name string
		set  []string
		want []string // in the output
		not  []string
		fail string // in the error
	}{
		{name: "image", set: []string{"image.repository=r.example/c", "image.tag=v1"},
			want: []string{`image: "r.example/c:v1"`}},
		{name: "image by digest", set: []string{"image.repository=r.example/c", "image.digest=" + digest},
			want: []string{`image: "r.example/c@` + digest + `"`}},
		{name: "pull secret", set: []string{"imagePullSecrets[0].name=reg"},
			want: []string{"imagePullSecrets:\n- name: reg"}},
		{name: "node port", set: []string{"nodePort=7443"}, want: []string{"--node-port=7443", "port: 7443"},
			not: []string{"10260"}},
		{name: "log", set: []string{"log.level=debug", "log.format=text"},
			want: []string{"--log-level=debug", "--log-format=text"}},
		{name: "extra", set: []string{"extraArgs[0]=--workers=2", "extraEnv[0].name=A", "extraEnv[0].value=b"},
			want: []string{`- "--workers=2"`, "- name: A\n          value: b"}},
		{name: "no network policy", set: []string{"networkPolicy.enabled=false"}, not: []string{"kind: NetworkPolicy"}},
		{name: "who scrapes", set: []string{"networkPolicy.metricsFrom[0].podSelector.matchLabels.app=prometheus"},
			want: []string{"from:\n    - podSelector:\n        matchLabels:\n          app: prometheus"}},
		{name: "other ports out", set: []string{"networkPolicy.extraEgress[0].ports[0].port=7000"},
			want: []string{"- ports:\n    - port: 7000"}},
		{name: "no budget", set: []string{"podDisruptionBudget.enabled=false"},
			not: []string{"kind: PodDisruptionBudget"}},
		{name: "no webhooks but rights", set: []string{"webhook.enabled=false"},
			want: []string{"kind: ValidatingAdmissionPolicy\n", "kind: ValidatingAdmissionPolicyBinding"}},
		{name: "no rights", set: []string{"rights.enabled=false"},
			want: []string{"kind: ValidatingWebhookConfiguration"}, not: []string{"ValidatingAdmissionPolicy"}},
		{name: "budget in percent", set: []string{"podDisruptionBudget.maxUnavailable=50%"},
			want: []string{"maxUnavailable: 50%"}},
		{name: "scheduling", set: []string{"tolerations[0].operator=Exists", "affinity.nodeAffinity.x=y",
			"nodeSelector.pool=system", "priorityClassName=mine", "replicas=3"},
			want: []string{"tolerations:\n        - operator: Exists", "affinity:\n        nodeAffinity:",
				"pool: system", "priorityClassName: mine", "replicas: 3"}},
		{name: "lives", set: []string{"identity.certificateLife=24h", "identity.caLife=2400h"},
			want: []string{"--identity=csr", "--certificate-life=24h", "--ca-life=2400h"},
			not:  []string{"secretName", "--tls-"}},
		{name: "secret", set: []string{"identity.mode=files", "tls.secretName=other"},
			want: []string{"secretName: other"}, not: []string{"cri-controller-tls", "kind: Certificate"}},
		{name: "cert-manager", set: []string{"identity.mode=files", "tls.certManager.enabled=true",
			"tls.certManager.issuerRef.name=nodes", "tls.certManager.issuerRef.kind=ClusterIssuer"},
			want: []string{"kind: Certificate\n", "name: nodes", "secretName: cri-controller-tls", "client auth"}},
		{name: "pins", set: []string{"images.pinMax=12h", "images.pinPercent=10"},
			want: []string{"--image-pin-max=12h", "--image-pin-percent=10"}},
		{name: "no such share", set: []string{"images.pinPercent=101"}, fail: "/images/pinPercent"},
		{name: "no webhooks", set: []string{"webhook.enabled=false", "webhook.certManager.enabled=true"},
			not: []string{"WebhookConfiguration", "cri-controller-webhook", "webhook-port", "webhook-tls", "9443"}},
		{name: "webhooks by an issuer",
			set: []string{"webhook.certManager.enabled=true", "webhook.certManager.issuerRef.name=corp",
				"webhook.certManager.issuerRef.kind=ClusterIssuer"},
			want: []string{"issuerRef:\n    kind: ClusterIssuer\n    name: corp",
				"inject-ca-from: cri-proxy-system/cri-controller-webhook", "--webhook-cert-dir="},
			not: []string{"selfSigned", "type: Opaque", "name: cri-controller-webhook-ca"}},
		{name: "service monitor", set: []string{"serviceMonitor.enabled=true", "serviceMonitor.interval=15s",
			"serviceMonitor.labels.release=prom"},
			want: []string{"kind: ServiceMonitor", "interval: 15s", "release: prom"}},
		{name: "alerts", set: []string{"prometheusRule.enabled=true", "prometheusRule.labels.release=prom"},
			want: []string{"kind: PrometheusRule", "alert: CRIProxyBypassed", "release: prom"}},
		{name: "no CRDs", set: []string{"crds.enabled=false"}, not: []string{"kind: CustomResourceDefinition"}},
		{name: "CRDs go too", set: []string{"crds.keep=false"}, want: []string{"kind: CustomResourceDefinition"},
			not: []string{"resource-policy"}},

		{name: "cert-manager for nothing", set: []string{"tls.certManager.enabled=true"},
			fail: "needs identity.mode=files"},
		{name: "no such identity", set: []string{"identity.mode=none"}, fail: "/identity/mode"},
		{name: "issuer missing", set: []string{"identity.mode=files", "tls.certManager.enabled=true"},
			fail: "issuerRef.name must name the issuer"},
		{name: "misspelt value", set: []string{"replica=3"}, fail: "replica"},
		{name: "unknown value below", set: []string{"log.leveling=debug"}, fail: "leveling"},
		{name: "no such level", set: []string{"log.level=loud"}, fail: "/log/level"},
		{name: "no port", set: []string{"nodePort=70000"}, fail: "/nodePort"},
		{name: "no digest", set: []string{"image.digest=abc"}, fail: "/image/digest"},
		{name: "budget of nothing", set: []string{"podDisruptionBudget.maxUnavailable=0"},
			fail: "/podDisruptionBudget/maxUnavailable"},
		{name: "argument without dashes", set: []string{"extraArgs[0]=workers=2"}, fail: "/extraArgs/0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var args []string
			for _, s := range tt.set {
				args = append(args, "--set", s)
			}
			out, err := template(t, args...)
			if tt.fail != "" {
				if err == nil || !strings.Contains(err.Error(), tt.fail) {
					t.Fatalf("error %v, want %q", err, tt.fail)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			objects(t, out)
			for _, want := range tt.want {
				if !strings.Contains(out, want) {
					t.Errorf("%q is missing", want)
				}
			}
			for _, not := range tt.not {
				if strings.Contains(out, not) {
					t.Errorf("%q is there", not)
				}
			}
		})
	}
}

// leaves are the paths of all values.
func leaves(prefix string, v object) []string {
	var all []string
	for key, value := range v {
		if m, ok := value.(object); ok && len(m) > 0 && key != "resources" && key != "nodeSelector" {
			all = append(all, leaves(prefix+key+".", m)...)
		} else {
			all = append(all, prefix+key)
		}
	}
	return all
}

// TestValuesAreDocumented: each has a row in the chart's README and a place in the schema, and
// there are no others.
func TestValuesAreDocumented(t *testing.T) {
	var values object
	var schema struct{ Properties object }
	read(t, chart+"/values.yaml", &values)
	text, err := os.ReadFile(chart + "/values.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &schema); err != nil {
		t.Fatal(err)
	}
	want := leaves("", values)
	slices.Sort(want)
	readme, err := os.ReadFile(chart + "/README.md")
	if err != nil {
		t.Fatal(err)
	}
	var rows []string
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(string(readme), -1) {
		rows = append(rows, m[1])
	}
	slices.Sort(rows)
	if !slices.Equal(want, rows) {
		t.Errorf("values.yaml has\n%s\nREADME.md has\n%s", strings.Join(want, "\n"), strings.Join(rows, "\n"))
	}
	for _, path := range want {
		properties := schema.Properties
		for _, key := range strings.Split(path, ".") {
			p, ok := properties[key].(object)
			if !ok {
				t.Errorf("values.schema.json has no %s", path)
				break
			}
			properties, _ = p["properties"].(object)
		}
	}
}

func read(t *testing.T, file string, into any) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(text, into); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
}

// TestWithOpenKruise: the component leaves OpenKruise's definitions out, and nothing else.
func TestWithOpenKruise(t *testing.T) {
	all, err := tool(t, "kustomize", "build", absolute(t, "."))
	if err != nil {
		t.Fatal(err)
	}
	overlay := t.TempDir()
	writeOverlay(t, overlay, "components/with-openkruise")
	without, err := tool(t, "kustomize", "build", "--load-restrictor=LoadRestrictionsNone", overlay)
	if err != nil {
		t.Fatal(err)
	}
	want, got := objects(t, all), objects(t, without)
	for key := range want {
		theirs := strings.HasSuffix(key, ".apps.kruise.io") || strings.Contains(key, "recreaterequest.rights.") ||
			strings.Contains(key, "pulljob.rights.")
		if theirs == (got[key] != nil) {
			t.Errorf("%s: there %v", key, got[key] != nil)
		}
	}
	if len(want) != len(got)+7 {
		t.Errorf("%d objects, and %d without three definitions, two policies and their bindings", len(want), len(got))
	}
}

// TestUninstall: the Job that the chart runs before the release goes is the one for users of
// kubectl.
func TestUninstall(t *testing.T) {
	const key = "Job cri-proxy-system/cri-controller-uninstall"
	built, err := tool(t, "kustomize", "build", absolute(t, "uninstall"))
	if err != nil {
		t.Fatal(err)
	}
	rendered, err := template(t, "--set", "image.tag=latest")
	if err != nil {
		t.Fatal(err)
	}
	want, got := objects(t, built)[key], objects(t, rendered)[key]
	meta, _ := got["metadata"].(object)
	hooks, _ := meta["annotations"].(object)
	if hooks["helm.sh/hook"] != "pre-delete" {
		t.Errorf("annotations %v", hooks)
	}
	delete(meta, "annotations")
	if got = unhelm(got); want == nil || !reflect.DeepEqual(want, got) {
		t.Errorf("kubectl:\n%s\nhelm:\n%s", pretty(t, want), pretty(t, got))
	}
	if without, err := template(t, "--set", "uninstall.enabled=false"); err != nil || objects(t, without)[key] != nil {
		t.Errorf("the Job is there, or %v", err)
	}
}
