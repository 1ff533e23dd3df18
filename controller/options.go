// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package controller

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/cri-proxy/cri-proxy/controller/authority"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
	"github.com/cri-proxy/cri-proxy/controller/nodes"
)

// LeaseName is the Lease that decides which replica works; deploy/rbac grants it.
const LeaseName = "cri-controller"

// Values of [Options].Identity.
const (
	// IdentityCSR makes the controller the authority of the nodes' certificates and of its own.
	IdentityCSR = "csr"
	// IdentityFiles takes the controller's certificate from files.
	IdentityFiles = "files"
)

// Options say how to run the controller. The errors of [Options.Complete] name the flags that set
// them.
type Options struct {
	// NodePort is the TCP port of the nodes' command interface.
	NodePort int
	// Identity is [IdentityCSR] or [IdentityFiles]. Empty means files if Files has any, else csr.
	Identity string
	// Namespace is where the authority keeps its CA. Empty means the pod's own.
	Namespace string
	// Lives say how long the authority's certificates are valid.
	Lives authority.Settings
	// Files are the controller's identity with [IdentityFiles].
	Files nodes.Files
	// MetricsAddress and ProbeAddress are where metrics and health probes are served; "0" is
	// nowhere.
	MetricsAddress, ProbeAddress string
	// LeaderElect says to work only while holding the Lease.
	LeaderElect     bool
	LeaderNamespace string
	// Workers is how many requests to work on at the same time.
	Workers int
	// NodeConditionPeriod is how often to ask a node whether kubelet bypasses its cri-proxy.
	NodeConditionPeriod time.Duration
	// Pins bound what image jobs keep on nodes.
	Pins spec.Limits
	// OpenKruisePeriod is how often to look for OpenKruise in the cluster.
	OpenKruisePeriod time.Duration
	Webhooks         WebhookOptions
}

// Complete checks the options, and fills in what they leave out.
func (o *Options) Complete() error {
	switch {
	case o.Workers < 1:
		return fmt.Errorf("--workers must be at least 1, not %d", o.Workers)
	case o.Pins.PinFor < 0:
		return fmt.Errorf("--image-pin-max must not be negative, but 0 or a duration such as 168h, not %s",
			o.Pins.PinFor)
	case o.Pins.PinPercent < 0 || o.Pins.PinPercent > 100:
		return fmt.Errorf("--image-pin-percent must be between 0, which is no bound, and 100, not %d",
			o.Pins.PinPercent)
	case o.NodeConditionPeriod < time.Second:
		return fmt.Errorf("--node-condition-period must be at least 1s, not %s", o.NodeConditionPeriod)
	case o.OpenKruisePeriod < time.Second:
		return fmt.Errorf("--openkruise-period must be at least 1s, not %s", o.OpenKruisePeriod)
	case o.NodePort < 1 || o.NodePort > 65535:
		return fmt.Errorf("--node-port must be between 1 and 65535, not %d", o.NodePort)
	}
	if err := o.completeIdentity(); err != nil {
		return err
	}
	return o.Webhooks.complete()
}

// completeIdentity decides between csr and files.
func (o *Options) completeIdentity() error {
	files := o.Files != nodes.Files{}
	if o.Identity == "" {
		o.Identity = IdentityCSR
		if files {
			o.Identity = IdentityFiles
		}
	}
	switch {
	case o.Identity != IdentityCSR && o.Identity != IdentityFiles:
		return fmt.Errorf("--identity must be csr or files, not %q", o.Identity)
	case o.Identity == IdentityFiles && (o.Files.Cert == "" || o.Files.Key == "" || o.Files.CA == ""):
		return errors.New("--tls-cert-file, --tls-key-file and --tls-ca-file are all needed with --identity=files: " +
			"nodes take commands over mutual TLS only")
	case o.Identity == IdentityCSR && files:
		return errors.New("--tls-cert-file, --tls-key-file and --tls-ca-file have no effect with --identity=csr; " +
			"remove them, or give --identity=files")
	case o.Identity == IdentityCSR:
		return o.Lives.Validate()
	}
	return nil
}

// namespaceFile has the namespace of a pod's ServiceAccount.
const namespaceFile = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"

// PodNamespace returns the namespace of the pod that this process runs in. The error says that
// there is no pod.
func PodNamespace() (string, error) {
	text, err := os.ReadFile(namespaceFile)
	return strings.TrimSpace(string(text)), err
}
