// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

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
)

// TestExplain has what containerd 2.4 says through CRI, and what its resolver returns here.
func TestExplain(t *testing.T) {
	const pull = `failed to pull and unpack image "r.io/a:1": `
	for name, tt := range map[string]struct {
		err    error
		reason string
		final  bool
	}{
		"missing, CRI":       {status.Error(codes.NotFound, pull+`failed to resolve image: r.io/a:1: not found`), ReasonNotFound, false},
		"missing, here":      {fmt.Errorf("r.io/a:1: %w", errdefs.ErrNotFound), ReasonNotFound, false},
		"401, CRI":           {status.Error(codes.Unknown, pull+`failed to resolve image: pull access denied, repository does not exist or may require authorization: authorization failed: no basic auth credentials`), ReasonUnauthorized, false},
		"401, here":          {remoteerrors.ErrUnexpectedStatus{Status: "401 Unauthorized", StatusCode: 401}, ReasonUnauthorized, false},
		"403":                {status.Error(codes.Unknown, pull+`unexpected status from HEAD request to https://r.io:5000/v2/a/manifests/1: 403 Forbidden`), ReasonUnauthorized, false},
		"token server":       {status.Error(codes.Unknown, pull+`failed to authorize: failed to fetch oauth token: unexpected status from GET request to https://auth.r.io/token?scope=x: 401 Unauthorized`), ReasonUnauthorized, false},
		"429, CRI":           {status.Error(codes.Unknown, pull+`unexpected status from HEAD request to https://r.io:5000/v2/a/manifests/1: 429 Too Many Requests`), ReasonTooManyRequests, false},
		"429, here":          {remoteerrors.ErrUnexpectedStatus{Status: "429 Too Many Requests", StatusCode: 429}, ReasonTooManyRequests, false},
		"500":                {status.Error(codes.Unknown, pull+`unexpected status from GET request to http://r.io/v2/a/blobs/sha256:0: 500 Internal Server Error`), ReasonRegistryUnavailable, false},
		"503":                {fmt.Errorf("x: %w", remoteerrors.ErrUnexpectedStatus{Status: "503 Service Unavailable", StatusCode: 503}), ReasonRegistryUnavailable, false},
		"no name":            {status.Error(codes.Unknown, pull+`failed to do request: Head "https://r.io/v2/a/manifests/1": dial tcp: lookup r.io: no such host`), ReasonRegistryUnavailable, false},
		"refused":            {status.Error(codes.Unknown, pull+`failed to do request: Head "https://r.io/v2/a/manifests/1": dial tcp 127.0.0.1:1: connect: connection refused`), ReasonRegistryUnavailable, false},
		"runtime away":       {fmt.Errorf("asking: %w", status.Error(codes.Unavailable, `connection error: desc = "transport: Error while dialing: dial unix /run/containerd/containerd.sock: connect: connection refused"`)), ReasonRuntime, false},
		"runtime away, here": {fmt.Errorf("lease: %w", errdefs.ErrUnavailable), ReasonRuntime, false},
		"no answer":          {status.Error(codes.DeadlineExceeded, "context deadline exceeded"), ReasonTimeout, false},
		"ctx":                {fmt.Errorf("x: %w", context.DeadlineExceeded), ReasonTimeout, false},
		"platform":           {status.Error(codes.NotFound, pull+`no match for platform in manifest sha256:0: not found`), ReasonInvalidImage, true},
		"disk full":          {status.Error(codes.Unknown, pull+`write /var/lib/containerd/x: no space left on device`), ReasonDiskPressure, false},
		"stalled":            {fmt.Errorf("%w (2m0s)", errStalled), ReasonRegistryUnavailable, false},
		"unknown CA":         {status.Error(codes.Unknown, pull+`failed to do request: Head "https://r.io/v2/a/manifests/1": tls: failed to verify certificate: x509: certificate signed by unknown authority`), ReasonRegistryUnavailable, false},
		"no TLS":             {status.Error(codes.Unknown, pull+`failed to do request: Head "https://r.io/v2/a/manifests/1": http: server gave HTTP response to HTTPS client`), ReasonRegistryUnavailable, false},
		"400":                {status.Error(codes.Unknown, pull+`unexpected status from HEAD request to http://r.io:5000/v2/a/manifests/1: 400 Bad Request`), ReasonRegistryUnavailable, false},
		"whatever":           {errors.New("whatever"), ReasonRuntime, false},
	} {
		t.Run(name, func(t *testing.T) {
			f := explain(tt.err, "r.io")
			if f.reason != tt.reason || f.final != tt.final {
				t.Errorf("%s, final %v: %s", f.reason, f.final, f.message)
			}
			if strings.Contains(f.message, "scope=x") {
				t.Errorf("the query is told: %s", f.message)
			}
			if again := explain(fmt.Errorf("y: %w", f), "other"); again != f {
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
		if got := withoutSecrets(text); got != want {
			t.Errorf("%s: got %s", text, got)
		}
	}
}
