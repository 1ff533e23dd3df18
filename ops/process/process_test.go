// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package process

import (
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestListener looks at this process, which listens.
func TestListener(t *testing.T) {
	dir, err := os.MkdirTemp("", "process") // shorter than t.TempDir: a socket path has an end
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p, err := Listener(t.Context(), "/proc", filepath.Join(dir, "s"))
	if err != nil || p.PID != os.Getpid() || p.Start == "" {
		t.Fatal(p, err)
	}
	if args, err := p.Args("/proc"); err != nil || !slices.Equal(args, os.Args) {
		t.Errorf("%q %v", args, err)
	}
	if environ, err := p.Environ("/proc"); err != nil || Getenv(environ, "PATH") == "" {
		t.Errorf("%v", err)
	}
	if exe, err := os.Executable(); err != nil || !strings.HasPrefix(filepath.Base(exe), p.Name("/proc")) ||
		p.Name("/proc") == "" {
		t.Errorf("%s: %q %v", exe, p.Name("/proc"), err)
	}
	before := p
	before.Start = "1"
	if _, err := before.Args("/proc"); err == nil || before.Name("/proc") != "" {
		t.Errorf("of a process that had the same number: %v", err)
	}
	if _, err := Listener(t.Context(), "/proc", filepath.Join(dir, "none")); err == nil {
		t.Error("nobody listens")
	}
}

func TestGetenvAndLookPath(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"program": 0o755, "text": 0o644} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	environ := []string{"A=1", "AB=2", "A=3", "EMPTY=", "PATH=relative:/nowhere:" + dir}
	for name, want := range map[string]string{"A": "1", "AB": "2", "EMPTY": "", "NONE": ""} {
		if got := Getenv(environ, name); got != want {
			t.Errorf("%s: %q", name, got)
		}
	}
	for name, want := range map[string]string{"program": filepath.Join(dir, "program"), "text": "text",
		"none": "none"} {
		if got := LookPath(environ, name); got != want {
			t.Errorf("%s: %q", name, got)
		}
	}
}

func TestProxies(t *testing.T) {
	for environ, want := range map[string]string{
		"HTTPS_PROXY=http://one:1 https_proxy=http://two:2": "http://one:1",
		"https_proxy=two:2":                         "http://two:2",
		"HTTP_PROXY=http://one:1":                   "",
		"HTTPS_PROXY=http://one:1 no_proxy=.r.test": "",
		"": "",
	} {
		got, err := Proxies(strings.Fields(environ)).ProxyFunc()(&url.URL{Scheme: "https", Host: "a.r.test"})
		text := ""
		if got != nil {
			text = got.String()
		}
		if err != nil || text != want {
			t.Errorf("%s: %q %v", environ, text, err)
		}
	}
}
