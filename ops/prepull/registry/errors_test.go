// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package registry_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/prepull/registry"
)

// TestExplain has what containerd 2.4 says through CRI, and what its resolver returns here.
func TestExplain(t *testing.T) {
	const pull = `failed to pull and unpack image "r.io/a:1": `
	for name, tt := range map[string]struct {
		err    error
		reason string
		final  bool
	}{
		"missing, CRI": {
			status.Error(codes.NotFound, pull+`failed to resolve image: r.io/a:1: not found`),
			opsv1.PullReasonNotFound, false,
		},
		"missing, here": {fmt.Errorf("r.io/a:1: %w", errdefs.ErrNotFound), opsv1.PullReasonNotFound, false},
		"401, CRI": {
			status.Error(codes.Unknown,
				pull+`failed to resolve image: pull access denied, repository does not exist or may `+
					`require authorization: authorization failed: no basic auth credentials`),
			opsv1.PullReasonUnauthorized, false,
		},
		"401, here": {
			remoteerrors.ErrUnexpectedStatus{Status: "401 Unauthorized", StatusCode: 401},
			opsv1.PullReasonUnauthorized, false,
		},
		"403": {
			status.Error(codes.Unknown,
				pull+`unexpected status from HEAD request to https://r.io:5000/v2/a/manifests/1: `+
					`403 Forbidden`),
			opsv1.PullReasonUnauthorized, false,
		},
		"token server": {
			status.Error(codes.Unknown,
				pull+`failed to authorize: failed to fetch oauth token: unexpected status from GET `+
					`request to https://auth.r.io/token?scope=x: 401 Unauthorized`),
			opsv1.PullReasonUnauthorized, false,
		},
		"429, CRI": {
			status.Error(codes.Unknown,
				pull+`unexpected status from HEAD request to https://r.io:5000/v2/a/manifests/1: `+
					`429 Too Many Requests`),
			opsv1.PullReasonTooManyRequests, false,
		},
		"429, here": {
			remoteerrors.ErrUnexpectedStatus{Status: "429 Too Many Requests", StatusCode: 429},
			opsv1.PullReasonTooManyRequests, false,
		},
		"500": {
			status.Error(codes.Unknown,
				pull+`unexpected status from GET request to http://r.io/v2/a/blobs/sha256:0: 500 `+
					`Internal Server Error`),
			opsv1.PullReasonRegistryUnavailable, false,
		},
		"503": {
			fmt.Errorf("x: %w", remoteerrors.ErrUnexpectedStatus{Status: "503 Service Unavailable", StatusCode: 503}),
			opsv1.PullReasonRegistryUnavailable, false,
		},
		"no name": {
			status.Error(codes.Unknown,
				pull+`failed to do request: Head "https://r.io/v2/a/manifests/1": dial tcp: lookup `+
					`r.io: no such host`),
			opsv1.PullReasonRegistryUnavailable, false,
		},
		"refused": {
			status.Error(codes.Unknown, pull+`failed to do request: Head "https://r.io/v2/a/manifests/1": dial tcp `+
				`127.0.0.1:1: connect: connection refused`),
			opsv1.PullReasonRegistryUnavailable, false,
		},
		"runtime away": {
			fmt.Errorf("asking: %w", status.Error(codes.Unavailable,
				`connection error: desc = "transport: Error while dialing: dial unix `+
					`/run/containerd/containerd.sock: connect: connection refused"`)),
			opsv1.PullReasonRuntimeError, false,
		},
		"runtime away, here": {fmt.Errorf("lease: %w", errdefs.ErrUnavailable), opsv1.PullReasonRuntimeError, false},
		"no answer": {
			status.Error(codes.DeadlineExceeded, "context deadline exceeded"),
			opsv1.PullReasonTimeout, false,
		},
		"ctx": {fmt.Errorf("x: %w", context.DeadlineExceeded), opsv1.PullReasonTimeout, false},
		"platform": {
			status.Error(codes.NotFound, pull+`no match for platform in manifest sha256:0: not found`),
			opsv1.PullReasonInvalidImage, true,
		},
		"disk full": {
			status.Error(codes.Unknown, pull+`write /var/lib/containerd/x: no space left on device`),
			opsv1.PullReasonDiskPressure, false,
		},
		"stalled": {fmt.Errorf("%w (2m0s)", registry.ErrStalled), opsv1.PullReasonRegistryUnavailable, false},
		"unknown CA": {
			status.Error(codes.Unknown,
				pull+`failed to do request: Head "https://r.io/v2/a/manifests/1": tls: failed to `+
					`verify certificate: x509: certificate signed by unknown authority`),
			opsv1.PullReasonRegistryUnavailable, false,
		},
		"no TLS": {
			status.Error(codes.Unknown,
				pull+`failed to do request: Head "https://r.io/v2/a/manifests/1": http: server gave `+
					`HTTP response to HTTPS client`),
			opsv1.PullReasonRegistryUnavailable, false,
		},
		"400": {
			status.Error(codes.Unknown,
				pull+`unexpected status from HEAD request to http://r.io:5000/v2/a/manifests/1: 400 `+
					`Bad Request`),
			opsv1.PullReasonRegistryUnavailable, false,
		},
		"whatever": {errors.New("whatever"), opsv1.PullReasonRuntimeError, false},
	} {
		t.Run(name, func(t *testing.T) {
			f := registry.Explain(tt.err, "r.io")
			if f.Reason != tt.reason || f.Final != tt.final {
				t.Errorf("%s, final %v: %s", f.Reason, f.Final, f.Message)
			}
			if strings.Contains(f.Message, "scope=x") {
				t.Errorf("the query is told: %s", f.Message)
			}
			if again := registry.Explain(fmt.Errorf("y: %w", f), "other"); again != f {
				t.Errorf("explained twice: %v", again)
			}
		})
	}
}

func TestWithoutSecrets(t *testing.T) {
	for text, want := range map[string]string{
		`Get "https://bucket/x?X-Amz-Signature=abc&y=1": EOF`:   `Get "https://bucket/x?...": EOF`,
		`Get "http://robot:secret@r.io/v2/": EOF`:               `Get "http://r.io/v2/": EOF`,
		`http://a?b http://c?d "http://e:5000/f@sha256:0": 500`: `http://a?... http://c?... "http://e:5000/f@sha256:0": 500`,
		`is this so? yes`: `is this so? yes`,
	} {
		if got := registry.Explain(errors.New(text), "r.io").Message; got != want {
			t.Errorf("%s: got %s", text, got)
		}
	}
}
