// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package environment

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// maxFile bounds a file of variables; it is a container's own, in a volume.
const maxFile = 1 << 20

// PodDir returns kubelet's directory of the pod, ROOT/pods/UID, found in the mounts of a container
// of its: those of the termination message file, /etc/hosts and most volumes are below. Empty:
// there is none.
func PodDir(c *runtimeapi.ContainerConfig, uid string) string {
	within, first := "/pods/"+uid+"/", ""
	for _, m := range c.GetMounts() {
		i := strings.Index(m.GetHostPath(), within)
		if uid == "" || i < 0 {
			continue
		}
		dir := m.GetHostPath()[:i+len(within)-1]
		if isKubelets(m.GetHostPath(), dir) {
			return dir // as kubelet has it; of a part it may be where symlinks lead
		}
		if first == "" {
			first = dir
		}
	}
	return first
}

// fromFile reads one variable of a file in an emptyDir volume. It is empty if there is none, which
// is an error unless the variable is optional.
func fromFile(f *opsv1.FileKey, podDir string) (string, error) {
	if podDir == "" {
		return "", fmt.Errorf("failed to get host path for volume %q", f.GetVolume())
	}
	volume := filepath.Join(podDir, "volumes", "kubernetes.io~empty-dir", f.GetVolume())
	fd, err := openWithin(volume, f.GetPath(), unix.O_RDONLY|unix.O_NONBLOCK, unix.RESOLVE_IN_ROOT)
	if err != nil {
		return "", fmt.Errorf("couldn't parse env file: %w", err)
	}
	file := os.NewFile(uintptr(fd), f.GetPath())
	defer file.Close()
	value, err := parse(io.LimitReader(file, maxFile), f.GetKey())
	if err != nil {
		return "", fmt.Errorf("couldn't parse env file: %w", err)
	}
	if value == "" && !f.GetOptional() {
		return "", fmt.Errorf("environment variable key %q not found in file %q", f.GetKey(), f.GetPath())
	}
	return value, nil
}

// openWithin opens a path below dir, and nothing that is not, whatever symlinks somebody puts
// there.
func openWithin(dir, path string, flags, resolve uint64) (int, error) {
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(root)
	for {
		fd, err := unix.Openat2(root, path, &unix.OpenHow{
			Flags: flags | unix.O_CLOEXEC, Resolve: resolve | unix.RESOLVE_NO_MAGICLINKS,
		})
		switch {
		case err == nil:
			return fd, nil
		case errors.Is(err, unix.EAGAIN): // something below was renamed meanwhile (openat2(2))
			continue
		}
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
}

// parse finds a variable in a file of lines NAME='value' (pkg/kubelet/util/env ParseEnv, KEP-3721).
// What is not such a line is an error only if it stands before the variable, as with kubelet.
func parse(r io.Reader, key string) (string, error) {
	lines := bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimLeft(lines.Text(), " \t")
		if line == "" || line[0] == '#' {
			continue
		}
		wrong := func(what string) error {
			return fmt.Errorf("invalid environment variable format at line %d: %s", n, what)
		}
		name, rest, ok := strings.Cut(line, "=")
		switch {
		case !ok:
			return "", wrong("missing '='")
		case strings.TrimRight(name, " \t") == "":
			return "", wrong("empty variable name")
		case strings.TrimRight(name, " \t") != name:
			return "", wrong("whitespace before '=' is not allowed")
		case strings.TrimLeft(rest, " \t") != rest: // as in a shell, the value is empty
			if name == key {
				return "", nil
			}
			continue
		case !strings.HasPrefix(rest, "'"):
			return "", wrong("value must be enclosed in single quotes")
		}
		var value strings.Builder
		for rest = rest[1:]; ; rest = lines.Text() {
			text, after, closed := strings.Cut(rest, "'")
			value.WriteString(text)
			if closed {
				if after = strings.TrimLeft(after, " \t"); after != "" && after[0] != '#' {
					return "", wrong("unexpected content after closing quote")
				}
				break
			}
			value.WriteByte('\n')
			if !lines.Scan() {
				return "", wrong("unclosed single quote")
			}
			n++
		}
		if name == key {
			return value.String(), nil
		}
	}
	return "", lines.Err()
}
