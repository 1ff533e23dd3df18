// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package caller_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"go.uber.org/goleak"

	"github.com/cri-proxy/cri-proxy/internal/daemon/caller"
)

// asCaller, set to a socket, has this binary dial it until its input ends.
const asCaller = "CRI_PROXY_TEST_CALLER"

func TestMain(m *testing.M) {
	if socket := os.Getenv(asCaller); socket != "" {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		_, _ = io.Copy(io.Discard, os.Stdin)
		conn.Close()
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// dialler is a process whose procfs is the test's, and which has dialled.
type dialler struct {
	t    *testing.T
	proc string
	pid  int
}

func (c dialler) write(file, text string) {
	c.t.Helper()
	dir := filepath.Join(c.proc, strconv.Itoa(c.pid))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		c.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
		c.t.Fatal(err)
	}
}

// called has another process connect to the listener, which has a name of its own in the test's
// procfs.
func called(t *testing.T, proc string, l net.Listener, name string) dialler {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), asCaller+"="+l.Addr().String(), "GORACE=atexit_sleep_ms=0")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait()
	})
	c := dialler{t, proc, cmd.Process.Pid}
	c.write("stat", fmt.Sprintf("%d (%s) S%s 77 1 1\n", c.pid, name, strings.Repeat(" 0", 18)))
	c.write("comm", name+"\n")
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return c
}

// TestKubeletIsFoundAmongCallers, its environment is that of plugins, and its threshold is ours.
func TestKubeletIsFoundAmongCallers(t *testing.T) {
	dir, err := os.MkdirTemp("", "callers")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	t.Setenv("OURS", "yes")
	proc := filepath.Join(dir, "proc")
	var words bytes.Buffer
	log := logrus.New()
	log.SetOutput(&words)
	all := caller.New(proc, log)
	var lc net.ListenConfig
	plain, err := lc.Listen(t.Context(), "unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	l := all.Watch(plain)

	unknown := func() {
		t.Helper()
		words.Reset()
		for range 2 {
			if !slices.Contains(all.Environ(), "OURS=yes") || all.HighThreshold() != 85 {
				t.Errorf("%v %d", all.Environ(), all.HighThreshold())
			}
		}
		if n := strings.Count(words.String(), "credential provider plugins run with cri-proxy's own"); n > 1 {
			t.Errorf("said %d times: %s", n, &words)
		}
	}
	// What only has its name has not dialled.
	impostor := dialler{t, proc, 1 << 21}
	impostor.write("stat", fmt.Sprintf("%d (kubelet) S%s 5 1 1\n", impostor.pid, strings.Repeat(" 0", 18)))
	impostor.write("comm", "kubelet\n")
	impostor.write("environ", "LD_PRELOAD=/evil.so\x00")
	unknown()
	if all.KubeletsEnviron() != nil {
		t.Error("an environment of nobody")
	}
	other := called(t, proc, l, "crictl")
	other.write("environ", "WHO=other\x00")
	unknown()

	k := called(t, proc, l, "kubelet")
	config := filepath.Join(dir, "kubelet.yaml")
	k.write("cmdline", "/usr/bin/kubelet\x00--config="+config+"\x00")
	k.write("environ", "WHO=kubelet\x00HTTPS_PROXY=http://proxy\x00")
	called(t, proc, l, "crictl")
	if got := all.Environ(); !slices.Equal(got, []string{"WHO=kubelet", "HTTPS_PROXY=http://proxy"}) ||
		!slices.Equal(got, all.KubeletsEnviron()) {
		t.Errorf("%v", got)
	}
	for text, want := range map[string]int{"": 85, "imageGCHighThresholdPercent: 70\n": 70,
		"imageGCHighThresholdPercent: 100\n": 100, "imageGCHighThresholdPercent: x\n": 85} {
		if err := os.WriteFile(config, []byte("kind: KubeletConfiguration\n"+text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := all.HighThreshold(); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
	k.write("cmdline", "/usr/bin/kubelet\x00--config="+config+"\x00--image-gc-high-threshold=60\x00")
	if got := all.HighThreshold(); got != 60 {
		t.Errorf("by flag: %d", got)
	}

	// Another process with the same number is nobody who has dialled.
	k.write("stat", fmt.Sprintf("%d (kubelet) S%s 78 1 1\n", k.pid, strings.Repeat(" 0", 18)))
	unknown()
	inside := called(t, proc, l, "k3s-server")
	inside.write("cmdline", "/usr/local/bin/k3s\x00server\x00")
	inside.write("environ", "WHO=k3s\x00")
	if got := all.Environ(); !slices.Equal(got, []string{"WHO=k3s"}) || all.HighThreshold() != 85 {
		t.Errorf("%v %d", got, all.HighThreshold())
	}
}

// TestListenerWithoutDeadlines: one that cannot be interrupted says so.
func TestListenerWithoutDeadlines(t *testing.T) {
	l := caller.New(t.TempDir(), logrus.New()).Watch(struct{ net.Listener }{})
	if err := l.(interface{ SetDeadline(t time.Time) error }).
		SetDeadline(time.Now()); !errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
}
