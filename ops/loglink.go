// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxFileName is what common file systems take.
const maxFileName = 255

// logLink makes the symlink that kubelet makes when it starts a container, and only
// then (pkg/kubelet/kuberuntime/legacy.go): log shippers follow it.
func (r *restart) logLink(ctx context.Context, id string) {
	err := func() error {
		if _, err := os.Stat(r.legacyLog); errors.Is(err, fs.ErrNotExist) {
			return nil // nobody looks there
		}
		st, err := r.rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
		if err != nil || st.GetStatus().GetLogPath() == "" {
			return err
		}
		pod := r.o.Pod()
		err = os.Symlink(st.GetStatus().GetLogPath(), filepath.Join(r.legacyLog, logLinkName(pod.GetName(), pod.GetNamespace(), r.want.GetName(), id)))
		if errors.Is(err, fs.ErrExist) {
			return nil
		}
		return err
	}()
	if err != nil && ctx.Err() == nil {
		r.warn("log symlink: %v", err)
	}
}

// logLinkName is kubelet's logSymlink (legacy.go), which cuts long names.
func logLinkName(pod, namespace, container, id string) string {
	const suffix = ".log"
	name := fmt.Sprintf("%s_%s_%s-%s", pod, namespace, container, id)
	return name[:min(len(name), maxFileName-len(suffix))] + suffix
}
