// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package criclone

import "fmt"

// maxFileName is the longest name that common file systems take.
const maxFileName = 255

// LogLinkName returns the name of the symlink for log shippers, as kubelet's logSymlink
// (pkg/kubelet/kuberuntime/legacy.go), which cuts long names.
func LogLinkName(pod, namespace, container, id string) string {
	const suffix = ".log"
	name := fmt.Sprintf("%s_%s_%s-%s", pod, namespace, container, id)
	return name[:min(len(name), maxFileName-len(suffix))] + suffix
}
