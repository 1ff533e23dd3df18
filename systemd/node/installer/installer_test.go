// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package installer_test

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cri-proxy/cri-proxy/systemd/node/installer"
	"github.com/cri-proxy/cri-proxy/systemd/node/update"
)

func TestPrefix(t *testing.T) {
	host := t.TempDir()
	for _, tt := range []struct{ args, record, want string }{
		{"", "", "/usr/local"},
		{"--ops-address=:10260 --prefix=/opt", "", "/opt"},
		{"--prefix /opt/ --no-kubelet", "/srv", "/opt"},
		{"--purge", "/srv", "/srv"}, // an uninstall is not told
		{"--prefix", "", "/usr/local"},
	} {
		file := filepath.Join(host, update.PrefixFile)
		_ = os.RemoveAll(filepath.Dir(file))
		if tt.record != "" {
			if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, []byte(tt.record+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := installer.PrefixOf(installer.Options{Host: host, Args: strings.Fields(tt.args)})
		if err != nil || string(got) != tt.want {
			t.Errorf("%q, %q: %s, %v", tt.args, tt.record, got, err)
		}
	}
}

func keepAll(args []string) (kept, leftOver []string) { return args, nil }

// A container that ends would be started again, so one that could not do its work stays, and is not
// ready.
func TestFailureStays(t *testing.T) {
	for action, stays := range map[string]bool{installer.Check: false, installer.Install: true,
		installer.Uninstall: true} {
		t.Run(action, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			r, w := io.Pipe()
			done := filepath.Join(t.TempDir(), "done")
			// a node without systemd
			o := installer.Options{Action: action, Host: t.TempDir(), Done: done, LeftOver: keepAll, Out: w}
			result := make(chan error, 1)
			go func() {
				result <- installer.Run(ctx, o)
				_ = w.Close()
			}()
			said := false
			for lines := bufio.NewScanner(r); lines.Scan(); {
				if strings.Contains(lines.Text(), "waiting to be stopped") {
					said = true
					if len(result) > 0 {
						t.Error("it did not stay")
					}
					cancel()
				}
			}
			if err := <-result; err == nil || !strings.Contains(err.Error(), "no systemd-run") || said != stays {
				t.Error(said, err)
			}
			if _, err := os.Stat(done); err == nil {
				t.Error("it is ready")
			}
		})
	}
}

// Another pod comes where cri-proxy has been taken off a node whose /usr is read-only, and where it
// was has gone with it.
func TestUninstalledAlready(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting is for root")
	}
	for name, left := range map[string]string{
		"nothing is left":  "",
		"pins may be left": "/var/lib/cri-proxy/install",
		"a unit is left":   "/etc/systemd/system/cri-proxy.socket",
	} {
		t.Run(name, func(t *testing.T) {
			host := t.TempDir()
			usr := filepath.Join(host, "usr")
			for _, dir := range []string{usr, filepath.Join(host, left)} {
				if err := os.MkdirAll(dir, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			if err := unix.Mount("tmpfs", usr, "tmpfs", 0, "size=1m"); err != nil {
				t.Skip(err)
			}
			defer func() {
				if err := unix.Unmount(usr, 0); err != nil {
					t.Error(err)
				}
			}()
			if err := os.MkdirAll(filepath.Join(usr, "local/lib"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount("", usr, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var out bytes.Buffer
			done := filepath.Join(t.TempDir(), "done")
			err := installer.Run(ctx, installer.Options{
				Action: installer.Uninstall, Host: host, Done: done, Args: []string{"--ops-address=:10260"},
				LeftOver: func(args []string) (kept, leftOver []string) { return nil, args },
				Out:      io.MultiWriter(&out, ends(cancel)),
			})
			_, undone := os.Stat(done)
			if left == "" && (err != nil || undone != nil || !strings.Contains(out.String(), "not installed here")) ||
				left != "" && (err == nil || undone == nil || !strings.Contains(err.Error(), "--prefix=/opt")) {
				t.Errorf("%v, %v: %s", err, undone, out.String())
			}
		})
	}
}

// ends is called when the installer says that it waits to be stopped.
type ends func()

func (e ends) Write(b []byte) (int, error) {
	if strings.Contains(string(b), "waiting to be stopped") {
		e()
	}
	return len(b), nil
}
