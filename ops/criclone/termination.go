// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package criclone

import (
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// terminationFileName has kubelet's form: eight hexadecimal digits.
func terminationFileName(token string) string { return token[:8] }

// terminationMount returns kubelet's mount of the termination message file, or nil.
//
// The pod may mount a volume at the same place. Kubelet appends its own mount to those of the pod
// (kuberuntime_container.go makeMounts), and its file is in the container's directory,
// <root>/pods/<uid>/containers/<name> (kubelet_getters.go getPodContainerDir). CRI does not tell
// the root, which is kubelet's --root-dir.
func terminationMount(c *runtimeapi.ContainerConfig) *runtimeapi.Mount {
	at := c.GetAnnotations()[AnnotationTerminationPath]
	uid, name := c.GetLabels()[LabelPodUID], c.GetLabels()[LabelContainer]
	if at == "" || uid == "" || name == "" {
		return nil
	}
	if !path.IsAbs(at) {
		at = "/" + at // pkg/volume/util MakeAbsolutePath
	}
	dir := path.Join("/pods", uid, "containers", name)
	for _, m := range slices.Backward(c.GetMounts()) {
		if m.GetContainerPath() == at && strings.HasSuffix(path.Dir(m.GetHostPath()), dir) {
			return m
		}
	}
	return nil
}

// MakeTerminationFile creates the termination message file of a clone as kubelet does: empty and
// writable for everybody (kuberuntime_container.go makeMounts). It follows no link, so that the
// file is in kubelet's directory.
func MakeTerminationFile(c *runtimeapi.ContainerConfig) error {
	m := terminationMount(c)
	if m == nil {
		return nil
	}
	if err := makeFileIn(path.Split(m.GetHostPath())); err != nil {
		return fmt.Errorf("termination message file: %w", err)
	}
	return nil
}

// makeFileIn creates an empty file that everybody may write, or empties the one that is there.
func makeFileIn(dir, name string) error {
	in, err := unix.Open(path.Clean(dir), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer func() { _ = unix.Close(in) }()
	// O_NONBLOCK: if the file is a FIFO, do not wait for a reader.
	const flags = unix.O_CREAT | unix.O_WRONLY | unix.O_TRUNC | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC
	fd, err := unix.Openat(in, name, flags, 0o666)
	if err != nil {
		return &os.PathError{Op: "open", Path: path.Join(dir, name), Err: err}
	}
	f := os.NewFile(uintptr(fd), path.Join(dir, name))
	// The umask may have cleared bits of the mode.
	return errors.Join(f.Chmod(0o666), f.Close())
}
