// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ctl_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

func (d *daemon) ListOverrides(context.Context, *opsv1.ListOverridesRequest) (*opsv1.ListOverridesResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.refuse != nil {
		return nil, d.refuse
	}
	return &opsv1.ListOverridesResponse{Overrides: d.overrides}, nil
}

func imageOverrides() []*opsv1.ImageOverride {
	return []*opsv1.ImageOverride{
		{
			Pod: &opsv1.PodRef{Namespace: "default", Name: "web", Uid: "uid-1"}, Container: "app",
			Image: "r.io/app:debug", ImageId: "sha256:0123456789abcdef", SpecImage: "r.io/app:v1",
			Since: timestamppb.New(epoch), Requester: "ctl/alice", OperationUid: "ctl-1",
		},
		{Pod: &opsv1.PodRef{Namespace: "shop", Name: "cart-0", Uid: "uid-2"}, Container: "cart", Image: "cart",
			SpecImage: "cart:1", Since: timestamppb.New(epoch.Add(time.Minute))},
	}
}

func TestOverrides(t *testing.T) {
	d := newDaemon(t)
	d.overrides = imageOverrides()
	for args, want := range map[string]string{
		"overrides": `
POD           CONTAINER   IMAGE            SPEC IMAGE    AGE
default/web   app         r.io/app:debug   r.io/app:v1   90s
shop/cart-0   cart        cart             cart:1        30s
`,
		"overrides -o wide": `
POD           CONTAINER   IMAGE            SPEC IMAGE    AGE   IMAGE ID       POD UID   OPERATION   REQUESTER
default/web   app         r.io/app:debug   r.io/app:v1   90s   0123456789ab   uid-1     ctl-1       ctl/alice
shop/cart-0   cart        cart             cart:1        30s                  uid-2                 
`,
	} {
		got, err := d.run(t, strings.Fields(args)...)
		if want := strings.TrimPrefix(want, "\n"); err != nil || got != want {
			t.Errorf("%s: %v\n%s\nwant\n%s", args, err, got, want)
		}
	}
	out, err := d.run(t, "overrides", "-o", "json")
	got := &opsv1.ListOverridesResponse{}
	if err != nil || protojson.Unmarshal([]byte(out), got) != nil ||
		!proto.Equal(got, &opsv1.ListOverridesResponse{Overrides: imageOverrides()}) {
		t.Errorf("%v\n%s", err, out)
	}
	if out, err = d.run(t, "overrides", "-o", "yaml"); err != nil ||
		!strings.Contains(out, "\noverrides:\n  - pod:\n      namespace: default\n") {
		t.Errorf("%v\n%s", err, out)
	}
	d.overrides = nil
	if out, err = d.run(t, "overrides"); err != nil || out != "No overrides.\n" {
		t.Errorf("%v\n%s", err, out)
	}
}

// authFile is a docker config file.
func authFile(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(path, []byte(`{"r.io":{"username":"u","password":"p"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestOverrideDaemonRestarts loses the daemon during the pull: the next one has no credentials.
func TestOverrideDaemonRestarts(t *testing.T) {
	d := newDaemon(t)
	d.course, d.lose = phases("", opsv1.Phase_PHASE_PULLING, opsv1.Phase_PHASE_SUCCEEDED), 1
	out, err := d.run(t, "restart", "default/web", "-c", "app", "--image", "r.io/app:v2", "--auth-file",
		authFile(t), "--watch")
	if err != nil || !strings.HasSuffix(out, "Succeeded\n") {
		t.Errorf("%v\n%s", err, out)
	}
	if d.restarts != 2 || d.restarted.GetCredentials()[0].GetPassword() != "p" {
		t.Errorf("asked %d times: %v", d.restarts, d.restarted)
	}
}
