// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package swap

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/ops/criclone"
)

// LogLink makes the symlink that kubelet makes when it starts a container, and only
// then (pkg/kubelet/kuberuntime/legacy.go): log shippers follow it.
func (v *Revealer) LogLink(ctx context.Context, id string) {
	err := func() error {
		if _, err := os.Stat(v.c.Node.LogLinks); errors.Is(err, fs.ErrNotExist) {
			return nil // nobody looks there
		}
		st, err := v.c.Node.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
		if err != nil || st.GetStatus().GetLogPath() == "" {
			return err
		}
		pod := v.c.Op.Pod()
		err = os.Symlink(st.GetStatus().GetLogPath(),
			filepath.Join(v.c.Node.LogLinks,
				criclone.LogLinkName(pod.GetName(), pod.GetNamespace(), v.c.Spec.GetName(), id)))
		if errors.Is(err, fs.ErrExist) {
			return nil
		}
		return err
	}()
	if err != nil && ctx.Err() == nil {
		v.c.Warn("log symlink: %v", err)
	}
}
