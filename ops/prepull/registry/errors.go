// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/guard"
)

// Failure is why an attempt to pull failed, in words for a person.
type Failure struct {
	// Reason is one of the reasons of [opsv1.PullOperation].
	Reason, Message string
	// Final means that another attempt would end the same way.
	Final bool
	// Credentials means that the registry refuses. Other credentials may end another way, and
	// another attempt is made only because somebody may put the image or its secret there
	// meanwhile.
	Credentials bool
}

func (f *Failure) Error() string { return f.Message }

// statusInText finds a registry's answer in an error that containerd sent through CRI, as text
// only.
var statusInText = regexp.MustCompile(`unexpected status[^:]*: (\d{3})|: (\d{3}) [A-Z]|status code (\d{3})`)

// Explain says what an error of a registry or of the runtime means, and what to do about it.
func Explain(err error, host string) *Failure {
	var f *Failure
	if errors.As(err, &f) {
		return f
	}
	if bug := (*guard.Panic)(nil); errors.As(err, &bug) {
		return &Failure{Reason: opsv1.PullReasonInternalError, Final: true, Message: bug.Error()}
	}
	text := err.Error()
	if s, ok := status.FromError(err); ok {
		text = s.Message()
	}
	text = withoutSecrets(text)
	code := 0
	var unexpected remoteerrors.ErrUnexpectedStatus
	if errors.As(err, &unexpected) {
		code = unexpected.StatusCode
	} else if m := statusInText.FindStringSubmatch(text); m != nil {
		_, _ = fmt.Sscan(m[1]+m[2]+m[3], &code)
	}
	has := func(parts ...string) bool {
		for _, part := range parts {
			if strings.Contains(text, part) {
				return true
			}
		}
		return false
	}
	fail := func(reason, format string, args ...any) *Failure {
		return &Failure{Reason: reason, Message: fmt.Sprintf(format+" (%s)", append(args, text)...)}
	}
	refused := func(reason, format string, args ...any) *Failure {
		f := fail(reason, format, args...)
		f.Credentials = true
		return f
	}
	final := func(f *Failure, is bool) *Failure {
		f.Final = is
		return f
	}
	switch {
	case status.Code(err) == codes.Unavailable, errdefs.IsUnavailable(err):
		return fail(opsv1.PullReasonRuntimeError, "the container runtime does not answer: is it running?")
	case errors.Is(err, docker.ErrInvalidAuthorization), code == http.StatusUnauthorized, code == http.StatusForbidden,
		has("authorization failed", "pull access denied", "no basic auth credentials"):
		return refused(opsv1.PullReasonUnauthorized, "registry %s refuses access: "+
			"check that the image's name is right and that a pull secret for it is given and still valid", host)
	case has("no match for platform"):
		return final(fail(opsv1.PullReasonInvalidImage, "the image is not made for this node's platform"), true)
	case errdefs.IsNotFound(err), status.Code(err) == codes.NotFound, code == http.StatusNotFound:
		return refused(opsv1.PullReasonNotFound, "registry %s has no such image, "+
			"or does not show it without credentials: check name, tag and digest", host)
	case code == http.StatusTooManyRequests:
		return fail(opsv1.PullReasonTooManyRequests, "registry %s asks to slow down: "+
			"use fewer nodes at once, or credentials with a higher limit", host)
	case errors.Is(err, context.DeadlineExceeded), status.Code(err) == codes.DeadlineExceeded,
		has("Client.Timeout", "timeout awaiting response headers"):
		return fail(opsv1.PullReasonTimeout, "registry %s does not answer in time: "+
			"raise timeoutSeconds for a large image or a slow network", host)
	case has("x509: ", "tls: failed to verify"):
		return fail(opsv1.PullReasonRegistryUnavailable, "the node does not trust the certificate of registry %s: "+
			"give the runtime its CA (ca in hosts.toml), or correct the certificate", host)
	case has("server gave HTTP response to HTTPS client"):
		return fail(opsv1.PullReasonRegistryUnavailable, "registry %s speaks plain HTTP where HTTPS is expected: "+
			"write http:// in its hosts.toml, or have it speak HTTPS", host)
	case code == http.StatusBadRequest:
		return fail(opsv1.PullReasonRegistryUnavailable, "registry %s does not understand the request: "+
			"if it speaks HTTPS, write https:// in its hosts.toml", host)
	case code >= http.StatusInternalServerError, errors.Is(err, ErrStalled), IsNetwork(text):
		return fail(opsv1.PullReasonRegistryUnavailable, "registry %s cannot be used now", host)
	case has("invalid reference", "failed size validation"), errdefs.IsInvalidArgument(err):
		return final(fail(opsv1.PullReasonInvalidImage, "the image cannot be used on this node"), has("reference"))
	case has("no space left on device"):
		return fail(opsv1.PullReasonDiskPressure, "the node's disk is full")
	default:
		return &Failure{Reason: opsv1.PullReasonRuntimeError, Message: text}
	}
}

// query is a URL up to its query, and the query; user is the user part of a URL.
var (
	query = regexp.MustCompile(`(https?://[^\s"?]+)\?[^\s"]*[^\s":]`)
	user  = regexp.MustCompile(`(https?://)[^\s"/@]+@`)
)

// withoutSecrets takes out of URLs what grants access: signed queries, by which the storage behind
// registries is reached, and passwords.
func withoutSecrets(text string) string {
	return query.ReplaceAllString(user.ReplaceAllString(text, "$1"), "$1?...")
}

// IsNetwork reports whether the text is that of a connection that was not made or was cut.
func IsNetwork(text string) bool {
	for _, s := range []string{
		"connection refused", "no such host", "connection reset", "i/o timeout", "unexpected EOF", "no route to host",
		"network is unreachable", "failed to do request", "server misbehaving",
	} {
		if strings.Contains(text, s) {
			return true
		}
	}
	return false
}
