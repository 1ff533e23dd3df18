// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// dump is all that the first process of a container was given, as the kernel tells it: "environment
// NAME" to its value, "mount PATH" to how it is mounted, "file PATH" to what is in it, and so on.
type dump map[string]string

// What names the attempt or the moment, and not what was asked for.
var attempt = []struct {
	re *regexp.Regexp
	by string
}{
	{regexp.MustCompile(`[0-9a-f]{64}`), "ID"},                           // the container's, in cgroups
	{regexp.MustCompile(`(/containers/[^/]+/)[0-9a-f]{8}\b`), "${1}LOG"}, // kubelet's file for terminationMessagePath
	{regexp.MustCompile(`(upperdir|workdir)=[^,]*`), "$1=OWN"},           // of the container's own layer
	{regexp.MustCompile(`(shared|master|propagate_from):[0-9]+`), "$1"},  // peer groups are numbered as they come
	{regexp.MustCompile(`//deleted$`), ""},                               // a bind mount outlives its source
}

// kernel are mounts whose content is the kernel's.
var kernel = regexp.MustCompile(`^/(proc|sys|dev/(pts|mqueue|shm))(/|$)|^/dev$`)

// gateMount is the one trace that the gate leaves in a container. kubelet does not ask for it.
const gateMount = "mount /dev/.cri-proxy"

// dumpOf reads what the running container of the pod was given.
func dumpOf(t testing.TB, p *corev1.Pod, name string) dump {
	t.Helper()
	s := container(t, p, name)
	pid := pidOf(t, s)
	proc := filepath.Join("/proc", strconv.Itoa(pid))
	// The runtime tells that a container runs a moment before its own process has become the
	// container's.
	eventually(t, "the entrypoint of "+p.Name+" runs", func() bool {
		exe, err := os.Readlink(filepath.Join(proc, "exe"))
		must(t, err)
		return strings.HasSuffix(exe, "/busybox")
	})
	d := dump{}
	read := func(path string) string {
		b, err := os.ReadFile(filepath.Join(proc, path))
		must(t, err)
		return string(b)
	}
	// Of a name that is there twice the last counts.
	for v := range strings.SplitSeq(strings.TrimSuffix(read("environ"), "\x00"), "\x00") {
		name, value, _ := strings.Cut(v, "=")
		d["environment "+name] = value
	}
	for i, arg := range strings.Split(strings.TrimSuffix(read("cmdline"), "\x00"), "\x00") {
		d[fmt.Sprintf("argument %d", i)] = arg
	}
	cwd, err := os.Readlink(filepath.Join(proc, "cwd"))
	must(t, err)
	d["working directory"] = cwd
	for _, ns := range []string{"net", "ipc", "uts", "user"} {
		link, err := os.Readlink(filepath.Join(proc, "ns", ns))
		must(t, err)
		d["namespace "+ns] = link
	}
	for line := range strings.Lines(read("status")) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		if slices.Contains([]string{"Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb",
			"NoNewPrivs",
			"Seccomp"}, key) {
			d["status "+key] = strings.TrimSpace(value)
		}
	}
	d["limits"] = read("limits")
	d["oom_score_adj"] = strings.TrimSpace(read("oom_score_adj"))
	for _, file := range []string{"memory.limit_in_bytes", "cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.shares",
		"cpuset.cpus",
		"memory.max", "cpu.max", "cpu.weight", "pids.max"} {
		if b, err := os.ReadFile(cgroupFile(t, pid, file)); err == nil {
			d["cgroup "+file] = strings.TrimSpace(string(b))
		}
	}
	d.mounts(t, proc)
	version, err := os.ReadFile(filepath.Join(proc, "root/etc/version"))
	must(t, err)
	d["image"] = fmt.Sprintf("version %s, image ID %s", strings.TrimSpace(string(version)), s.ImageID)
	return d
}

// mounts reads the mounts of a process, and what is in those that the pod has asked for.
func (d dump) mounts(t testing.TB, proc string) {
	t.Helper()
	info, err := os.ReadFile(filepath.Join(proc, "mountinfo"))
	must(t, err)
	for line := range strings.Lines(string(info)) {
		// proc_pid_mountinfo(5): ID parent major:minor root mountpoint options optional... - type
		// source superoptions
		fields := strings.Fields(line)
		root, point, rest := fields[3], fields[4], strings.Join(fields[5:], " ")
		if kernel.MatchString(point) {
			root = "-" // masked files of the kernel's, and cgroups
		}
		key, value := "mount "+point, root+" "+rest
		for _, a := range attempt {
			value = a.re.ReplaceAllString(value, a.by)
		}
		if key == gateMount {
			continue
		}
		for d[key] != "" { // mounted over
			key += " again"
		}
		d[key] = value
		if point != "/" && !kernel.MatchString(point) {
			d.files(t, filepath.Join(proc, "root"), point)
		}
	}
}

// files reads what is below a path of the container.
func (d dump) files(t testing.TB, root, path string) {
	t.Helper()
	must(t, filepath.WalkDir(filepath.Join(root, path), func(file string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // kubelet writes a pod's hosts file anew at each start
		}
		if err != nil {
			return err
		}
		key := "file " + strings.TrimPrefix(file, root)
		st, err := os.Lstat(file)
		if err != nil {
			return err
		}
		what := st.Mode().String()
		if sys, ok := st.Sys().(*syscall.Stat_t); ok {
			what += fmt.Sprintf(" %d:%d", sys.Uid, sys.Gid)
		}
		switch {
		case e.Type() == fs.ModeSymlink:
			link, err := os.Readlink(file)
			if err != nil {
				return err
			}
			what += " to " + link
		case e.Type().IsRegular():
			b, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			if len(b) > 200 {
				what += fmt.Sprintf(" %d bytes, sha256 %x", len(b), sha256.Sum256(b))
			} else {
				what += fmt.Sprintf(" %q", b)
			}
		}
		d[key] = what
		return nil
	}))
}

// difference is what is not equal in two dumps, a line each, for people.
func difference(oneName string, one dump, otherName string, other dump) []string {
	keys := map[string]bool{}
	for _, d := range []dump{one, other} {
		for k := range maps.Keys(d) {
			keys[k] = true
		}
	}
	show := func(d dump, k string) string {
		v, is := d[k]
		if !is {
			return "(none)"
		}
		return fmt.Sprintf("%q", v)
	}
	var out []string
	for _, k := range slices.Sorted(maps.Keys(keys)) {
		if a, b := show(one, k), show(other, k); a != b {
			out = append(out, fmt.Sprintf("%s\n    %-*s %s\n    %-*s %s", k, max(len(oneName), len(otherName)),
				oneName, a,
				max(len(oneName), len(otherName)), otherName, b))
		}
	}
	return out
}

// pidOf is the process ID of a container's first process on this machine.
func pidOf(t testing.TB, s corev1.ContainerStatus) int {
	t.Helper()
	conn, err := bed.DialRuntime()
	must(t, err)
	defer func() { _ = conn.Close() }()
	status, err := runtimeapi.NewRuntimeServiceClient(conn).ContainerStatus(t.Context(),
		&runtimeapi.ContainerStatusRequest{ContainerId: idOf(s), Verbose: true})
	must(t, err)
	var info struct{ PID int }
	must(t, json.Unmarshal([]byte(status.GetInfo()["info"]), &info))
	if info.PID == 0 {
		t.Fatalf("container %s has no process: %v", s.Name, status)
	}
	return info.PID
}

// cgroupFile is a file of the cgroup of a process, in the hierarchy that has it: of v2, or of the
// controller that the file's name begins with.
func cgroupFile(t testing.TB, pid int, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cgroup"))
	must(t, err)
	controller, _, _ := strings.Cut(name, ".")
	unified := ""
	for line := range strings.Lines(string(b)) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3) // ID:controllers:path
		if slices.Contains(strings.Split(fields[1], ","), controller) {
			return filepath.Join("/sys/fs/cgroup", controller, fields[2], name)
		}
		if fields[1] == "" {
			unified = filepath.Join("/sys/fs/cgroup", fields[2], name)
		}
	}
	return unified
}

// podCgroupFile is cgroupFile of the pod that the process belongs to.
func podCgroupFile(t testing.TB, pid int, name string) string {
	t.Helper()
	file := cgroupFile(t, pid, name)
	return filepath.Join(filepath.Dir(filepath.Dir(file)), name)
}

// number reads a file with one number.
func number(t testing.TB, file string) int64 {
	t.Helper()
	b, err := os.ReadFile(file)
	must(t, err)
	n, err := strconv.ParseInt(string(bytes.TrimSpace(b)), 10, 64)
	must(t, err)
	return n
}

// endProcess has a container end by itself, as `kill 1` in it does: kubelet restarts it then.
func endProcess(t testing.TB, p *corev1.Pod, name string) {
	t.Helper()
	must(t, syscall.Kill(pidOf(t, container(t, p, name)), syscall.SIGTERM))
}

// restarted waits until the container runs, with another ID than before and restarted so often, and
// returns the pod.
func restarted(t testing.TB, before *corev1.Pod, name string, restarts int32) *corev1.Pod {
	t.Helper()
	var p *corev1.Pod
	eventuallySaying(t, fmt.Sprintf("container %s of %s runs after restart %d", name, before.Name, restarts),
		func() string { return states(p) + "\n" + events(t, before.Namespace, before.Name) }, func() bool {
			p = getPod(t, before.Namespace, before.Name)
			s := statusOf(p, name)
			return s != nil && s.State.Running != nil && s.RestartCount == restarts &&
				s.ContainerID != container(t, before, name).ContainerID
		})
	return p
}
