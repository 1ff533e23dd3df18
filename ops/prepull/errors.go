// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package prepull

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

// failure is why an attempt did not succeed, in words for a person.
type failure struct {
	reason, message string
	// final means that another attempt would end the same way.
	final bool
	// credentials means that the registry says no, and is asked again only because somebody may put the image or its secret
	// there meanwhile: other credentials might end another way.
	credentials bool
}

func (f *failure) Error() string { return f.message }

// statusInText finds what containerd says of a registry's answer when it comes through CRI, as text only.
var statusInText = regexp.MustCompile(`unexpected status[^:]*: (\d{3})|: (\d{3}) [A-Z]|status code (\d{3})`)

// explain says what an error of a registry or of the runtime means and what to do.
func explain(err error, host string) *failure {
	var f *failure
	if errors.As(err, &f) {
		return f
	}
	if bug := (*guard.Panic)(nil); errors.As(err, &bug) {
		return &failure{reason: opsv1.PullReasonInternalError, final: true, message: bug.Error()}
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
	switch {
	case status.Code(err) == codes.Unavailable, errdefs.IsUnavailable(err):
		return &failure{reason: opsv1.PullReasonRuntimeError, message: fmt.Sprintf("the container runtime does not answer: is it running? (%s)", text)}
	case errors.Is(err, docker.ErrInvalidAuthorization), code == http.StatusUnauthorized, code == http.StatusForbidden,
		strings.Contains(text, "authorization failed"), strings.Contains(text, "pull access denied"), strings.Contains(text, "no basic auth credentials"):
		return &failure{reason: opsv1.PullReasonUnauthorized, credentials: true,
			message: fmt.Sprintf("registry %s refuses access: check that the image's name is right and that a pull secret for it is given and still valid (%s)", host, text)}
	case strings.Contains(text, "no match for platform"):
		return &failure{reason: opsv1.PullReasonInvalidImage, final: true, message: fmt.Sprintf("the image is not made for this node's platform (%s)", text)}
	case errdefs.IsNotFound(err), status.Code(err) == codes.NotFound, code == http.StatusNotFound:
		return &failure{reason: opsv1.PullReasonNotFound, credentials: true, message: fmt.Sprintf("registry %s has no such image, or does not show it without credentials: check name, tag and digest (%s)", host, text)}
	case code == http.StatusTooManyRequests:
		return &failure{reason: opsv1.PullReasonTooManyRequests, message: fmt.Sprintf("registry %s asks to slow down: use fewer nodes at once, or credentials with a higher limit (%s)", host, text)}
	case errors.Is(err, context.DeadlineExceeded), status.Code(err) == codes.DeadlineExceeded, strings.Contains(text, "Client.Timeout"), strings.Contains(text, "timeout awaiting response headers"):
		return &failure{reason: opsv1.PullReasonTimeout, message: fmt.Sprintf("registry %s does not answer in time: raise timeoutSeconds for a large image or a slow network (%s)", host, text)}
	case strings.Contains(text, "x509: "), strings.Contains(text, "tls: failed to verify"):
		return &failure{reason: opsv1.PullReasonRegistryUnavailable, message: fmt.Sprintf("the node does not trust the certificate of registry %s: give the runtime its CA (ca in hosts.toml), or correct the certificate (%s)", host, text)}
	case strings.Contains(text, "server gave HTTP response to HTTPS client"):
		return &failure{reason: opsv1.PullReasonRegistryUnavailable, message: fmt.Sprintf("registry %s speaks plain HTTP where HTTPS is expected: write http:// in its hosts.toml, or have it speak HTTPS (%s)", host, text)}
	case code == http.StatusBadRequest:
		return &failure{reason: opsv1.PullReasonRegistryUnavailable, message: fmt.Sprintf("registry %s does not understand the request: if it speaks HTTPS, write https:// in its hosts.toml (%s)", host, text)}
	case code >= http.StatusInternalServerError, errors.Is(err, errStalled), isNetwork(text):
		return &failure{reason: opsv1.PullReasonRegistryUnavailable, message: fmt.Sprintf("registry %s cannot be used now (%s)", host, text)}
	case strings.Contains(text, "invalid reference"), strings.Contains(text, "failed size validation"), errdefs.IsInvalidArgument(err):
		return &failure{reason: opsv1.PullReasonInvalidImage, final: strings.Contains(text, "reference"), message: fmt.Sprintf("the image cannot be used on this node (%s)", text)}
	case strings.Contains(text, "no space left on device"):
		return &failure{reason: opsv1.PullReasonDiskPressure, message: fmt.Sprintf("the node's disk is full (%s)", text)}
	default:
		return &failure{reason: opsv1.PullReasonRuntimeError, message: text}
	}
}

// query is what follows the path of a URL; user the part before its host.
var query, user = regexp.MustCompile(`(https?://[^\s"?]+)\?[^\s"]*[^\s":]`), regexp.MustCompile(`(https?://)[^\s"/@]+@`)

// withoutSecrets takes out of URLs what lets their readers in: storage behind registries is reached by signed ones.
func withoutSecrets(text string) string {
	return query.ReplaceAllString(user.ReplaceAllString(text, "$1"), "$1?...")
}

// isNetwork reports whether the text is that of a connection that was not made or was cut.
func isNetwork(text string) bool {
	for _, s := range []string{"connection refused", "no such host", "connection reset", "i/o timeout", "unexpected EOF", "no route to host", "network is unreachable", "failed to do request", "server misbehaving"} {
		if strings.Contains(text, s) {
			return true
		}
	}
	return false
}
