// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// runRoot holds one directory per bed: its record, its sockets and its pid files. Unix socket paths
// are at most 107 bytes long, so this is not below the cache directory; and it is the one place
// where runs with different caches see each other.
const runRoot = "/run/cri-proxy-test"

// destroyTimeout is for the kernel, which frees processes, mounts and cgroups a moment after they
// end.
const destroyTimeout = 30 * time.Second

// record is what somebody else needs to remove a bed whose owner is gone.
type record struct {
	ID         string       `json:"id"`
	Mode       string       `json:"mode"`
	Dir        string       `json:"dir"`
	Boot       string       `json:"boot"`
	Detached   bool         `json:"detached"`
	Owner      identity     `json:"owner"`
	Started    time.Time    `json:"started"`
	Kubeconfig string       `json:"kubeconfig,omitempty"`
	Nodes      []nodeRecord `json:"nodes"`
}

type nodeRecord struct {
	Name    string `json:"name"`
	Subnet  int    `json:"subnet"`
	Bridge  string `json:"bridge"`
	Network string `json:"network"` // CNI network name
	CRI     string `json:"cri"`     // socket that kubelet dials
}

// ledger is the set of beds of this machine. All of them change under its lock.
type ledger struct{ root string }

func (l ledger) runDir(id string) string { return filepath.Join(l.root, id) }

func (l ledger) lock(ctx context.Context) (unlock func(), err error) {
	if err := os.MkdirAll(l.root, 0o755); err != nil {
		return nil, err
	}
	return lockFile(ctx, filepath.Join(l.root, ".lock"))
}

// records returns all beds. A directory without a readable record (its owner died while creating
// it) counts as a bed with only an ID.
func (l ledger) records() ([]record, error) {
	entries, err := os.ReadDir(l.root)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var recs []record
	for _, e := range entries {
		if !e.IsDir() || strings.HasPrefix(e.Name(), gonePrefix) {
			continue
		}
		r := record{}
		b, err := os.ReadFile(filepath.Join(l.runDir(e.Name()), "bed.json"))
		if err == nil {
			err = json.Unmarshal(b, &r)
		}
		if err != nil {
			r = record{}
		}
		r.ID = e.Name()
		recs = append(recs, r)
	}
	return recs, nil
}

func (l ledger) write(r record) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return writeFileAtomic(filepath.Join(l.runDir(r.ID), "bed.json"), b, 0o644)
}

// hold takes the bed's own lock, which its owner keeps for as long as it lives. held is false when
// somebody else has it.
func (l ledger) hold(id string) (release func(), held bool, err error) {
	f, err := os.OpenFile(filepath.Join(l.runDir(id), "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, false, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, false, nil
		}
		return nil, false, err
	}
	return func() { f.Close() }, true, nil
}

// allocate reserves an ID and n subnets for a new bed, after sweeping dead ones. fill completes the
// record (it has ID and Nodes with their subnets then) before it is written. release gives up
// ownership; the record stays until destroy.
func (l ledger) allocate(
	ctx context.Context, n int, log io.Writer, fill func(*record),
) (r record, release func(), err error) {
	unlock, err := l.lock(ctx)
	if err != nil {
		return record{}, nil, err
	}
	defer unlock()
	if err := l.sweep(ctx, log); err != nil {
		fmt.Fprintf(log, "sweep of earlier runs: %v\n", err)
	}
	recs, err := l.records()
	if err != nil {
		return record{}, nil, err
	}
	taken := map[int]bool{}
	for _, old := range recs {
		for _, node := range old.Nodes {
			taken[node.Subnet] = true
		}
	}
	self, err := identify(os.Getpid())
	if err != nil {
		return record{}, nil, err
	}
	// Five letters: short enough for an interface name, and a repeat within a machine's life is
	// harmless (Mkdir refuses it).
	r = record{ID: strings.ToLower(rand.Text()[:5]), Boot: self.Boot, Owner: self, Started: time.Now().UTC()}
	for i := 0; i < subnetCount && len(r.Nodes) < n; i++ {
		network, _ := subnet(i)
		used, err := inUse(network)
		if err != nil {
			return record{}, nil, err
		}
		if !taken[i] && !used {
			r.Nodes = append(r.Nodes, nodeRecord{Subnet: i})
		}
	}
	if len(r.Nodes) < n {
		return record{}, nil, fmt.Errorf("no free subnet left in %s for %d nodes: %d beds exist, remove some with "+
			"`testbed down`", networkBase, n, len(recs))
	}
	fill(&r)
	if err := os.Mkdir(l.runDir(r.ID), 0o755); err != nil {
		return record{}, nil, err
	}
	release, held, err := l.hold(r.ID)
	if err == nil && !held {
		err = errors.New("somebody holds the lock of a bed that was just created")
	}
	if err == nil {
		err = l.write(r)
	}
	return r, release, err
}

// sweep destroys every bed whose owner is gone: not held, and not left running on purpose in this
// boot. Under the ledger's lock.
func (l ledger) sweep(ctx context.Context, log io.Writer) error {
	recs, err := l.records()
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range recs {
		if r.Detached && r.Boot == bootID() {
			continue
		}
		release, held, err := l.hold(r.ID)
		if err != nil || !held {
			if !errors.Is(err, fs.ErrNotExist) { // it has just been removed
				errs = append(errs, err)
			}
			continue
		}
		fmt.Fprintf(log, "sweep %s, left by a dead run\n", r.ID)
		errs = append(errs, l.destroy(ctx, r))
		release()
	}
	left, _ := filepath.Glob(filepath.Join(l.root, gonePrefix+"*"))
	for _, dir := range left {
		errs = append(errs, removeTree(dir))
	}
	return errors.Join(append(errs, l.sweepDirs())...)
}

// sweepDirs removes the directories of beds that have no record any more: after a reboot that
// emptied /run.
func (l ledger) sweepDirs() error {
	cache, err := CacheDir()
	if err != nil {
		return err
	}
	runs := filepath.Join(cache, "runs")
	entries, err := os.ReadDir(runs)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if _, err := os.Stat(l.runDir(e.Name())); errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, removeTree(filepath.Join(runs, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// destroy removes all traces of a bed from the machine, whatever state it is in, without the help
// of any of its components. It is safe to repeat. The caller holds the bed's lock.
func (l ledger) destroy(ctx context.Context, r record) error {
	ctx, cancel := context.WithTimeoutCause(ctx, destroyTimeout, fmt.Errorf("given up after %s", destroyTimeout))
	defer cancel()
	runDir := l.runDir(r.ID)
	if err := endProcesses(ctx, r, runDir); err != nil {
		return err // nothing below is safe while they run
	}
	var errs []error
	dirs := []string{runDir}
	if r.Dir != "" {
		dirs = append(dirs, r.Dir)
	}
	errs = append(errs, unmountBelow(dirs...))
	for _, n := range r.Nodes {
		if n.Bridge != "" {
			errs = append(errs, deleteBridge(ctx, n.Bridge))
		}
		if n.Network != "" {
			errs = append(errs, removeCNIResults(n.Network))
		}
	}
	errs = append(errs, removeCgroup(ctx, cgroupPath(r.ID)))
	// Containers of a CRI client that gave no cgroup parent.
	tasks, _ := filepath.Glob(filepath.Join(runDir, "*", "containerd", "io.containerd.runtime.v2.task", "k8s.io", "*"))
	for _, t := range tasks {
		errs = append(errs, removeCgroup(ctx, "/k8s.io/"+filepath.Base(t)))
	}
	if r.Dir != "" {
		errs = append(errs, removeLogSymlinks(r.Dir), removeTree(r.Dir))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove bed %s: %w", r.ID, err)
	}
	return l.forget(r.ID) // last: it holds the record
}

// gonePrefix begins the names of beds' directories that are being removed.
const gonePrefix = ".gone-"

// forget removes the bed's directory with its record and its lock. They go in one step: who sweeps
// in the middle of it would take the rest for a bed whose owner is dead, and put a lock of its own
// there.
func (l ledger) forget(id string) error {
	mounts, err := mountsBelow(l.runDir(id))
	if err != nil {
		return err
	}
	if len(mounts) > 0 {
		return fmt.Errorf("remove %s: %s is still mounted", l.runDir(id), mounts[0])
	}
	gone := filepath.Join(l.root, gonePrefix+id)
	if err := os.Rename(l.runDir(id), gone); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return removeTree(gone)
}

// endProcesses kills the recorded processes, the shims that serve the bed's containerd, and
// everything in their care.
func endProcesses(ctx context.Context, r record, runDir string) error {
	return poll(ctx, func() error {
		var left []string
		for _, id := range bedProcesses(r, runDir) {
			if err := id.signal(unix.SIGKILL); errors.Is(err, unix.ESRCH) {
				continue
			}
			left = append(left, fmt.Sprintf("%d (%s)", id.PID, id.Exe))
		}
		if len(left) > 0 {
			return fmt.Errorf("processes of bed %s survive SIGKILL: %s", r.ID, strings.Join(left, ", "))
		}
		return nil
	})
}

// bedProcesses returns every live process that belongs to a bed.
func bedProcesses(r record, runDir string) []identity {
	parent := map[int]int{}
	roots := map[int]bool{}
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		var pid int
		if _, err := fmt.Sscanf(e.Name(), "%d", &pid); err != nil {
			continue
		}
		ppid, state, _, err := procStat(pid)
		if err != nil || state == 'Z' || state == 'X' {
			continue
		}
		parent[pid] = ppid
		cmdline, _ := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		argv := strings.Split(string(cmdline), "\x00")
		if strings.HasPrefix(filepath.Base(argv[0]), "containerd-shim") &&
			slices.ContainsFunc(argv, func(a string) bool { return strings.HasPrefix(a, runDir+"/") }) {
			roots[pid] = true
		}
		// Programs that a test put among the bed's files.
		exe, _ := os.Readlink("/proc/" + e.Name() + "/exe")
		if strings.HasPrefix(exe, runDir+"/") || (r.Dir != "" && strings.HasPrefix(exe, r.Dir+"/")) {
			roots[pid] = true
		}
	}
	files, _ := filepath.Glob(filepath.Join(runDir, "pid", "*.json"))
	for _, f := range files {
		var p identity
		if b, err := os.ReadFile(f); err == nil && json.Unmarshal(b, &p) == nil && p.alive() {
			roots[p.PID] = true
		}
	}
	for _, pid := range cgroupProcesses(cgroupPath(r.ID)) {
		roots[pid] = true
	}
	var out []identity
	for pid := range parent {
		for p, depth := pid, 0; p > 1 && depth < 64; p, depth = parent[p], depth+1 {
			if roots[p] && pid != os.Getpid() {
				if id, err := identify(pid); err == nil {
					out = append(out, id)
				}
				break
			}
		}
	}
	return out
}

// removeCNIResults removes libcni's cache of a network's attachments, which it keeps in a place
// that containerd cannot change.
func removeCNIResults(network string) error {
	files, err := filepath.Glob("/var/lib/cni/results/" + network + "-*")
	for _, f := range files {
		err = errors.Join(err, removeFile(f))
	}
	return err
}

// containerLogs is where kubelet links every container's log (pkg/kubelet/kuberuntime/legacy.go);
// it has no setting.
const containerLogs = "/var/log/containers"

// removeLogSymlinks removes the links in containerLogs that lead into dir.
func removeLogSymlinks(dir string) error {
	entries, err := os.ReadDir(containerLogs)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		link := filepath.Join(containerLogs, e.Name())
		if target, linkErr := os.Readlink(link); linkErr == nil && strings.HasPrefix(target, dir+"/") {
			err = errors.Join(err, removeFile(link)) // every kubelet of this machine removes those that lead nowhere
		}
	}
	return err
}

// removeFile removes a file, which somebody else may have done.
func removeFile(path string) error {
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// mountsBelow returns the mount points at or below dirs, the latest first.
func mountsBelow(dirs ...string) ([]string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	return parseMounts(string(b), dirs...), nil
}

// parseMounts reads proc_pid_mountinfo(5); field 5 is the mount point with space, tab, newline and
// backslash in octal.
func parseMounts(mountinfo string, dirs ...string) []string {
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	var out []string
	for line := range strings.Lines(mountinfo) {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		path := unescape.Replace(f[4])
		if slices.ContainsFunc(dirs, func(d string) bool { return path == d || strings.HasPrefix(path, d+"/") }) {
			out = append(out, path)
		}
	}
	slices.Reverse(out)
	return out
}

func unmountBelow(dirs ...string) error {
	mounts, err := mountsBelow(dirs...)
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range mounts {
		if unix.Unmount(m, unix.UMOUNT_NOFOLLOW) == nil {
			continue
		}
		// Busy: somebody has a file open there. Detached, it goes when they close it.
		if err := unix.Unmount(m, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) &&
			!errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", m, err))
		}
	}
	return errors.Join(errs...)
}

// removeTree removes dir unless something is mounted below it: that content is not ours to delete.
func removeTree(dir string) error {
	mounts, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	if len(mounts) > 0 {
		return fmt.Errorf("remove %s: %s is still mounted", dir, mounts[0])
	}
	return os.RemoveAll(dir)
}
