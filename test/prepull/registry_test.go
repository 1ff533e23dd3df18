// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/types/known/durationpb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

func TestReferences(t *testing.T) {
	f := newFront(t, "references.test:5000")
	p := push(t, "team/app:1", 1, 1)
	push(t, "team/app:2", 1, 1)
	for _, image := range []string{
		"references.test:5000/team/app:1",
		"references.test:5000/team/app@" + p.digest.String(),
		"references.test:5000/team/app:1@" + p.digest.String(),
		// The digest counts, whatever the tag is.
		"references.test:5000/team/app:2@" + p.digest.String(),
		"nginx", "nginx:2", "docker.io/nginx", "docker.io/library/busybox:2.0",
		bed.Image("busybox:3.0"),
	} {
		t.Run(image, func(t *testing.T) {
			before := f.bytes.Load()
			op := succeeds(t, begin(t, &opsv1.PullRequest{Image: image}))
			if op.GetReason() != "Pulled" || op.GetImage() != image || op.GetImageId() == "" ||
				op.GetBytesTotal() == 0 || op.GetBytesDone() != op.GetBytesTotal() {
				t.Errorf("%v", op)
			}
			if img := present(t, image); img.GetId() != op.GetImageId() {
				t.Errorf("kubelet sees %v", img)
			}
			if strings.HasPrefix(image, f.host) && f.bytes.Load() == before {
				t.Error("not fetched through the front")
			}
			// Once more there is nothing to do, and with Always the registry is asked.
			requests := f.requests.Load()
			if op := succeeds(t, begin(t, &opsv1.PullRequest{Image: image})); op.GetReason() != "Present" ||
				f.requests.Load() != requests {
				t.Errorf("%v", op)
			}
			succeeds(t, begin(t, &opsv1.PullRequest{Image: image, Policy: opsv1.PullPolicy_PULL_POLICY_ALWAYS}))
			if strings.HasPrefix(image, f.host) && f.requests.Load() == requests {
				t.Error("Always did not ask the registry")
			}
		})
	}
	t.Run("refused", func(t *testing.T) {
		for _, image := range []string{"", "UPPER", "a b", "x@sha256:12", "http://host/x", "host/x:",
			strings.Repeat("a", 5000), strings.Repeat("0", 64)} {
			_, err := bed.pulls.Pull(t.Context(), &opsv1.PullRequest{Uid: "refused", Image: image})
			if status.Code(err) != codes.InvalidArgument {
				t.Errorf("%.50q: %v", image, err)
			}
		}
	})
	t.Run("missing tag", func(t *testing.T) {
		op := fails(t, begin(t, &opsv1.PullRequest{Image: f.image("team/app:nope"), MaxAttempts: 2}), "NotFound")
		if op.GetAttempt() != 2 || !strings.Contains(op.GetMessage(), "check name, tag and digest") {
			t.Errorf("%v", op)
		}
	})
	t.Run("missing digest", func(t *testing.T) {
		fails(t, begin(t, &opsv1.PullRequest{Image: f.image("team/app@sha256:" + strings.Repeat("0", 64)),
			MaxAttempts: 1}), "NotFound")
	})
	t.Run("no such host", func(t *testing.T) {
		l := newFront(t, "gone.test")
		must(t, os.WriteFile(filepath.Join(bed.RegistryHostsDir(), l.host, "hosts.toml"),
			[]byte("server = \"http://127.0.0.1:1\"\n"), 0o644))
		fails(t, begin(t, &opsv1.PullRequest{Image: l.image("x:1"), MaxAttempts: 1}), "RegistryUnavailable")
	})
}

// TestRegistryInTrouble has registries that misbehave, for a while or for ever.
func TestRegistryInTrouble(t *testing.T) {
	// Each has an image of its own: the layers of one that has been removed stay for a while.
	var p pushed
	request := func(f *front) *opsv1.PullRequest {
		p = push(t, fmt.Sprintf("trouble-%d:1", number.Add(1)), 4, 8)
		return &opsv1.PullRequest{Image: f.image(p.name)}
	}
	t.Run("hangs", func(t *testing.T) {
		f := newFront(t, "hangs.test")
		f.freeze()
		req := request(f)
		req.MaxAttempts, req.AttemptTimeout = 2, durationpb.New(500*time.Millisecond)
		op := fails(t, begin(t, req), "Timeout")
		if op.GetAttempt() != 2 || !strings.Contains(op.GetMessage(), "an attempt may take 500ms") {
			t.Errorf("%v", op)
		}
	})
	t.Run("hangs in the middle of a layer", func(t *testing.T) {
		f := newFront(t, "stalls.test")
		req := request(f)
		f.hold(p, 6)
		req.AttemptTimeout = durationpb.New(3 * time.Second)
		uid := begin(t, req)
		follow(t, uid, func(op *opsv1.PullOperation) bool { return op.GetReason() == "BackOff" })
		f.goOn()
		if op := succeeds(t, uid); op.GetAttempt() != 2 {
			t.Errorf("%v", op)
		}
		fetchedOnce(t, f, p)
	})
	t.Run("deadline", func(t *testing.T) {
		f := newFront(t, "deadline.test")
		req := request(f)
		f.hold(p, 6)
		req.Deadline = durationpb.New(1500 * time.Millisecond)
		op := fails(t, begin(t, req), "DeadlineExceeded")
		if took := op.GetFinishTime().AsTime().Sub(op.GetCreateTime().AsTime()); took < time.Second ||
			took > 6*time.Second {
			t.Errorf("took %s", took)
		}
		if !strings.Contains(op.GetMessage(), "MiB are on the node") {
			t.Errorf("%v", op)
		}
	})
	t.Run("cuts connections", func(t *testing.T) {
		f := newFront(t, "cuts.test")
		f.cutBlobs(3*mib, 3)
		succeeds(t, begin(t, request(f)))
		fetchedOnce(t, f, p)
		if f.ranges.Load() < 3 {
			t.Errorf("%d requests for parts", f.ranges.Load())
		}
	})
	t.Run("is down for a while", func(t *testing.T) {
		f := newFront(t, "down.test")
		f.answer(http.StatusInternalServerError, -1)
		uid := begin(t, request(f))
		op := follow(t, uid, func(op *opsv1.PullOperation) bool { return op.GetReason() == "BackOff" })
		if op.GetPhase() != opsv1.PullPhase_PULL_WAITING ||
			!strings.Contains(op.GetMessage(), "attempt 2 of 4 in 1s: ") {
			t.Errorf("%v", op)
		}
		f.answer(0, 0)
		now, err := bed.pulls.GetPull(t.Context(), &opsv1.GetPullRequest{Uid: uid})
		must(t, err)
		// Usually the second: one that has begun meanwhile fails as well.
		if op := succeeds(t, uid); op.GetAttempt() < 2 || op.GetAttempt() > now.GetAttempt()+1 {
			t.Errorf("%v, when the registry was up again %v", op, now)
		}
	})
	for code, reason := range map[int]string{http.StatusInternalServerError: "RegistryUnavailable",
		http.StatusTooManyRequests: "TooManyRequests", http.StatusForbidden: "Unauthorized"} {
		t.Run(http.StatusText(code), func(t *testing.T) {
			f := newFront(t, "broken.test")
			f.answer(code, -1)
			req := request(f)
			req.MaxAttempts = 2
			op := fails(t, begin(t, req), reason)
			if op.GetAttempt() != 2 {
				t.Errorf("%d attempts", op.GetAttempt())
			}
			// The runtime asks six times in a row (core/remotes/docker, retryRequest): nothing is
			// added to that.
			n := f.requests.Load()
			own := f.requestsOf(func() {
				if _, err := bed.direct.PullImage(t.Context(),
					&runtimeapi.PullImageRequest{Image: spec(req.GetImage())}); err == nil {
					t.Error("the runtime has pulled it")
				}
			})
			most := int64(0)
			for _, v := range own {
				most += int64(v)
			}
			if n > most*int64(op.GetAttempt()) {
				t.Errorf("%d requests in %d attempts, by the runtime %v in one", n, op.GetAttempt(), own)
			}
		})
	}
	t.Run("runtime away", func(t *testing.T) {
		f := newFront(t, "fine.test")
		must(t, bed.StopContainerd(t.Context(), syscall.SIGTERM))
		req := request(f)
		req.MaxAttempts = 1
		op := follow(t, begin(t, req), finished)
		must(t, bed.StartContainerd(t.Context()))
		must(t, bed.WaitProxyReady(t.Context())) // that it has its connection again: the next test begins here
		if op.GetReason() != "RuntimeError" || !strings.Contains(op.GetMessage(), "container runtime") {
			t.Errorf("%v", op)
		}
	})
}

func TestPrivateRegistry(t *testing.T) {
	f := newFront(t, "private.test")
	p := push(t, "private/app:1", 2, 1)
	f.protect("robot", password)
	good := &opsv1.RegistryCredential{Match: "private.test", Username: "robot", Password: password}
	// A wrong one has the password in its user name: nothing of a credential is told.
	bad := &opsv1.RegistryCredential{Match: "private.test/private", Username: password, Password: password + "x"}
	foreign := &opsv1.RegistryCredential{Match: "other.test", Username: "robot", Password: password}
	for name, tt := range map[string]struct {
		credentials []*opsv1.RegistryCredential
		reason      string
	}{
		"right":               {[]*opsv1.RegistryCredential{good}, ""},
		"wrong":               {[]*opsv1.RegistryCredential{bad}, "Unauthorized"},
		"none":                {nil, "Unauthorized"},
		"another registry's":  {[]*opsv1.RegistryCredential{foreign}, "Unauthorized"},
		"first wrong":         {[]*opsv1.RegistryCredential{good, bad, foreign}, ""},
		"right, with a limit": {[]*opsv1.RegistryCredential{good}, ""},
		"wildcard": {
			[]*opsv1.RegistryCredential{{Match: "https://*.test/v1/", Username: "robot", Password: password}}, ""},
		"right user, no secret": {[]*opsv1.RegistryCredential{{Match: "private.test", Username: "robot"}},
			"Unauthorized"},
	} {
		t.Run(name, func(t *testing.T) {
			req := &opsv1.PullRequest{Image: f.image(p.name), Credentials: tt.credentials, MaxAttempts: 1}
			if strings.Contains(name, "limit") {
				req.BytesPerSecond = 100 * mib
			}
			uid := begin(t, req)
			var op *opsv1.PullOperation
			if tt.reason == "" {
				op = succeeds(t, uid)
			} else {
				op = fails(t, uid, tt.reason)
				if !strings.Contains(op.GetMessage(), "pull secret") {
					t.Errorf("%v", op)
				}
			}
			if text := prototext.Format(op); strings.Contains(text, password) {
				t.Errorf("the operation tells the password: %s", text)
			}
		})
	}
	out, err := exec.CommandContext(t.Context(), filepath.Join(bed.Bin, "cri-proxy"), "ctl", "--admin-socket",
		bed.AdminSocket, "pulls", "-o", "json").CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("private.test/private/app:1")) ||
		bytes.Contains(out, []byte(password)) {
		t.Errorf("%v: %s", err, out)
	}
	must(t, secretsLeft())
}

// TestCredentialsAreForgotten restarts the proxy in the middle of a pull that came with
// credentials.
func TestCredentialsAreForgotten(t *testing.T) {
	f := newFront(t, "forgotten.test")
	p := push(t, "forgotten/app:1", 4, 8)
	f.protect("robot", password)
	f.hold(p, 6)
	req := &opsv1.PullRequest{Image: f.image(p.name),
		Credentials: []*opsv1.RegistryCredential{{Match: "forgotten.test", Username: "robot", Password: password}}}
	uid := begin(t, req)
	follow(t, uid, upTo(p, 6))
	must(t, bed.RestartProxy(t.Context(), syscall.SIGKILL))
	f.goOn()
	must(t, secretsLeft())
	op := follow(t, uid, func(op *opsv1.PullOperation) bool { return op.GetReason() == "CredentialsNeeded" })
	if op.GetPhase() != opsv1.PullPhase_PULL_WAITING || !strings.Contains(op.GetMessage(), "repeated") {
		t.Errorf("%v", op)
	}
	again := clone(req)
	again.Uid = uid
	if _, err := bed.pulls.Pull(t.Context(), again); err != nil {
		t.Fatal(err)
	}
	other := clone(again)
	other.Image = f.image("forgotten/app:2")
	if _, err := bed.pulls.Pull(t.Context(), other); status.Code(err) != codes.AlreadyExists {
		t.Errorf("another request with the UID: %v", err)
	}
	succeeds(t, uid)
	fetchedOnce(t, f, p)
}

// guardDisk has pulls refused that would make the disk fuller than so much percent, until t ends.
func guardDisk(t *testing.T, percent string) {
	t.Helper()
	restart := func(args ...string) {
		ctx := context.WithoutCancel(t.Context())
		must(t, bed.KillProxy(ctx, syscall.SIGTERM))
		must(t, bed.StartProxy(ctx, args...))
	}
	restart("--images-max-disk-percent", percent)
	t.Cleanup(func() { restart() })
}

func TestDiskGuard(t *testing.T) {
	guardDisk(t, "0.001")
	f := newFront(t, "disk.test")
	p := push(t, "disk:1", 2, 8)
	op := fails(t, begin(t, &opsv1.PullRequest{Image: f.image(p.name), MaxAttempts: 2}), "DiskPressure")
	if f.bytes.Load() > mib {
		t.Errorf("%d bytes were fetched all the same", f.bytes.Load())
	}
	for _, want := range []string{"needs about 56.0 MiB more", "images.maxDiskPercent", "2 attempts"} {
		if !strings.Contains(op.GetMessage(), want) {
			t.Errorf("%q is not in %q", want, op.GetMessage())
		}
	}
}

func TestParallel(t *testing.T) {
	f := newFront(t, "queue.test")
	var all []pushed
	for i := range 3 {
		all = append(all, push(t, fmt.Sprintf("queue:%d", i), 2, 8))
	}
	f.hold(all[0], 5)
	var uids []string
	for _, p := range all {
		uids = append(uids, begin(t, &opsv1.PullRequest{Image: f.image(p.name)}))
	}
	op := follow(t, uids[2], func(op *opsv1.PullOperation) bool {
		return op.GetReason() == "InQueue" &&
			op.GetMessage() != ""
	})
	if !strings.Contains(op.GetMessage(), "1 of 1") {
		t.Errorf("%v", op)
	}
	list, err := bed.pulls.ListPulls(t.Context(), &opsv1.ListPullsRequest{ActiveOnly: true})
	must(t, err)
	running := 0
	for _, op := range list.GetPulls() {
		if op.GetPhase() != opsv1.PullPhase_PULL_WAITING {
			running++
		}
	}
	if running > 1 {
		t.Errorf("%d at once: %v", running, list)
	}
	f.goOn()
	var ends []time.Time
	for _, uid := range uids {
		ends = append(ends, succeeds(t, uid).GetFinishTime().AsTime())
	}
	if !slices.IsSortedFunc(ends, time.Time.Compare) {
		t.Errorf("not in order: %v", ends)
	}
}

// TestCredentialProviderPlugin has the credentials on the node, as kubelet does in clouds.
func TestCredentialProviderPlugin(t *testing.T) {
	dir := filepath.Join(bed.NodeDir, "plugins")
	must(t, os.MkdirAll(dir, 0o700))
	const version = "credentialprovider.kubelet.k8s.io/v1"
	// The script must not hold the password: it is looked for on the whole node.
	script := fmt.Sprintf(
		"#!/bin/sh\nprintf "+
			"'{\"kind\":\"CredentialProviderResponse\",\"apiVersion\":%q,\"cacheKeyType\":\"Registry\","+
			"\"auth\":{\"*.cloud.test\":{\"username\":\"robot\",\"password\":\"%%s-%%s\"}}}' \"$1\" \"$2\"\n", version)
	must(t, os.WriteFile(filepath.Join(dir, "cloud"), []byte(script), 0o700)) //nolint:gosec // a program
	user, rest, _ := strings.Cut(password, "-")
	config := fmt.Sprintf("apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n- "+
		"{name: cloud, matchImages: ['*.cloud.test'], defaultCacheDuration: 1m, apiVersion: %s, args: [%s, %s]}\n",
		version, user, rest)
	path := filepath.Join(dir, "config.yaml")
	must(t, os.WriteFile(path, []byte(config), 0o600))
	must(t, bed.KillProxy(t.Context(), syscall.SIGTERM))
	must(t, bed.StartProxy(t.Context(), "--image-credential-provider-config", path,
		"--image-credential-provider-bin-dir", dir))
	defer func() {
		must(t, bed.KillProxy(t.Context(), syscall.SIGTERM))
		must(t, bed.StartProxy(t.Context()))
	}()
	f := newFront(t, "eu.cloud.test")
	p := push(t, "cloud/app:1", 1, 1)
	f.protect("robot", password)
	succeeds(t, begin(t, &opsv1.PullRequest{Image: f.image(p.name)}))
	must(t, secretsLeft())
}
