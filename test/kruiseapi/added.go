// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package kruiseapi

import (
	"strings"

	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Added says whether a field of a kind in deploy/crds, as in "spec.containers[].strategy", is one
// that OpenKruise's types do not have. Its clients pass over these in answers; a client that
// decodes strictly must expect them. Image jobs tell more in their status than can be listed here.
func Added(version schema.GroupVersion, kind, field string) bool {
	if kind != "ContainerRecreateRequest" {
		return strings.HasPrefix(field, "status.")
	}
	switch field {
	case "spec.containers[].strategy", "status.observedGeneration":
		return true
	case "status.conditions", "status.containerStatusSnapshot":
		return version == GroupV1alpha1
	}
	return false
}
