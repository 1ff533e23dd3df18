// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package environment

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// SubPath is a part of a volume.
type SubPath struct {
	Volume, Path string
	// Expanded says that the path has variables in it, and so may be another one than before.
	Expanded bool
}

// subPathsDir is where, below the pod's directory, kubelet binds the parts of volumes, as
// VOLUME/CONTAINER/INDEX (pkg/volume/util/subpath).
const subPathsDir = "volume-subpaths"

// published are the plugins whose volumes kubelet alone writes, and containers only read
// (pkg/volume/util/atomic_writer.go). What they show moves to a new directory at each change, and the old
// one is removed.
var published = []string{ //nolint:gochecknoglobals // a constant
	"kubernetes.io~configmap", "kubernetes.io~secret", "kubernetes.io~projected", "kubernetes.io~downward-api",
}

// Refresh makes mounts with a subPath show what the volume has now, as kubelet does at each start. paths
// are the parts of volumes by container path; a mount of which it says nothing keeps its part.
//
// A volume that kubelet alone writes is mounted from where its file is. Parts of other volumes stay bound as
// kubelet has bound them, because a container could lead a path of its own volume out of it; if such a part
// was removed or replaced the restart is refused.
func Refresh(c *runtimeapi.ContainerConfig, podDir string, paths map[string]SubPath) error {
	if podDir == "" {
		return nil
	}
	for _, m := range c.GetMounts() {
		part, ok := paths[m.GetContainerPath()]
		if !ok {
			if part, ok = partOf(m.GetHostPath(), podDir); !ok {
				continue
			}
		}
		if m.GetImage().GetImage() != "" {
			m.ImageSubPath = part.Path
			continue
		}
		if err := refresh(m, podDir, part); err != nil {
			return fmt.Errorf("failed to prepare subPath for volumeMount %q (%s): %w",
				part.Volume, m.GetContainerPath(), err)
		}
	}
	return nil
}

func refresh(m *runtimeapi.Mount, podDir string, part SubPath) error {
	for _, plugin := range published {
		volume := filepath.Join(podDir, "volumes", plugin, part.Volume)
		if _, err := os.Stat(volume); err != nil {
			continue
		}
		now, err := resolve(volume, part.Path, 0)
		if os.IsNotExist(err) {
			return fmt.Errorf("the volume has no %s any more", part.Path)
		}
		if err != nil {
			return err
		}
		if !SameFile(m.GetHostPath(), now) {
			m.HostPath = now
		}
		return nil
	}
	// kubelet would bind what the volume has there now.
	bound, err := os.Lstat(m.GetHostPath())
	if err != nil {
		return fmt.Errorf("what was mounted cannot be found: %w; delete the pod, or let its process end", err)
	}
	volume := filepath.Join(podDir, "volumes", "kubernetes.io~empty-dir", part.Volume)
	if _, err := os.Stat(volume); err == nil {
		now, err := resolve(volume, part.Path, unix.RESOLVE_NO_SYMLINKS)
		if err != nil {
			return fmt.Errorf("%w: what was mounted is not there any more, and only kubelet can mount another "+
				"part safely: delete the pod, or let its process end", err)
		}
		if !SameFile(m.GetHostPath(), now) {
			return fmt.Errorf("%s was replaced since it was mounted, and only kubelet can mount the new one "+
				"safely: delete the pod, or let its process end", part.Path)
		}
		return nil
	}
	if root := rootOf(m.GetHostPath()); part.Expanded && root != "" && !strings.HasSuffix(root, "/"+filepath.Clean(part.Path)) {
		return fmt.Errorf("%s is not what is mounted there, and only kubelet can mount another part safely: delete "+
			"the pod, or let its process end", part.Path)
	}
	if st, ok := bound.Sys().(*syscall.Stat_t); ok && st.Nlink == 0 {
		return fmt.Errorf("%s was removed since it was mounted, and only kubelet can mount another one safely: "+
			"delete the pod, or let its process end", part.Path)
	}
	return nil
}

// resolve returns where the path below dir really is, below dir too.
func resolve(dir, path string, flags uint64) (string, error) {
	fd, err := openWithin(dir, path, unix.O_PATH, unix.RESOLVE_BENEATH|flags)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	return os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
}

// SameFile says whether two paths lead to the same file.
func SameFile(a, b string) bool {
	s, err := os.Stat(a)
	if err != nil {
		return false
	}
	t, err := os.Stat(b)
	return err == nil && os.SameFile(s, t)
}

// partOf finds out of which part of a volume a mount is: from the path of a file that Refresh has
// given it, or else from what the kernel says is bound there. false: it is no part, or nothing tells.
func partOf(path, podDir string) (SubPath, bool) {
	rest, ok := strings.CutPrefix(path, podDir+"/")
	if !ok {
		return SubPath{}, false
	}
	words := strings.Split(rest, "/")
	switch {
	case len(words) == 4 && words[0] == subPathsDir:
		root := rootOf(path)
		for _, plugin := range published {
			// In a file system of its own, as that of a Secret, the volume is at the root.
			if i := strings.Index(root, "/"+plugin+"/"+words[1]+"/"); i >= 0 {
				root = root[i+len(plugin)+len(words[1])+2:]
				break
			}
		}
		part, ok := timeless(root)
		return SubPath{Volume: words[1], Path: part}, ok
	case len(words) > 4 && words[0] == "volumes":
		part, ok := timeless("/" + strings.Join(words[3:], "/"))
		return SubPath{Volume: words[2], Path: part}, ok
	}
	return SubPath{}, false
}

// timeless takes off a path in a published volume the directory of its moment, /..2006_01_02_15_04_05.N.
func timeless(path string) (string, bool) {
	path = strings.TrimSuffix(path, "//deleted")
	moment, part, ok := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	return part, ok && strings.HasPrefix(moment, "..") && part != ""
}

// rootOf returns what of its file system is mounted at the path, as /proc/self/mountinfo has it
// (proc_pid_mountinfo(5), the fourth field): the last mount there counts. Empty: nothing is.
func rootOf(path string) string {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	root := ""
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 4 && unescape.Replace(f[4]) == path {
			root = unescape.Replace(f[3])
		}
	}
	return root
}

// unescape undoes what the kernel does to spaces and the like in paths.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`) //nolint:gochecknoglobals // a constant
