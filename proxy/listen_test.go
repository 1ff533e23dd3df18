// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy_test

import (
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/cri-proxy/cri-proxy/proxy"
	"golang.org/x/sys/unix"
)

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

var own = proxy.ListenOptions{UID: -1, GID: -1}

func TestListenModeAndOwner(t *testing.T) {
	for _, tc := range []struct {
		name     string
		o        proxy.ListenOptions
		mode     fs.FileMode
		uid, gid uint32
	}{
		{"default", own, 0o660, uint32(os.Geteuid()), uint32(os.Getegid())},
		{"root only", proxy.ListenOptions{Mode: 0o600, UID: -1, GID: -1}, 0o600, uint32(os.Geteuid()),
			uint32(os.Getegid())},
		{"a group", proxy.ListenOptions{Mode: 0o660, GID: 4711}, 0o660, 0, 4711},
		{"a user", proxy.ListenOptions{Mode: 0o606, UID: 4712, GID: 4711}, 0o606, 4712, 4711},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if os.Geteuid() != 0 && tc.o != own {
				t.Skip("changes the owner")
			}
			old := unix.Umask(0o077) // must not matter
			defer unix.Umask(old)
			path := filepath.Join(t.TempDir(), "made", "here", "x.sock")
			l, err := proxy.Listen(path, tc.o)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			fi, err := os.Lstat(path)
			if err != nil {
				t.Fatal(err)
			}
			st := fi.Sys().(*syscall.Stat_t)
			if fi.Mode() != fs.ModeSocket|tc.mode || st.Uid != tc.uid || st.Gid != tc.gid {
				t.Errorf("%v %d:%d, want %v %d:%d", fi.Mode(), st.Uid, st.Gid, tc.mode, tc.uid, tc.gid)
			}
			if a := l.Addr().String(); a != path {
				t.Errorf("address %s", a)
			}
			entries, err := os.ReadDir(filepath.Dir(path))
			if err != nil || len(entries) != 1 {
				t.Errorf("left behind: %v, %v", entries, err)
			}
		})
	}
}

func TestListenReplacesStaleSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.sock")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false) // as a killed process leaves it
	stale.Close()
	l, err := proxy.Listen(path, own)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	l.Close()
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("after Close: %v", err)
	}
}

// The old instance must not take the new one's socket away.
func TestListenCloseKeepsSuccessor(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x.sock")
	first, err := proxy.Listen(path, own)
	if err != nil {
		t.Fatal(err)
	}
	second, err := proxy.Listen(filepath.Join(dir, "y.sock"), own)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	rename(t, filepath.Join(dir, "y.sock"), path)
	first.Close()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

func TestListenErrors(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	live, err := proxy.Listen(path("live.sock"), own)
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	if err := os.WriteFile(path("file"), []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(path("live.sock"), path("link")); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, path string
		want       []string // parts of the message
	}{
		{
			"live process", path("live.sock"),
			[]string{
				path("live.sock"), "in use by a live process", fmt.Sprintf("pid %d", os.Getpid()),
				"stop it first or choose another path",
			},
		},
		{"a file", path("file"), []string{path("file"), "not a socket", "remove it or choose another path"}},
		{"a symlink", path("link"), []string{path("link"), "not a socket"}},
		{"a directory", dir, []string{dir, "not a socket"}},
		{"below a file", path("file/x.sock"), []string{"file/x.sock", "a part of the path is a file"}},
		{"relative", "x.sock", []string{`"x.sock" is not absolute`}},
		{"empty", "", []string{"not absolute"}},
		{"too long", path(strings.Repeat("x", 120)), []string{"107 bytes", "shorter"}},
		{"kernel file system", "/proc/x.sock", []string{"/proc/x.sock"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l, err := proxy.Listen(tc.path, own)
			if err == nil {
				l.Close()
				t.Fatal("no error")
			}
			for _, part := range tc.want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%q does not say %q", err, part)
				}
			}
		})
	}
	if b, err := os.ReadFile(path("file")); string(b) != "precious" {
		t.Errorf("the file: %q, %v", b, err)
	}
	conn, err := net.Dial("unix", path("live.sock"))
	if err != nil {
		t.Fatalf("the live socket suffered: %v", err)
	}
	conn.Close()
}

// Of several processes that start at once, one gets the path.
func TestListenRace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.sock")
	var (
		wg  sync.WaitGroup
		mu  sync.Mutex
		got []net.Listener
	)
	for range 8 {
		wg.Go(func() {
			l, err := proxy.Listen(path, own)
			if err == nil {
				mu.Lock()
				defer mu.Unlock()
				got = append(got, l)
			} else if !strings.Contains(err.Error(), "in use") {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(got) != 1 {
		t.Errorf("%d listeners", len(got))
	}
	for _, l := range got {
		l.Close()
	}
}

// Permissions are only checked for users other than root, so the test runs
// itself as one.
func TestListenPermission(t *testing.T) {
	const variable = "CRI_PROXY_TEST_LISTEN"
	if path := os.Getenv(variable); path != "" {
		_, err := proxy.Listen(path, own)
		fmt.Println("error:", err)
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root to become somebody else")
	}
	open, err := os.MkdirTemp("", "listen")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(open)
	if err := os.Chmod(open, 0o755); err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(open, "test")
	self, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(binary, self, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "-test.run=^TestListenPermission$")
	cmd.Env = append(os.Environ(), variable+"="+filepath.Join(open, "x.sock"))
	cmd.Dir = open
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if want := "run as root or give this user write permission"; !strings.Contains(string(out), want) {
		t.Errorf("%s", out)
	}
}

// The process is started as systemd would: descriptors from 3 on, announced in
// the environment.
func TestListenersFromSystemd(t *testing.T) {
	if os.Getenv("LISTEN_FDS") != "" {
		_ = os.Setenv("LISTEN_PID", fmt.Sprint(os.Getpid()))
		listeners, err := proxy.ListenersFromSystemd()
		if err != nil {
			fmt.Println(err)
			return
		}
		for name, l := range listeners {
			fmt.Println(name, len(l), l[0].Addr())
		}
		again, err := proxy.ListenersFromSystemd()
		fmt.Println("again", len(again), err)
		return
	}
	if got, err := proxy.ListenersFromSystemd(); len(got) != 0 || err != nil {
		t.Errorf("without systemd: %v, %v", got, err)
	}
	path := filepath.Join(t.TempDir(), "x.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	socket, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for _, tc := range []struct {
		name string
		file *os.File
		want []string
	}{
		{"a socket", socket, []string{"cri 1 " + path, "again 0 <nil>"}},
		{"not a socket", null, []string{`socket "cri" from systemd is not a listening stream socket`}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cmd := exec.Command(os.Args[0], "-test.run=^TestListenersFromSystemd$")
			cmd.Env = append(os.Environ(), "LISTEN_FDS=1", "LISTEN_FDNAMES=cri")
			cmd.ExtraFiles = []*os.File{tc.file}
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			for _, want := range tc.want {
				if !strings.Contains(string(out), want) {
					t.Errorf("%s lacks %q", out, want)
				}
			}
		})
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the child has removed the socket: %v", err)
	}
}
