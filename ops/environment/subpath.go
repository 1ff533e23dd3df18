// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package environment

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// SubPath is a part of a volume.
type SubPath struct {
	Volume, Path string
	// Dir is where the volume is, if it is of type hostPath.
	Dir string
	// Persistent is the name of the PersistentVolume behind the volume, if there is one.
	Persistent string
	// Expanded says that the path has variables in it, and so may be another one than before.
	Expanded bool
}

// Parts are the mounts of a container, by container path, that name a path in a volume which
// containers can write, with the directory of that volume. Somebody may have led the path out of
// the volume by the time that the runtime mounts it: see [Parts.Check].
type Parts map[string]string

// PartsAnnotation is on a container that has some: what is made of its config later must not take
// the paths for kubelet's.
const PartsAnnotation = "cri-proxy.io/parts"

// PartsOf reads the annotation. One that is no such list has none.
func PartsOf(annotations map[string]string) Parts {
	parts := Parts{}
	if err := json.Unmarshal([]byte(annotations[PartsAnnotation]), &parts); err != nil {
		return Parts{}
	}
	return parts
}

// Note puts the parts into the config's annotations, in place of those that its predecessor had.
func (p Parts) Note(c *runtimeapi.ContainerConfig) error {
	delete(c.GetAnnotations(), PartsAnnotation)
	if len(p) == 0 {
		return nil
	}
	text, err := json.Marshal(p)
	if err != nil {
		return err
	}
	if c.Annotations == nil {
		c.Annotations = map[string]string{}
	}
	c.Annotations[PartsAnnotation] = string(text)
	return nil
}

// subPathsDir is where, below the pod's directory, kubelet binds the parts of volumes, as
// VOLUME/CONTAINER/INDEX (pkg/volume/util/subpath).
const subPathsDir = "volume-subpaths"

// A volume of a CSI driver is in a directory of that name (pkg/volume/csi/csi_mounter.go GetPath).
const (
	csiPlugin = "kubernetes.io~csi"
	csiMount  = "mount"
)

// published are the plugins whose volumes kubelet alone writes, and containers only read
// (pkg/volume/util/atomic_writer.go). What they show moves to a new directory at each change, and
// the old one is removed.
var published = []string{ //nolint:gochecknoglobals // a constant
	"kubernetes.io~configmap", "kubernetes.io~secret", "kubernetes.io~projected", "kubernetes.io~downward-api",
}

// Refresh makes mounts with a subPath show what the volume has now, as kubelet does at each start.
// paths are the parts of volumes by container path; a mount of which it says nothing keeps its
// part.
//
// A volume that kubelet alone writes is mounted from where its file is, and so is a part of an
// emptyDir or a hostPath or any other volume that was replaced since kubelet bound it, which is
// told. Where a volume cannot be found, what kubelet has bound stays, and the restart is refused if
// that is known to be gone. What a restart before has mounted from a volume stays one of the parts:
// see [PartsAnnotation].
func Refresh(c *runtimeapi.ContainerConfig, podDir string, paths map[string]SubPath) (Parts, error) {
	had, parts := PartsOf(c.GetAnnotations()), Parts{}
	for _, m := range c.GetMounts() {
		path, before := m.GetContainerPath(), m.GetHostPath()
		if isKubelets(before, podDir) {
			continue // a volume may be mounted at the same place
		}
		part, ok := paths[path]
		if !ok {
			part, ok = partOf(before, podDir)
		}
		dir := ""
		switch {
		case !ok || podDir == "":
		case m.GetImage().GetImage() != "":
			m.ImageSubPath = part.Path
			continue
		default:
			var err error
			if dir, err = refresh(m, podDir, part); err != nil {
				return nil, fmt.Errorf("failed to prepare subPath for volumeMount %q (%s): %w", part.Volume, path, err)
			}
		}
		if isBound(m.GetHostPath(), podDir) {
			continue
		}
		if dir == "" && m.GetHostPath() == before {
			if dir = had[path]; dir == "" {
				dir = volumeOf(before, podDir)
			}
		}
		if dir != "" {
			parts[path] = dir
		}
	}
	return parts, nil
}

// below returns what of a path is below the pod's directory. That is found by its end: the way
// there may be another one through symlinks.
func below(path, podDir string) (rest string, ok bool) {
	if podDir == "" {
		return "", false
	}
	_, rest, ok = strings.Cut(path, "/pods/"+filepath.Base(podDir)+"/")
	return rest, ok
}

// isKubelets says that a mount is kubelet's own: the termination message file, or /etc/hosts.
func isKubelets(path, podDir string) bool {
	rest, ok := below(path, podDir)
	return ok && (strings.HasPrefix(rest, "containers/") || rest == "etc-hosts")
}

// isBound says that kubelet has bound there a part of a volume, which nobody can change.
func isBound(path, podDir string) bool {
	rest, ok := below(path, podDir)
	return ok && strings.HasPrefix(rest, subPathsDir+"/")
}

// volumeOf returns the directory of a volume that containers can write, of which a path in the
// pod's directory is a part; kubelet itself mounts such a volume as a whole, or binds its parts
// elsewhere.
func volumeOf(path, podDir string) string {
	rest, ok := below(path, podDir)
	words := strings.Split(rest, "/")
	if !ok || words[0] != "volumes" || len(words) < 4 || slices.Contains(published, words[1]) {
		return ""
	}
	whole := 3
	if words[1] == csiPlugin && words[3] == csiMount {
		whole = 4
	}
	if len(words) == whole {
		return ""
	}
	return strings.TrimSuffix(path, "/"+strings.Join(words[whole:], "/"))
}

// refresh returns the directory of the volume if containers can write it and it is known.
func refresh(m *runtimeapi.Mount, podDir string, part SubPath) (string, error) {
	for _, plugin := range published {
		volume := filepath.Join(podDir, "volumes", plugin, part.Volume)
		if _, err := os.Stat(volume); err == nil {
			return "", take(m, volume, part.Path)
		}
	}
	if volume := part.dir(podDir); volume != "" {
		return volume, take(m, volume, part.Path)
	}
	const advice = "only kubelet can mount another part of this volume: delete the pod, or let its process end"
	bound, err := os.Lstat(m.GetHostPath())
	if err != nil {
		return "", fmt.Errorf("what was mounted cannot be found (%w), and %s", err, advice)
	}
	if st, ok := bound.Sys().(*syscall.Stat_t); ok && st.Nlink == 0 {
		return "", fmt.Errorf("%s was removed since it was mounted, and %s", part.Path, advice)
	}
	if root := rootOf(m.GetHostPath()); part.Expanded && root != "" &&
		!strings.HasSuffix(root, "/"+filepath.Clean(part.Path)) {
		return "", fmt.Errorf("%s is not what is mounted there, and %s", part.Path, advice)
	}
	return "", nil
}

// dir finds where kubelet has mounted the volume: in a directory of its plugin, by the name of the
// volume in the pod or of its PersistentVolume (kubelet_getters.go getPodVolumeDir). Empty: it
// cannot be told.
func (s SubPath) dir(podDir string) string {
	if s.Dir != "" {
		return s.Dir
	}
	for _, name := range []string{s.Persistent, s.Volume} {
		found, err := filepath.Glob(filepath.Join(podDir, "volumes", "*", name))
		if name == "" || err != nil || len(found) != 1 {
			continue
		}
		if plugin := filepath.Base(filepath.Dir(found[0])); plugin == csiPlugin {
			return filepath.Join(found[0], csiMount)
		}
		return found[0]
	}
	return ""
}

// take has the mount show what the volume has there now. If it has nothing there it gets a
// directory, as from kubelet (kubelet_pods.go makeMounts).
func take(m *runtimeapi.Mount, volume, path string) error {
	real, err := filepath.EvalSymlinks(volume)
	if err != nil {
		return err
	}
	now, err := resolve(real, path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := makeDir(real, path); err != nil {
			return fmt.Errorf("failed to create subPath directory: %w", err)
		}
		now, err = resolve(real, path)
	}
	if err == nil && !SameFile(m.GetHostPath(), now) {
		m.HostPath = now
	}
	return err
}

// makeDir makes the directories of a path below dir that do not exist, with the mode of dir
// (pkg/volume/util/subpath doSafeMakeDir).
func makeDir(dir, path string) error {
	var of unix.Stat_t
	if err := unix.Stat(dir, &of); err != nil {
		return &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	words := strings.Split(filepath.Clean(path), "/")
	for i := range words {
		parent, err := openWithin(dir, filepath.Join(append([]string{"."}, words[:i]...)...),
			unix.O_PATH|unix.O_DIRECTORY, unix.RESOLVE_BENEATH)
		if err != nil {
			return err
		}
		err = makeIn(parent, words[i], of.Mode&0o7777)
		unix.Close(parent)
		if err != nil {
			return &os.PathError{Op: "mkdir", Path: filepath.Join(words[:i+1]...), Err: err}
		}
	}
	return nil
}

// makeIn makes a directory, unless there is one. What somebody puts in its place meanwhile is left
// alone.
func makeIn(parent int, name string, mode uint32) error {
	switch err := unix.Mkdirat(parent, name, 0o700); {
	case errors.Is(err, unix.EEXIST):
		return nil
	case err != nil:
		return err
	}
	fd, err := unix.Openat(parent, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Fchmod(fd, mode) // the umask may have taken bits away, and mkdir knows no setgid
}

// Check finds out whether what the process has mounted is in the volumes: it must be called before
// anything of the container runs. mounts are those that the container was made with.
func (p Parts) Check(mounts []*runtimeapi.Mount, pid int) error {
	for _, m := range mounts {
		dir, ok := p[m.GetContainerPath()]
		if !ok {
			continue
		}
		real, err := filepath.EvalSymlinks(dir)
		if err != nil {
			return err
		}
		path, err := filepath.Rel(real, m.GetHostPath())
		if err != nil {
			return err
		}
		want, err := identity(real, path, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
		if err != nil {
			return err
		}
		got, err := identity(fmt.Sprintf("/proc/%d/root", pid), m.GetContainerPath(), unix.RESOLVE_IN_ROOT)
		if err != nil {
			return err
		}
		if want != got {
			return fmt.Errorf("what is mounted at %s is not what its volume has: somebody has changed it meanwhile",
				m.GetContainerPath())
		}
	}
	return nil
}

// file tells a file from all others.
type file struct{ dev, ino uint64 }

func identity(dir, path string, resolve uint64) (file, error) {
	fd, err := openWithin(dir, path, unix.O_PATH, resolve)
	if err != nil {
		return file{}, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return file{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return file{dev: st.Dev, ino: st.Ino}, nil
}

// resolve returns where the path below dir really is, below dir too. A symlink may be absolute, as
// for kubelet (doBindSubPath), if it leads back there.
func resolve(dir, path string) (string, error) {
	fd, err := openWithin(dir, path, unix.O_PATH, unix.RESOLVE_BENEATH)
	if errors.Is(err, unix.EXDEV) {
		real, lerr := filepath.EvalSymlinks(filepath.Join(dir, path))
		if lerr != nil {
			return "", lerr
		}
		within, ok := strings.CutPrefix(real, strings.TrimSuffix(dir, "/")+"/")
		if !ok {
			return "", err
		}
		fd, err = openWithin(dir, within, unix.O_PATH, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
	}
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
// given it, or else from what the kernel says is bound there. false: it is no part, or nothing
// tells.
func partOf(path, podDir string) (SubPath, bool) {
	rest, ok := below(path, podDir)
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

// timeless takes off a path in a published volume the directory of its moment,
// /..2006_01_02_15_04_05.N.
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
//
//nolint:gochecknoglobals // a constant
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
