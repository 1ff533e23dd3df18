// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

func ctl(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(bed.Bin, "cri-proxy"),
		append([]string{"ctl", "--admin-socket", bed.AdminSocket}, args...)...)
	cmd.Env = append(os.Environ(), "SUDO_USER=alice")
	return cmd
}

func output(t *testing.T, args ...string) string {
	t.Helper()
	out, err := ctl(t, args...).CombinedOutput()
	if err != nil {
		t.Errorf("ctl %s: %v\n%s", args, err, out)
	}
	return string(out)
}

// TestCommands has a person pull, look, change their mind and unpin.
func TestCommands(t *testing.T) {
	f := newFront(t, "ctl.test")
	p := push(t, "ctl/app:1", 4, 8)
	image := f.image(p.name)
	f.protect("robot", password)
	f.throttle(wire / 4)
	f.hold(p, 6)
	t.Cleanup(func() {
		_, _ = bed.direct.RemoveImage(context.WithoutCancel(t.Context()),
			&runtimeapi.RemoveImageRequest{Image: spec(image)})
	})
	auth := filepath.Join(t.TempDir(), "config.json")
	must(t, os.WriteFile(auth,
		fmt.Appendf(nil, `{"auths":{"ctl.test":{"auth":%q}}}`,
			base64.StdEncoding.EncodeToString([]byte("robot:"+password))), 0o600))

	cut := ctl(t, "pull", image, "--auth-file", auth, "--uid", "by-hand")
	var out bytes.Buffer
	cut.Stdout, cut.Stderr = &out, &out
	must(t, cut.Start())
	eventually(t, func() error {
		_, err := bed.pulls.GetPull(t.Context(), &opsv1.GetPullRequest{Uid: "by-hand"})
		return err
	})
	follow(t, "by-hand", upTo(p, 6))
	must(t, cut.Process.Signal(unix.SIGINT))
	if err := cut.Wait(); cut.ProcessState.ExitCode() != 1 ||
		!strings.Contains(out.String(), "the pull of "+image+" was cancelled: cancelled by ctl/alice") {
		t.Errorf("%v\n%s", err, &out)
	}
	f.goOn()
	if present(t, image) != nil {
		t.Error("nothing was cancelled")
	}

	if out := output(t, "pull", image, "--auth-file", auth, "--limit", "40MiB/s", "--pin",
		"24h"); !strings.Contains(out, image+" Fetching ") || !strings.HasSuffix(out, "Succeeded (Pulled)\n") {
		t.Error(out)
	}
	fetchedOnce(t, f, p)
	pinned(t, image, true)
	if out := output(t, "images"); !strings.Contains(out, image) || !strings.Contains(out, "23h") ||
		!strings.Contains(out, "ctl/alice") {
		t.Error(out)
	}
	if out := output(t, "pulls"); !strings.Contains(out, "by-hand") || !strings.Contains(out, "Cancelled") {
		t.Error(out)
	}
	if out := output(t, "unpin", image); out != "1 pins ended.\n" {
		t.Error(out)
	}
	pinned(t, image, false)
	must(t, secretsLeft())
}
