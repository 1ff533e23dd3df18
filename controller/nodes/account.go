// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"strings"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// PostStartFailed says that the node stopped the new container because its postStart hook failed.
func PostStartFailed(c *opsv1.ContainerOperation) bool {
	return c.GetReason() == opsv1.ReasonPostStartHookFailed
}

// Account returns the node's account of an operation on a container, fit for a status and for
// Events. It leaves out what a hook printed, as kubelet does (kuberuntime_container.go): the output
// may hold secrets, and more people read Events than logs.
func Account(c *opsv1.ContainerOperation) string {
	if PostStartFailed(c) {
		return "the postStart hook failed and the new container was stopped; " +
			"what the hook printed is in the log of cri-proxy on the node"
	}
	return c.GetMessage()
}

// Warnings returns the warnings of an operation on a container, fit for Events. hook says that a
// preStop hook failed; its output is left out. Nodes of the version before say so by the warning
// alone.
func Warnings(c *opsv1.ContainerOperation) (hook bool, others []string) {
	hook = c.GetPreStopFailed()
	for _, w := range c.GetWarnings() {
		if strings.HasPrefix(w, "preStop") {
			hook = true
		} else {
			others = append(others, w)
		}
	}
	return hook, others
}
