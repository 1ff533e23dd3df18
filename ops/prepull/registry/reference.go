// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"fmt"
	"strings"

	"github.com/distribution/reference"
)

// maxReference is far above what registries take.
const maxReference = 4096

// Normalize returns the full form of an image reference as containerd's CRI plugin makes it: nginx
// is docker.io/library/nginx:latest. A digest wins over a tag beside it.
func Normalize(image string) (reference.Named, error) {
	if len(image) > maxReference {
		return nil, fmt.Errorf("image reference is longer than %d bytes", maxReference)
	}
	named, err := reference.ParseDockerRef(image)
	if err != nil {
		return nil, fmt.Errorf("image %q: %w", image, err)
	}
	return named, nil
}

// HostOf returns the registry's host and the repository's path, such as docker.io and
// library/nginx.
func HostOf(named reference.Named) (host, path string) {
	return reference.Domain(named), strings.TrimSuffix(reference.Path(named), "/")
}
