// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// cgroupPath is where the cgroups of a bed are, below each hierarchy.
func cgroupPath(id string) string { return "/cri-proxy-test-" + id }

// hierarchies returns the mount points of all cgroup hierarchies: the single one of v2, or each
// controller's of v1, plus in the hybrid layout the v2 tree without controllers, where kubelet and
// runc create cgroups too.
func hierarchies() (dirs []string, v2 bool, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(cgroupRoot, &st); err != nil {
		return nil, false, fmt.Errorf("look at %s: %w", cgroupRoot, err)
	}
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		return []string{cgroupRoot}, true, nil
	}
	entries, err := os.ReadDir(cgroupRoot)
	if err != nil {
		return nil, false, err
	}
	for _, e := range entries {
		dir := filepath.Join(cgroupRoot, e.Name())
		// Symlinks such as cpu -> cpu,cpuacct name the same hierarchy twice.
		if e.IsDir() && unix.Statfs(dir, &st) == nil && (st.Type == unix.CGROUP_SUPER_MAGIC ||
			st.Type == unix.CGROUP2_SUPER_MAGIC) {
			dirs = append(dirs, dir)
		}
	}
	return dirs, false, nil
}

// makeCgroup creates path in every hierarchy, ready for containers below it. kubelet demands that
// its cgroupRoot exists.
func makeCgroup(path string) error {
	dirs, v2, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range dirs {
		cur := h
		for part := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
			if v2 {
				delegateControllers(cur)
			}
			next := filepath.Join(cur, part)
			if err := os.Mkdir(next, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("create cgroup: %w", err)
			}
			if !v2 {
				inheritCpuset(cur, next)
			}
			cur = next
		}
		if v2 {
			delegateControllers(cur)
		}
	}
	return nil
}

// delegateControllers enables all controllers of a v2 cgroup for its children. One at a time: a
// controller that cannot be enabled (cpu with real-time processes around) must not keep the others
// away.
func delegateControllers(dir string) {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	for c := range strings.FieldsSeq(string(b)) {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0)
	}
}

// inheritCpuset gives a v1 cpuset its parent's CPUs and memory nodes: a new one has none and takes
// no process.
func inheritCpuset(parent, dir string) {
	for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
		if b, err := os.ReadFile(filepath.Join(parent, f)); err == nil {
			_ = os.WriteFile(filepath.Join(dir, f), b, 0)
		}
	}
}

// cgroupProcesses returns the processes in and below path, over all hierarchies.
func cgroupProcesses(path string) []int {
	dirs, _, err := hierarchies()
	if err != nil {
		return nil
	}
	pids := map[int]bool{}
	for _, h := range dirs {
		_ = filepath.WalkDir(filepath.Join(h, path), func(dir string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() {
				return nil
			}
			b, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			for f := range strings.FieldsSeq(string(b)) {
				if pid, err := strconv.Atoi(f); err == nil && pid > 1 {
					pids[pid] = true
				}
			}
			return nil
		})
	}
	out := make([]int, 0, len(pids))
	for pid := range pids {
		out = append(out, pid)
	}
	slices.Sort(out)
	return out
}

// removeCgroup removes path and all below it. The kernel frees a cgroup a moment after its last
// process, hence the long timeout.
func removeCgroup(ctx context.Context, path string) error {
	dirs, _, err := hierarchies()
	if err != nil {
		return err
	}
	return poll(ctx, func() error {
		var errs []error
		for _, h := range dirs {
			errs = append(errs, removeCgroupDir(filepath.Join(h, path)))
		}
		return errors.Join(errs...)
	})
}

func removeCgroupDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeCgroupDir(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove cgroup %s: %w", dir, err)
	}
	return nil
}
