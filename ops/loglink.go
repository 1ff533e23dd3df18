// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/ops/criclone"
)

// logLink makes the symlink that kubelet makes when it starts a container, and only
// then (pkg/kubelet/kuberuntime/legacy.go): log shippers follow it.
func (v *revealer) logLink(ctx context.Context, id string) {
	err := func() error {
		if _, err := os.Stat(v.c.node.LogLinks); errors.Is(err, fs.ErrNotExist) {
			return nil // nobody looks there
		}
		st, err := v.c.node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
		if err != nil || st.GetStatus().GetLogPath() == "" {
			return err
		}
		pod := v.c.op.Pod()
		err = os.Symlink(st.GetStatus().GetLogPath(),
			filepath.Join(v.c.node.LogLinks,
				criclone.LogLinkName(pod.GetName(), pod.GetNamespace(), v.c.spec.GetName(), id)))
		if errors.Is(err, fs.ErrExist) {
			return nil
		}
		return err
	}()
	if err != nil && ctx.Err() == nil {
		v.c.warn("log symlink: %v", err)
	}
}
