// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/ops/apiserver"
	"github.com/cri-proxy/cri-proxy/systemd"
	"github.com/cri-proxy/cri-proxy/systemd/node/install/plan"
	"github.com/cri-proxy/cri-proxy/systemd/node/install/record"
	"github.com/cri-proxy/cri-proxy/systemd/node/kubelet"
	"github.com/cri-proxy/cri-proxy/systemd/node/update"
)

func write600(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func contentOf(t *testing.T, path string) string {
	t.Helper()
	b, err := plan.Read(path)
	if err != nil {
		t.Fatal(err)
	}
	if b == nil {
		return "(none)"
	}
	return string(b)
}

// The shipped configuration says what the defaults are.
func TestShippedConfig(t *testing.T) {
	text, err := systemd.File("config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	c := config.Default()
	if err := config.Parse("config.yaml", text, c); err != nil {
		t.Fatal(err)
	}
	got, err := merge(text, config.Default(), c)
	if err != nil || !bytes.Equal(got, text) {
		t.Errorf("%v\n%s", err, plan.Diff("config.yaml", text, got))
	}
}

func TestMerge(t *testing.T) {
	text := []byte("# mine\nruntimeEndpoint: unix:///run/a.sock # here\n\nops:\n  address: \"\"\n")
	have := config.Default()
	if err := config.Parse("x", text, have); err != nil {
		t.Fatal(err)
	}
	want := *have
	want.Ops.Address = ":10260"
	want.Ops.AllowedClients = []string{"a", "b"}
	want.Images.Parallel = 3
	want.Listen.Mode = 0o660
	got, err := merge(text, have, &want)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"# mine\nruntimeEndpoint: unix:///run/a.sock # here\n\n", "  address: \":10260\"\n",
		"  allowedClients: [\"a\",\"b\"]\n", "images:\n  parallel: 3\n", "listen:\n  mode: \"0660\"\n"} {
		if !strings.Contains(string(got), line) {
			t.Errorf("no %q in\n%s", line, got)
		}
	}
	back := config.Default()
	if err := config.Parse("x", got, back); err != nil {
		t.Fatal(err)
	}
	a, err := back.YAML()
	if err != nil {
		t.Fatal(err)
	}
	b, err := want.YAML()
	if err != nil || !bytes.Equal(a, b) {
		t.Errorf("%v\n%s\n%s", err, a, b)
	}
}

// A key keeps the name that it has in the file: the daemon refuses a file with both.
func TestMergeRenamedKey(t *testing.T) {
	for _, key := range []string{"upgradeDrainTimeout", "takeoverDrainTimeout"} {
		text := []byte("# mine\n" + key + ": 5m0s # short\n")
		have, want := config.Default(), config.Default()
		if err := config.Parse("x", text, have); err != nil {
			t.Fatal(err)
		}
		want.TakeoverDrainTimeout = 10 * time.Minute
		got, err := merge(text, have, want)
		if err != nil || string(got) != "# mine\n"+key+": 10m0s # short\n" {
			t.Errorf("%v\n%s", err, got)
		}
		if same, err := merge(text, have, have); err != nil || !bytes.Equal(same, text) {
			t.Errorf("%v\n%s", err, same)
		}
	}
}

func TestUnitChanges(t *testing.T) {
	c := config.Default()
	for _, unit := range []string{criSocket, adminSocket, opsSocket, serviceTemplate} {
		if got := unitChanges(unit, c, nil); got != nil {
			t.Errorf("%s: %s", unit, got)
		}
	}
	c.Listen.Path, c.Listen.Group, c.Ops.Address = "/run/x/cri.sock", "crictl", "10.0.0.1:7443"
	k := &kubelet.Kubelet{Args: []string{"--root-dir=/data/kubelet", "--pod-logs-dir=/data/kubelet/logs"}}
	for unit, want := range map[string]string{
		criSocket:       "[Socket]\nListenStream=\nListenStream=/run/x/cri.sock\nSocketGroup=crictl\n",
		opsSocket:       "[Socket]\nListenStream=\nListenStream=10.0.0.1:7443\nFreeBind=yes\n",
		serviceTemplate: "[Service]\nSockets=cri-proxy-ops.socket\nReadWritePaths=-/data/kubelet\n",
	} {
		if got := string(unitChanges(unit, c, k)); got != dropInHead+want {
			t.Errorf("%s:\n%s", unit, got)
		}
	}
	if got := listenStream(":7443"); got != "7443" {
		t.Error(got)
	}
}

// TestPrefix: with another one nothing that is written names the default, and what comes later
// finds it.
func TestPrefix(t *testing.T) {
	for prefix, record := range map[update.Prefix]string{"/opt": "/opt\n", update.DefaultPrefix: ""} {
		files, err := nodeFiles(config.Default(), nil, prefix)
		if err != nil {
			t.Fatal(err)
		}
		named := 0
		for _, f := range files {
			if prefix != update.DefaultPrefix && (bytes.Contains(f.content, []byte("/usr/local")) ||
				strings.HasPrefix(f.path, "/usr/local")) {
				t.Errorf("%s names the default:\n%s", f.path, f.content)
			}
			named += bytes.Count(f.content, []byte(prefix.LibDir())) + bytes.Count(f.content, []byte(prefix.BinLink()))
			if f.path == update.PrefixFile && string(f.content) != record {
				t.Errorf("%s: %q, want %q", f.path, f.content, record)
			}
		}
		if named < 4 { // the service, its guard, what that calls, and the socket
			t.Errorf("%s is named %d times", prefix, named)
		}
		if own := ownFiles(prefix); !slices.Contains(own, prefix.BinLink()) ||
			!slices.Contains(own, guardFile(prefix)) || slices.Contains(own, update.PrefixFile) {
			t.Errorf("uninstall removes %q, and not last of all what says where they are", own)
		}
	}
}

func TestChoosePrefix(t *testing.T) {
	dir := t.TempDir()
	installed := filepath.Join(dir, "installed")
	if err := os.MkdirAll(update.Prefix(installed).LibDir(), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, record, flag, want, err string }{
		{"neither", "", "", "/usr/local", ""},
		{"as installed", installed, "", installed, ""},
		{"the same", installed, installed + "/", installed, ""},
		{"another", installed, "/opt", "", "is installed below " + installed + ": take it off there"},
		{"left over", filepath.Join(dir, "gone"), "/opt", "/opt", ""},
		{"relative", "", "opt", "", "want an absolute path"},
		{"root", "", "/", "", "want an absolute path"},
		{"specifier", "", "/opt/%i", "", "want an absolute path"},
		{"space", "", "/opt/my programs", "", "want an absolute path"},
		{"bad record", "/opt;x", "", "", "want an absolute path"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "prefix")
			if tt.record != "" {
				write600(t, file, tt.record+"\n")
			}
			i := &installer{Options: Options{Prefix: update.Prefix(tt.flag)}}
			err := i.choosePrefix(file)
			if tt.err == "" && (err != nil || string(i.Prefix) != tt.want) ||
				tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("%s, %v", i.Prefix, err)
			}
		})
	}
}

// TestUninstallTakesThePrefix: what an installation was told may be left over in the arguments of
// an uninstall.
func TestUninstallTakesThePrefix(t *testing.T) {
	dir := t.TempDir()
	installed := filepath.Join(dir, "installed")
	if err := os.MkdirAll(update.Prefix(installed).LibDir(), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, record, flag, want, err string }{
		{"neither", "", "", "/usr/local", ""},
		{"as installed", installed, "", installed, ""},
		{"the same", installed, installed + "/", installed, ""},
		{"another", installed, "/opt", "", "is installed below " + installed + ", as "},
		{"nothing is there", "", filepath.Join(dir, "gone"), "/usr/local", ""},
		{"the record is lost", "", installed, installed, ""},
		{"relative", "", "opt", "", "want an absolute path"},
		{"bad record", "/opt;x", "/opt", "", "want an absolute path"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "prefix")
			if tt.record != "" {
				write600(t, file, tt.record+"\n")
			}
			u := &uninstaller{UninstallOptions: UninstallOptions{Prefix: update.Prefix(tt.flag)}}
			err := u.choosePrefix(file)
			if tt.err == "" && (err != nil || string(u.Prefix) != tt.want) ||
				tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("%s, %v", u.Prefix, err)
			}
		})
	}
}

// TestNoProgramsRunThere: what would fail later is an error at once, that says what to do.
func TestNoProgramsRunThere(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting is for root")
	}
	for option, want := range map[string]string{"ro": "read-only", "noexec": "noexec"} {
		dir := t.TempDir()
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"); err != nil {
			t.Skip(err)
		}
		flags := uintptr(unix.MS_REMOUNT | map[string]int{"ro": unix.MS_RDONLY, "noexec": unix.MS_NOEXEC}[option])
		err := unix.Mount("", dir, "", flags, "")
		if err == nil {
			err = checkSpace(update.Prefix(dir))
		}
		if uerr := unix.Unmount(dir, 0); uerr != nil {
			t.Error(uerr)
		}
		if err == nil || !strings.Contains(err.Error(), want) ||
			!strings.Contains(err.Error(), "--prefix, such as /opt") {
			t.Errorf("%s: %v", option, err)
		}
	}
}

func TestNumbers(t *testing.T) {
	for version, want := range map[string][2]int{"v1.37.2": {1, 37}, "2.4.2+unknown": {2, 4}, "1.7.0-rc.1": {1, 7},
		"v1.30-eks": {1, 30}, "1.6": {1, 6}} {
		major, minor, ok := numbers(version)
		if !ok || [2]int{major, minor} != want {
			t.Errorf("%s: %d, %d, %v", version, major, minor, ok)
		}
	}
	for _, version := range []string{"", "2", "x.y", "<unknown>"} {
		if _, _, ok := numbers(version); ok {
			t.Errorf("%q is a version", version)
		}
	}
}

func TestNodeReady(t *testing.T) {
	since := time.Date(2026, 1, 2, 3, 4, 5, 600, time.UTC)
	answer := ""
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/api/v1/nodes/n1" || r.Header.Get("Authorization") != "Bearer secret" {
			http.Error(w, "forbidden", http.StatusForbidden)
			return
		}
		_, _ = w.Write([]byte(answer))
	}))
	defer s.Close()
	a := apiserver.New(s.URL, "secret", s.Client())
	defer a.Close()
	for _, c := range []struct{ name, conditions, want string }{
		{"ready", `{"type":"Ready","status":"True","lastHeartbeatTime":"2026-01-02T03:04:05Z"}`, ""},
		{"not since", `{"type":"Ready","status":"True","lastHeartbeatTime":"2026-01-02T03:04:04Z"}`,
			"has not reported"},
		{"not ready",
			`{"type":"DiskPressure","status":"False"},{"type":"Ready","status":"False","reason":"KubeletNotReady","message":"why","lastHeartbeatTime":"2026-01-02T03:04:06Z"}`, "node n1 is not ready: KubeletNotReady: why"},
		{"nothing", ``, "no Ready condition"},
	} {
		t.Run(c.name, func(t *testing.T) {
			answer = `{"status":{"conditions":[` + c.conditions + `]}}`
			err := notReady(t.Context(), a, "n1", since)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Error(err)
			}
		})
	}
	if err := notReady(t.Context(), a, "n2", since); err == nil || !strings.Contains(err.Error(), "403") {
		t.Error(err)
	}
}

// An administrator's mode and symlink are kept, when the file is changed and when it is put back.
func TestConfigFile(t *testing.T) {
	dir := t.TempDir()
	target, link := filepath.Join(dir, "target.yaml"), filepath.Join(dir, "config.yaml")
	write600(t, target, "a\n")
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	f := configFile(link, []byte("b\n"))
	a, ok, err := plan.Writing(f.path, f.content, f.mode)
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	for _, step := range []struct {
		want string
		do   func(context.Context) error
	}{{"b\n", a.Do}, {"a\n", a.Undo}} {
		if err := step.do(t.Context()); err != nil {
			t.Fatal(err)
		}
		fi, err := os.Stat(target)
		if err != nil {
			t.Fatal(err)
		}
		if to, err := os.Readlink(link); err != nil || to != target || fi.Mode().Perm() != 0o600 ||
			contentOf(t, link) != step.want {
			t.Errorf("%s (%v) %s %q", to, err, fi.Mode(), contentOf(t, link))
		}
	}
	if f := configFile(filepath.Join(dir, "new.yaml"), nil); f.mode != 0o644 {
		t.Error(f.mode)
	}
	if text, err := readConfig(link); err != nil || string(text) != "a\n" {
		t.Errorf("%q, %v", text, err)
	}
	if text, err := readConfig(filepath.Join(dir, "new.yaml")); err != nil || text != nil {
		t.Errorf("%q, %v", text, err)
	}
	if err := os.Remove(target); err != nil {
		t.Fatal(err)
	}
	if _, err := readConfig(link); err == nil || !strings.Contains(err.Error(), "is a symlink to "+target) {
		t.Errorf("a symlink to nothing: %v", err)
	}
}

// A kubelet that is down is not left with nothing to dial.
func TestRefuse(t *testing.T) {
	down := fmt.Errorf("%w as kubelet.service", kubelet.ErrNotRunning)
	for _, tt := range []struct {
		name, state string
		record      *record.Record
		now         string // what is in the one file that told kubelet what to dial
		found       error
		absent      bool
		want        bool
	}{
		{"down", "loaded", &record.Record{}, "", down, false, true},
		{"no such unit", "not-found", &record.Record{}, "", down, false, false},
		{"installed by the command", "loaded", &record.Record{Time: time.Now()}, "", down, false, false},
		{"as it was installed", "loaded", &record.Record{}, "e: ours\n", down, false, false},
		{"put back by an uninstall before", "loaded", &record.Record{}, "e: old\n", down, false, false},
		{"put back by somebody else", "loaded", &record.Record{}, "e: old\nmore: 1\n", down, false, false},
		{"told elsewhere", "loaded", &record.Record{}, "more: 1\n", down, false, true},
		{"told elsewhere, the file is gone", "loaded", &record.Record{}, "(none)", down, false, true},
		{"told elsewhere, not installed any more", "loaded", &record.Record{}, "(none)", down, true, false},
		{"told elsewhere, and systemd does not say", "loaded", &record.Record{}, "(none)", errors.New("x"),
			false, false},
		{"not installed", "loaded", &record.Record{}, "", down, true, false},
		{"something else", "loaded", &record.Record{}, "", errors.New("x"), false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "systemctl"), []byte("#!/bin/sh\necho LoadState="+tt.state+"\n"),
				0o700); err != nil {
				t.Fatal(err)
			}
			t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
			c := config.Default()
			c.Listen.Path = filepath.Join(dir, "cri.sock")
			c.StateDir = dir
			if !tt.absent {
				write600(t, c.Listen.Path, "")
			}
			u := &uninstaller{UninstallOptions: UninstallOptions{Unit: kubelet.DefaultUnit, Out: io.Discard}, config: c}
			if tt.now != "" {
				path := filepath.Join(dir, "flags")
				tt.record.Dir, tt.record.Ours, tt.record.Endpoint = filepath.Join(dir, "record"), "ours", "old"
				if err := tt.record.Keep(
					[]kubelet.Edit{{Path: path, Before: []byte("e: old\n"), After: []byte("e: ours\n")}}); err != nil {
					t.Fatal(err)
				}
				if tt.now != "(none)" {
					write600(t, path, tt.now)
				}
			}
			err := u.refuse(t.Context(), tt.record, tt.found)
			if (err != nil) != tt.want || err != nil && !strings.Contains(err.Error(), "start kubelet first") {
				t.Error(err)
			}
		})
	}
}
