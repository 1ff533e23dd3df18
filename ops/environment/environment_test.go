// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package environment

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// The cases are those of Kubernetes (third_party/forked/golang/expansion/expand_test.go).
func TestExpand(t *testing.T) {
	values := map[string]string{"VAR_A": "A", "VAR_B": "B", "VAR_REF": "$(VAR_A)", "VAR_EMPTY": ""}
	for in, want := range map[string]string{
		"$(VAR_A)":              "A",
		"___$(VAR_B)___":        "___B___",
		"$(VAR_A)-$(VAR_B)":     "A-B",
		"$(VAR_REF)":            "$(VAR_A)",
		"$(VAR_DNE)":            "$(VAR_DNE)",
		"foo$(VAR_EMPTY)bar":    "foobar",
		"$$(VAR_A)":             "$(VAR_A)",
		"$$$(VAR_A)":            "$A",
		"$$$$(VAR_A)":           "$$(VAR_A)",
		"$VAR_A":                "$VAR_A",
		"${VAR_A}":              "${VAR_A}",
		"$$${VAR_A}":            "$${VAR_A}",
		"$(VAR_A":               "$(VAR_A",
		"--$($($($($--":         "--$($($($($--",
		"$($($($($--foo$(":      "$($($($($--foo$(",
		"foo0--$($($($(":        "foo0--$($($($(",
		"\n":                    "\n",
		"$":                     "$",
		"$(":                    "$(",
		"$()":                   "$()",
		"a $(VAR_B) $$ $(":      "a B $ $(",
		"fóo $ü $(VAR_A)$(b)$)": "fóo $ü A$(b)$)",
	} {
		got := expandAll([]string{in}, values)
		if got[0] != want {
			t.Errorf("%q: %q, want %q", in, got[0], want)
		}
	}
}

// The cases are those of Kubernetes (pkg/kubelet/util/env/env_util_test.go, KEP-3721).
func TestParse(t *testing.T) {
	for _, tc := range []struct{ file, want, wrong string }{
		{file: "KEY='value'", want: "value"},
		{file: "  # comment\n\n\tOTHER='x'\nKEY='a\nb' # after\n", want: "a\nb"},
		{file: "KEY=' $x \\n '", want: " $x \\n "},
		{file: "KEY= 'value'"},
		{file: "OTHER='x'"},
		{file: "KEY='first'\nKEY='second'", want: "first"},
		{file: "KEY = 'value'", wrong: "whitespace before '='"},
		{file: "KEY=value", wrong: "single quotes"},
		{file: "KEY='value'x", wrong: "after closing quote"},
		{file: "KEY='value", wrong: "unclosed"},
		{file: "no variable", wrong: "missing '='"},
		{file: "KEY='value'\nno variable", want: "value"},
	} {
		got, err := parse(strings.NewReader(tc.file), "KEY")
		if got != tc.want || (err != nil) != (tc.wrong != "") ||
			err != nil && !strings.Contains(err.Error(), tc.wrong) {
			t.Errorf("%q: %q, %v", tc.file, got, err)
		}
	}
}

func TestApply(t *testing.T) {
	c := &runtimeapi.ContainerConfig{Envs: []*runtimeapi.KeyValue{
		{Key: "DEVICE", Value: []byte("0")}, {Key: "A", Value: []byte("old")}, {Key: "GONE", Value: []byte("old")},
	}}
	literal := func(name, value string) *opsv1.Variable {
		return &opsv1.Variable{Name: name, Source: &opsv1.Variable_Value{Value: []byte(value)}}
	}
	template := func(name, value string) *opsv1.Variable {
		return &opsv1.Variable{Name: name, Source: &opsv1.Variable_Template{Template: value}}
	}
	env := &opsv1.Environment{
		Variables: []*opsv1.Variable{
			literal("A", "$(B)"), template("B", "$(A) $(S) $(LATER)"), template("LATER", "x"), literal("A", "\xff"),
			template("C", "$(A)"),
		},
		Services: []*opsv1.Variable{literal("S", "10.0.0.1"), literal("LATER", "hidden")},
		Command:  []string{"$(B)", "$(DEVICE)", "$(NO)"}, Args: []string{"$(S)"}, DeviceVariables: true,
	}
	if _, err := Apply(c, env, ""); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, kv := range c.GetEnvs() {
		got = append(got, kv.GetKey()+"="+string(kv.GetValue()))
	}
	// LATER is not declared yet where B refers to it, but a service has that name.
	want := []string{"DEVICE=0", "A=\xff", "B=$(B) 10.0.0.1 hidden", "LATER=x", "C=\xff", "S=10.0.0.1"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("variables: %q, want %q", got, want)
	}
	if words := append(c.GetCommand(), c.GetArgs()...); !reflect.DeepEqual(words,
		[]string{"$(B) 10.0.0.1 hidden", "0", "$(NO)", "10.0.0.1"}) {
		t.Errorf("command line: %q", words)
	}
}

// What kubelet publishes moves, and what a container may write must not lead out of its volume.
func TestRefresh(t *testing.T) {
	pod := filepath.Join(t.TempDir(), "pods", "uid")
	write := func(path, text string) string {
		path = filepath.Join(pod, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	const config, empty = "volumes/kubernetes.io~configmap/cm", "volumes/kubernetes.io~empty-dir/e"
	now := write(config+"/..2026_11_30_10_00_00.2/key", "new")
	if err := os.Symlink("..2026_11_30_10_00_00.2", filepath.Join(pod, config, "..data")); err != nil {
		t.Fatal(err)
	}
	for link, to := range map[string]string{config + "/key": "..data/key", config + "/out": "/etc/passwd",
		empty + "/link": "/etc", empty + "/absolute": filepath.Join(pod, empty, "part")} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(pod, link)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, filepath.Join(pod, link)); err != nil {
			t.Fatal(err)
		}
	}
	bound := write("volume-subpaths/cm/app/0", "old")
	part := write(empty+"/part", "p")
	for _, tc := range []struct {
		name, host string
		part       SubPath
		want       string // empty: refused
		others     bool   // somebody else may change it
	}{
		{name: "moved", host: bound, part: SubPath{Volume: "cm", Path: "key"}, want: now},
		{name: "as it is", host: now, part: SubPath{Volume: "cm", Path: "key"}, want: now},
		{name: "a key that is gone", host: bound, part: SubPath{Volume: "cm", Path: "no"},
			want: filepath.Join(pod, config, "no")},
		{name: "a link out of it", host: bound, part: SubPath{Volume: "cm", Path: "out"}},
		{name: "a path out of it", host: bound, part: SubPath{Volume: "cm", Path: "../e/part"}},
		{name: "what a container may write", host: part, part: SubPath{Volume: "e", Path: "part"}, want: part,
			others: true},
		{name: "what was replaced", host: bound, part: SubPath{Volume: "e", Path: "part"}, want: part, others: true},
		{name: "what is not there yet", host: bound, part: SubPath{Volume: "e", Path: "to/come"},
			want: filepath.Join(pod, empty, "to/come"), others: true},
		{name: "of the host's", host: bound, part: SubPath{Volume: "h", Path: "part", Dir: filepath.Join(pod, empty)},
			want: part, others: true},
		{name: "a link of a container's", host: "/etc", part: SubPath{Volume: "e", Path: "link"}},
		{name: "an absolute link that stays in it", host: bound, part: SubPath{Volume: "e", Path: "absolute"},
			want: part, others: true},
		{name: "what was removed", host: filepath.Join(pod, "gone"), part: SubPath{Volume: "other", Path: "x"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := &runtimeapi.ContainerConfig{Mounts: []*runtimeapi.Mount{{ContainerPath: "/m", HostPath: tc.host}}}
			parts, err := Refresh(c, pod, map[string]SubPath{"/m": tc.part})
			if (len(parts) > 0) != tc.others {
				t.Errorf("parts that others can change: %v", parts)
			}
			if got := c.GetMounts()[0].GetHostPath(); tc.want != "" && (err != nil || got != tc.want) ||
				tc.want == "" && err == nil {
				t.Errorf("mounted from %s, error %v", got, err)
			}
		})
	}
}

// What a process has mounted is compared with what the volume has: here the process is this one.
func TestCheck(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"part", "other"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	parts := Parts{filepath.Join(dir, "part"): dir}
	mounted := func(from string) []*runtimeapi.Mount {
		return []*runtimeapi.Mount{{ContainerPath: filepath.Join(dir, "part"), HostPath: from}}
	}
	if err := parts.Check(mounted(filepath.Join(dir, "part")), os.Getpid()); err != nil {
		t.Errorf("what is as it was: %v", err)
	}
	if err := parts.Check(mounted(filepath.Join(dir, "other")), os.Getpid()); err == nil {
		t.Error("another directory passes")
	}
	if err := os.Remove(filepath.Join(dir, "other")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(dir, "part"), filepath.Join(dir, "other")); err != nil {
		t.Fatal(err)
	}
	if err := parts.Check(mounted(filepath.Join(dir, "other")), os.Getpid()); err == nil {
		t.Error("a link in its place passes")
	}
}

// Later restarts bring no paths: what an earlier one has mounted from a volume is still a part that
// others can change.
func TestRefreshKnowsParts(t *testing.T) {
	root := t.TempDir()
	pod := filepath.Join(root, "pods", "uid")
	within := func(path string) string { return filepath.Join(pod, path) }
	for _, tc := range []struct {
		name, host, noted string
		want              string // the volume's directory; empty: it is no part
	}{
		{name: "of an emptyDir", host: within("volumes/kubernetes.io~empty-dir/e/part"),
			want: within("volumes/kubernetes.io~empty-dir/e")},
		{name: "all of an emptyDir", host: within("volumes/kubernetes.io~empty-dir/e")},
		{name: "of a CSI volume", host: within("volumes/kubernetes.io~csi/pv/mount/a/b"),
			want: within("volumes/kubernetes.io~csi/pv/mount")},
		{name: "all of a CSI volume", host: within("volumes/kubernetes.io~csi/pv/mount")},
		{name: "bound by kubelet", host: within("volume-subpaths/e/app/0")},
		{name: "where symlinks lead", host: "/data/pods/uid/volumes/kubernetes.io~nfs/n/part",
			want: "/data/pods/uid/volumes/kubernetes.io~nfs/n"},
		{name: "of the host's, noted", host: "/srv/data/part", noted: "/srv/data", want: "/srv/data"},
		{name: "of the host's", host: "/srv/data/part"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := &runtimeapi.ContainerConfig{Mounts: []*runtimeapi.Mount{{ContainerPath: "/m", HostPath: tc.host}}}
			if tc.noted != "" {
				if err := (Parts{"/m": tc.noted, "/gone": "/x"}).Note(c); err != nil {
					t.Fatal(err)
				}
			}
			parts, err := Refresh(c, pod, nil)
			if err != nil || parts["/m"] != tc.want || len(parts) > 1 || c.GetMounts()[0].GetHostPath() != tc.host {
				t.Errorf("%v, %v, mounted from %s", parts, err, c.GetMounts()[0].GetHostPath())
			}
			if err := parts.Note(c); err != nil {
				t.Fatal(err)
			}
			if again := PartsOf(c.GetAnnotations()); again["/m"] != tc.want || len(again) > 1 {
				t.Errorf("noted: %v", again)
			}
		})
	}
}

// A directory that is made has the mode of its volume, and nothing else gets it.
func TestMakeDir(t *testing.T) {
	root := t.TempDir()
	volume, other := filepath.Join(root, "volume"), filepath.Join(root, "other")
	for _, dir := range []string{volume, other} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(volume, 0o777|os.ModeSetgid|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	if err := makeDir(volume, "a/b"); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"a", "a/b"} {
		st, err := os.Stat(filepath.Join(volume, dir))
		if err != nil || st.Mode() != os.ModeDir|0o777|os.ModeSetgid|os.ModeSticky {
			t.Errorf("%s: %v, %v", dir, st.Mode(), err)
		}
	}
	// Swapped as often as it can be: what the link leads to keeps its mode.
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				if os.Remove(filepath.Join(volume, "x")) == nil {
					_ = os.Symlink(other, filepath.Join(volume, "x"))
				}
			}
		}
	}()
	for range 2000 {
		_ = makeDir(volume, "x")
	}
	close(stop)
	<-stopped
	if st, err := os.Stat(other); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("the mode of what the link leads to: %v, %v", st.Mode(), err)
	}
}

// The pod's directory is where kubelet has it, and not where a part was found to be.
func TestPodDir(t *testing.T) {
	c := &runtimeapi.ContainerConfig{Mounts: []*runtimeapi.Mount{
		{HostPath: "/data/kubelet/pods/uid/volumes/kubernetes.io~empty-dir/e/part"},
		{HostPath: "/var/lib/kubelet/pods/uid/containers/app/0a1b2c3d"},
	}}
	if got := PodDir(c, "uid"); got != "/var/lib/kubelet/pods/uid" {
		t.Error(got)
	}
	c.Mounts = c.Mounts[:1]
	if got := PodDir(c, "uid"); got != "/data/kubelet/pods/uid" {
		t.Error(got)
	}
	if got := PodDir(c, "other"); got != "" {
		t.Error(got)
	}
}
