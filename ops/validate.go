// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"errors"
	"regexp"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/operation"
	"github.com/cri-proxy/cri-proxy/ops/swap"
)

// Bounds of a request; far above what a pod can have.
const (
	maxContainers  = 64
	maxHookArgs    = 256
	maxHookBytes   = 64 << 10
	maxGraceSecond = 24 * 60 * 60
	maxMinReady    = 60 * 60
	maxRequest     = 256 << 10 // finished operations are kept with theirs
	maxPrepare     = 31 * 24 * time.Hour
	maxHold        = 24 * time.Hour
	maxImage       = 1024
	maxCredentials = 256

	// maxEnvironment bounds the environment of one container, in bytes: Linux bounds the
	// environment and the command line of a process together to a quarter of its stack limit, which
	// is 2 MiB by default (execve(2)). Controllers do not send more (controller/environment).
	maxEnvironment = 2 << 20
	// maxEnvironments bounds the environments of one command together. The bounds of messages leave
	// room for them and for the rest of a command (internal/mtls, internal/daemon).
	maxEnvironments = 12 << 20
)

var (
	uidForm  = regexp.MustCompile(`^[A-Za-z0-9._-]{1,128}$`)
	nameForm = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$`)
)

// validateRestart checks the request by itself.
func validateRestart(req *opsv1.RestartRequest, remote bool) error {
	invalid := func(format string, args ...any) error {
		return status.Errorf(codes.InvalidArgument, format, args...)
	}
	switch {
	case !uidForm.MatchString(req.GetUid()):
		return invalid("uid must be 1 to 128 characters of [A-Za-z0-9._-], not %.140q", req.GetUid())
	case !nameForm.MatchString(req.GetPod().GetNamespace()) || !nameForm.MatchString(req.GetPod().GetName()):
		return invalid("pod.namespace and pod.name must be Kubernetes names, not %.260q and %.260q",
			req.GetPod().GetNamespace(), req.GetPod().GetName())
	case remote && req.GetPod().GetUid() == "":
		return invalid("pod.uid is required, so that a pod of the same name that came later is never meant")
	case len(req.GetPod().GetUid()) > 128:
		return invalid("pod.uid is too long")
	case len(req.GetContainers()) == 0:
		return invalid("containers is empty: name the containers to restart")
	case len(req.GetContainers()) > maxContainers:
		return invalid("%d containers are too many; the most is %d", len(req.GetContainers()), maxContainers)
	case len(req.GetRequester()) > 1024:
		return invalid("requester is too long")
	case len(req.GetCredentials()) > maxCredentials:
		return invalid("%d credentials are too many; the most is %d", len(req.GetCredentials()), maxCredentials)
	case proto.Size(req)-proto.Size(&opsv1.RestartRequest{Credentials: req.GetCredentials()}) > maxRequest:
		return invalid("the request is larger than %d bytes: the journal keeps it", maxRequest)
	}
	seen := map[string]bool{}
	for _, c := range req.GetContainers() {
		name, probes := c.GetName(), c.GetHoldProbes()
		switch {
		case !nameForm.MatchString(name):
			return invalid("container name %.260q is not a Kubernetes name", name)
		case seen[name]:
			return invalid("container %q is named twice", name)
		case c.GracePeriodSeconds != nil && (c.GetGracePeriodSeconds() < 0 ||
			c.GetGracePeriodSeconds() > maxGraceSecond):
			return invalid("container %q: grace_period_seconds must be between 0 and %d", name, maxGraceSecond)
		case opsv1.Order_name[int32(c.GetOrder())] == "":
			return invalid("container %q: unknown order %d", name, c.GetOrder())
		case c.GetMinReadySeconds() < 0 || c.GetMinReadySeconds() > maxMinReady:
			return invalid("container %q: min_ready_seconds must be between 0 and %d", name, maxMinReady)
		case c.GetMinReadySeconds() != 0 && c.GetOrder() != opsv1.Order_ORDER_START_FIRST:
			return invalid("container %q: min_ready_seconds is for ORDER_START_FIRST only", name)
		case probes != nil &&
			(!probes.IsValid() || probes.AsDuration() < 0 || probes.AsDuration() > swap.MaxHoldProbes):
			return invalid("container %q: hold_probes must be between 0 and %s", name, swap.MaxHoldProbes)
		case len(c.GetExpectedContainerId()) > 256:
			return invalid("container %q: expected_container_id is too long", name)
		case len(c.GetImage()) > maxImage:
			return invalid("container %q: image is longer than %d bytes", name, maxImage)
		case c.GetImage() != "" && c.GetRevertImage():
			return invalid("container %q: image and revert_image exclude each other", name)
		case opsv1.PullPolicy_name[int32(c.GetPullPolicy())] == "":
			return invalid("container %q: unknown pull policy %d", name, c.GetPullPolicy())
		}
		seen[name] = true
		for field, h := range map[string]*opsv1.Hook{"pre_stop": c.GetPreStop(), "post_start": c.GetPostStart()} {
			if err := validateHook(h); err != nil {
				return invalid("container %q: %s: %v", name, field, err)
			}
		}
	}
	return nil
}

func validateHook(h *opsv1.Hook) error {
	if h == nil {
		return nil
	}
	if proto.Size(h) > maxHookBytes {
		return errors.New("the hook is too large")
	}
	switch a := h.GetAction().(type) {
	case *opsv1.Hook_Exec:
		if n := len(a.Exec.GetCommand()); n == 0 || n > maxHookArgs {
			return errors.New("exec.command must have between 1 and 256 words")
		}
	case *opsv1.Hook_HttpGet:
		if p := a.HttpGet.GetPort(); p < 1 || p > 65535 {
			return errors.New("http_get.port must be between 1 and 65535 (named ports are resolved by the caller)")
		}
		switch a.HttpGet.GetScheme() {
		case "", "HTTP", "HTTPS", "http", "https":
		default:
			return errors.New("http_get.scheme must be HTTP or HTTPS")
		}
	case *opsv1.Hook_Sleep:
		if s := a.Sleep.GetSeconds(); s < 0 || s > maxGraceSecond {
			return errors.New("sleep.seconds is out of range")
		}
	default:
		return errors.New("the hook has no action (exec, http_get, sleep)")
	}
	return nil
}

// validateUpgrade checks what validateRestart has not checked.
func validateUpgrade(req *opsv1.PrepareUpgradeRequest) error {
	invalid := func(format string, args ...any) error {
		return status.Errorf(codes.InvalidArgument, format, args...)
	}
	for _, c := range req.GetContainers() {
		switch {
		case c.GetImage() == "":
			return invalid("container %q: image is empty: give it as it will be in the pod's spec", c.GetName())
		case len(c.GetImage()) > maxImage:
			return invalid("container %q: image is longer than %d bytes", c.GetName(), maxImage)
		case opsv1.PullPolicy_name[int32(c.GetPullPolicy())] == "":
			return invalid("container %q: unknown pull policy %d", c.GetName(), c.GetPullPolicy())
		}
	}
	bound := func(name string, d interface{ AsDuration() time.Duration }, most time.Duration) error {
		if v := d.AsDuration(); v < 0 || v > most {
			return invalid("%s must be between 0 and %s", name, most)
		}
		return nil
	}
	for _, err := range []error{
		bound("pin_for", req.GetPinFor(), maxPrepare),
		bound("prepare_timeout", req.GetPrepareTimeout(), maxPrepare),
		bound("hold_timeout", req.GetHoldTimeout(), maxHold),
	} {
		if err != nil {
			return err
		}
	}
	switch {
	case len(req.GetCredentials()) > maxCredentials:
		return invalid("%d credentials are too many; the most is %d", len(req.GetCredentials()), maxCredentials)
	case len(req.GetOwner()) > 1024:
		return invalid("owner is too long")
	case proto.Size(req)-proto.Size(&opsv1.PrepareUpgradeRequest{Credentials: req.GetCredentials()}) > maxRequest:
		return invalid("the request is larger than %d bytes: the journal keeps it", maxRequest)
	}
	return nil
}

// validateCommit checks the request beside its upgrade.
func validateCommit(req *opsv1.CommitUpgradeRequest, o *operation.Operation) error {
	given := operation.Environments{}
	for _, c := range req.GetEnvironments() {
		named := func(r *opsv1.ContainerRestart) bool { return r.GetName() == c.GetName() }
		if !slices.ContainsFunc(o.Request().GetContainers(), named) {
			return status.Errorf(codes.InvalidArgument, "upgrade %s has no container %.260q", req.GetUid(), c.GetName())
		}
		add(given, c.GetName(), c.GetEnvironment())
	}
	if len(req.GetCredentials()) > maxCredentials {
		return status.Errorf(codes.InvalidArgument, "%d credentials are too many; the most is %d",
			len(req.GetCredentials()), maxCredentials)
	}
	return validateEnvironments(given)
}

// validateEnvironments checks the sizes of environments.
func validateEnvironments(given operation.Environments) error {
	sum := 0
	for name, env := range given {
		n := proto.Size(env)
		if n > maxEnvironment {
			return status.Errorf(codes.InvalidArgument,
				"the environment of container %s has %d bytes, more than a process can be started with (%d)",
				name, n, maxEnvironment)
		}
		sum += n
	}
	if sum > maxEnvironments {
		return status.Errorf(codes.InvalidArgument,
			"the environments have %d bytes, more than one command may bring (%d)", sum, maxEnvironments)
	}
	return nil
}
