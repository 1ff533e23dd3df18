// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package cgroup tells how much room the cgroup of a container's pod leaves for one more container,
// and makes it larger for a while.
//
// It reads what the kernel documents in admin-guide/cgroup-v1/memory.rst, pids.rst, hugetlb.rst and
// admin-guide/cgroup-v2.rst. Each controller is looked for on its own, because a hybrid node has
// some in hierarchies of v1 and the others in that of v2. Names mean nothing but that of the
// container, which carries its ID with every driver: cgroupfs (…/pod<uid>/<id>) and systemd
// (…-pod<uid>.slice/cri-containerd-<id>.scope).
package cgroup

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Unlimited is a limit that is none.
const Unlimited = int64(math.MaxInt64)

// System is where the kernel's files are. The zero value is this machine.
type System struct {
	// Root stands before /proc and before the mount points of cgroups; tests have trees of their
	// own.
	Root string
}

// Pod is where a container and its pod are in the hierarchies. What it tells is read anew each
// time.
type Pod struct {
	system                 System
	memory, pids, hugepage place
}

// place is a container's place in the hierarchy of one controller. The zero value is none.
type place struct {
	controller string
	v2         bool
	// path is the container's cgroup, of which the last but one element is its pod, below mount.
	mount, path string
}

// Find returns the place of a container by one of its processes.
//
// Errors: the process is gone, or none of that container as this process sees it.
func (s System) Find(pid int, container string) (*Pod, error) {
	groups, err := os.ReadFile(s.at("/proc", strconv.Itoa(pid), "cgroup"))
	if err != nil {
		return nil, err
	}
	mounts, err := os.ReadFile(s.at("/proc/self/mountinfo"))
	if err != nil {
		return nil, err
	}
	if container == "" || !bytes.Contains(groups, []byte(container)) {
		return nil, fmt.Errorf("process %d is none of container %s", pid, container)
	}
	p := &Pod{system: s}
	for controller, into := range map[string]*place{"memory": &p.memory, "pids": &p.pids, "hugetlb": &p.hugepage} {
		at, err := locate(controller, container, groups, mounts)
		if err != nil {
			return nil, err
		}
		if at != nil {
			*into = *at
		}
	}
	return p, nil
}

func (s System) at(elem ...string) string {
	return filepath.Join(append([]string{s.Root}, elem...)...)
}

// locate finds the place of the container that a process is in; nil if there is no such controller.
func locate(controller, container string, groups, mounts []byte) (*place, error) {
	in, v2 := "", true
	for line := range strings.Lines(string(groups)) {
		// hierarchy:controllers:path, the hierarchy of v2 without controllers (cgroups(7)).
		f := strings.SplitN(strings.TrimRight(line, "\n"), ":", 3)
		switch {
		case len(f) != 3:
		case slices.Contains(strings.Split(f[1], ","), controller):
			in, v2 = f[2], false
		case f[1] == "" && v2:
			in = f[2]
		}
	}
	mount, root := mountOf(controller, v2, mounts)
	if in == "" || mount == "" {
		return nil, nil
	}
	if !strings.Contains(in, container) {
		if v2 {
			return nil, nil // a hybrid node whose runtime uses v1 only
		}
		return nil, fmt.Errorf("the cgroup %s of %s is none of container %s", in, controller, container)
	}
	if root != "/" {
		below, ok := strings.CutPrefix(in, root)
		if !ok || !strings.HasPrefix(below, "/") {
			return nil, fmt.Errorf("the cgroup %s of %s is not below %s, which is all that is mounted here", in,
				controller, root)
		}
		in = below
	}
	if strings.Contains(in, "/../") {
		return nil, fmt.Errorf("the cgroup %s of %s is outside of this process' cgroup namespace", in, controller)
	}
	// The container may have cgroups of its own below that with its name.
	elements := strings.Split(path.Clean(in), "/")
	of := slices.IndexFunc(elements, func(e string) bool { return strings.Contains(e, container) })
	if of < 2 {
		return nil, fmt.Errorf("the cgroup %s of %s has no pod", in, controller)
	}
	return &place{controller: controller, v2: v2, mount: mount, path: strings.Join(elements[:of+1], "/")}, nil
}

// mountOf returns where the hierarchy of the controller is mounted, and which of its cgroups is
// there (proc_pid_mountinfo(5)).
func mountOf(controller string, v2 bool, mounts []byte) (mount, root string) {
	for line := range strings.Lines(string(mounts)) {
		of, kind, ok := strings.Cut(strings.TrimRight(line, "\n"), " - ")
		before, after := strings.Fields(of), strings.Fields(kind)
		if !ok || len(before) < 5 || len(after) < 3 {
			continue
		}
		switch {
		case v2 && after[0] == "cgroup2":
		case !v2 && after[0] == "cgroup" && slices.Contains(strings.Split(after[2], ","), controller):
		default:
			continue
		}
		return unescape(before[4]), unescape(before[3])
	}
	return "", ""
}

// unescape undoes what the kernel does to blanks and the like (fs/proc_namespace.c mangle).
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// dir returns the directory of a cgroup by its path in the hierarchy.
func (p *Pod) dir(at place, group string) string { return p.system.at(at.mount, group) }

// above returns the cgroups whose limits count for what is added to the pod: its own and those
// above, without the root, which has none.
func (at place) above() []string {
	var groups []string
	for group := path.Dir(at.path); group != "/" && group != "."; group = path.Dir(group) {
		groups = append(groups, group)
	}
	return groups
}

// Room is how much of a resource can be added. The least of several cgroups counts.
type Room struct {
	// Free is Limit less what is used, and that can be had back; it may be negative. Unlimited if
	// nothing limits.
	Free int64
	// Limit and Used are of the cgroup that leaves the least, Reclaimable is the part of Used that
	// can be had back.
	Limit, Used, Reclaimable int64
	// Unsettled is the part of Used that is neither in Reclaimable nor the programs' own: a later
	// look may find that it can be had back, see [StatInterval].
	Unsettled int64
	// At is that cgroup, as its path in the hierarchy.
	At string
}

// StatInterval is how old the kernel's memory.stat may be: a cgroup's counts are summed up every
// two seconds (mm/memcontrol.c FLUSH_TIME) and, in between, only sometimes. Kernel 6.18 showed all
// of a cache as dirty right after sync(2) had returned, in 13 of 287 tries beside a busy disk. What
// is used, and the limits, are always of this moment.
const StatInterval = 2500 * time.Millisecond

func unlimited() Room { return Room{Free: Unlimited, Limit: Unlimited} }

func (r Room) least(other Room) Room {
	if other.Free < r.Free {
		return other
	}
	return r
}

// Memory returns how much memory can be added to the pod before the kernel kills one of its
// processes, or one of the processes beside it.
func (p *Pod) Memory() (Room, error) { return p.memoryOf(p.memory.above()) }

// MemoryAbove is Memory without the pod's own limit, and with what the machine has available.
func (p *Pod) MemoryAbove() (Room, error) {
	above := p.memory.above()
	if len(above) > 0 {
		above = above[1:]
	}
	room, err := p.memoryOf(above)
	if err != nil {
		return room, err
	}
	machine, err := p.system.machine()
	return room.least(machine), err
}

func (p *Pod) memoryOf(groups []string) (Room, error) {
	room := unlimited()
	child := p.memory.path
	for _, group := range groups {
		r, err := p.memoryRoom(group, child)
		if err != nil {
			return room, err
		}
		room, child = room.least(r), group
	}
	return room, nil
}

// memoryRoom is the room of one cgroup. child is the cgroup in it that the container is in.
func (p *Pod) memoryRoom(group, child string) (Room, error) {
	files := memoryV1
	if p.memory.v2 {
		files = memoryV2
	}
	dir := p.dir(p.memory, group)
	room := unlimited()
	stat, err := readStat(dir)
	if err != nil {
		return room, err
	}
	clean := files.clean(stat)
	protected, err := p.protected(child)
	if err != nil {
		return room, err
	}
	for _, f := range files.limits {
		limit, err := readNumber(dir, f.limit)
		if errors.Is(err, fs.ErrNotExist) {
			continue // no accounting of swap; or the controller is not enabled here, and then it is not below
		}
		used, uerr := readNumber(dir, f.used)
		if err := errors.Join(err, uerr); err != nil {
			return room, err
		}
		if limit == Unlimited {
			continue
		}
		back := min(clean, max(0, used-protected))
		r := Room{Free: limit - used + back, Limit: limit, Used: used, Reclaimable: back, At: group}
		if own, known := files.own(stat); known {
			r.Unsettled = max(0, used-protected-own-back)
		}
		room = room.least(r)
	}
	return room, nil
}

// protected is how much of a cgroup is not taken back for those above it: memory.min of v2, which
// kubelet sets with MemoryQoS.
func (p *Pod) protected(group string) (int64, error) {
	if !p.memory.v2 {
		return 0, nil
	}
	n, err := readNumber(p.dir(p.memory, group), "memory.min")
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	return n, err
}

// memoryFiles are the names that a version of the kernel's interface has.
type memoryFiles struct {
	limits                                             []limitFiles
	inactiveFile, activeFile, mapped, dirty, writeback string
	anon, shmem                                        string
}

// clean is what the kernel takes back before it kills: pages of files that need not be written
// first. Of those in use lately the ones that programs have mapped, such as their own code, are not
// counted: the kernel would have to read them again all the time.
func (f memoryFiles) clean(stat map[string]int64) int64 {
	inactive := stat[f.inactiveFile]
	return max(0, max(inactive, inactive+stat[f.activeFile]-stat[f.mapped])-stat[f.dirty]-stat[f.writeback])
}

// own is the memory that is not of files, and is not had back.
func (f memoryFiles) own(stat map[string]int64) (n int64, known bool) {
	n, known = stat[f.anon]
	return n + stat[f.shmem], known
}

type limitFiles struct{ limit, used string }

var (
	memoryV1 = memoryFiles{
		limits: []limitFiles{
			{"memory.limit_in_bytes", "memory.usage_in_bytes"},
			{"memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"},
		},
		inactiveFile: "total_inactive_file", activeFile: "total_active_file", mapped: "total_mapped_file",
		dirty: "total_dirty", writeback: "total_writeback",
		anon: "total_rss", shmem: "total_shmem",
	}
	memoryV2 = memoryFiles{
		limits:       []limitFiles{{"memory.max", "memory.current"}},
		inactiveFile: "inactive_file", activeFile: "active_file", mapped: "file_mapped", dirty: "file_dirty",
		writeback: "file_writeback",
		anon:      "anon", shmem: "shmem",
	}
)

// machine is the room of the whole machine.
func (s System) machine() (Room, error) {
	b, err := os.ReadFile(s.at("/proc/meminfo"))
	if err != nil {
		return unlimited(), err
	}
	stat := parseStat(b)
	total, has := stat["MemTotal:"]
	available, hasToo := stat["MemAvailable:"]
	if !has || !hasToo {
		return unlimited(), errors.New("/proc/meminfo does not tell MemTotal and MemAvailable")
	}
	const kib = 1024
	return Room{Free: available * kib, Limit: total * kib, Used: (total - available) * kib, At: "the node"}, nil
}

// MemoryUsed returns the container's working set, as kubelet has it (cAdvisor
// container/libcontainer/handler.go): without what has not been used lately.
func (p *Pod) MemoryUsed() (int64, error) {
	files := memoryV1
	if p.memory.v2 {
		files = memoryV2
	}
	if p.memory.path == "" {
		return 0, nil
	}
	dir := p.dir(p.memory, p.memory.path)
	used, err := readNumber(dir, files.limits[0].used)
	if err != nil {
		return 0, err
	}
	stat, err := readStat(dir)
	return max(0, used-stat[files.inactiveFile]), err
}

// Pids returns how many processes and threads can be added to the pod.
func (p *Pod) Pids() (Room, error) {
	room := unlimited()
	for _, group := range p.pids.above() {
		r, err := limited(p.dir(p.pids, group), group, "pids.max", "pids.current")
		if err != nil {
			return room, err
		}
		room = room.least(r)
	}
	return room, nil
}

// PidsUsed returns how many processes and threads the container has.
func (p *Pod) PidsUsed() (int64, error) {
	if p.pids.path == "" {
		return 0, nil
	}
	return readNumber(p.dir(p.pids, p.pids.path), "pids.current")
}

// Hugepages returns how many bytes of huge pages of a size can be added to the pod. The size is as
// CRI has it: 2MB.
func (p *Pod) Hugepages(size string) (Room, error) {
	room := unlimited()
	limit, used := "hugetlb."+size+".limit_in_bytes", "hugetlb."+size+".usage_in_bytes"
	if p.hugepage.v2 {
		limit, used = "hugetlb."+size+".max", "hugetlb."+size+".current"
	}
	for _, group := range p.hugepage.above() {
		r, err := limited(p.dir(p.hugepage, group), group, limit, used)
		if err != nil {
			return room, err
		}
		room = room.least(r)
	}
	return room, nil
}

// limited is the room of a cgroup whose used is not had back.
func limited(dir, group, limitFile, usedFile string) (Room, error) {
	limit, err := readNumber(dir, limitFile)
	if errors.Is(err, fs.ErrNotExist) { // not enabled here
		return unlimited(), nil
	}
	used, uerr := readNumber(dir, usedFile)
	if err := errors.Join(err, uerr); err != nil || limit == Unlimited {
		return unlimited(), err
	}
	return Room{Free: limit - used, Limit: limit, Used: used, At: group}, nil
}

// readNumber reads a file with one number; "max" is Unlimited, and so is what v1 has in its place.
func readNumber(dir, file string) (int64, error) {
	b, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		return 0, err
	}
	return parseNumber(filepath.Join(dir, file), string(b))
}

func parseNumber(file, s string) (int64, error) {
	s = strings.TrimSpace(s)
	if s == "max" {
		return Unlimited, nil
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", file, err)
	}
	// v1 has the largest number of pages that a long can count in place of "max" (mm/page_counter.c
	// PAGE_COUNTER_MAX).
	if n >= math.MaxInt64&^(1<<20-1) {
		return Unlimited, nil
	}
	return int64(n), nil
}

func readStat(dir string) (map[string]int64, error) {
	b, err := os.ReadFile(filepath.Join(dir, "memory.stat"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // the controller is not enabled here
	}
	return parseStat(b), err
}

// parseStat parses lines of a name and a number.
func parseStat(b []byte) map[string]int64 {
	stat := map[string]int64{}
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
		f := strings.Fields(lines.Text())
		if len(f) < 2 {
			continue
		}
		if n, err := strconv.ParseInt(f[1], 10, 64); err == nil {
			stat[f[0]] = n
		}
	}
	return stat
}
