// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

const (
	id  = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	mib = 1 << 20
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// tree makes files, by path, below a root of their own.
func tree(t *testing.T, files map[string]string) System {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		file := filepath.Join(root, name)
		must(t, os.MkdirAll(filepath.Dir(file), 0o755))
		must(t, os.WriteFile(file, []byte(content+"\n"), 0o644))
	}
	return System{Root: root}
}

const (
	mountsV1 = `31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
34 31 0:31 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:10 - cgroup cgroup rw,memory
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd`
	mountV2     = `30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate`
	mountHybrid = mountsV1 + "\n" + `41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw`
	unlimitedV1 = "9223372036854771712"
)

// memory makes the files of a cgroup of v1.
func memoryOfV1(files map[string]string, dir, limit string, used, inactive int) {
	files[dir+"/memory.limit_in_bytes"], files[dir+"/memory.usage_in_bytes"] = limit, strconv.Itoa(used)
	files[dir+"/memory.memsw.limit_in_bytes"], files[dir+"/memory.memsw.usage_in_bytes"] = unlimitedV1,
		strconv.Itoa(used)
	files[dir+"/memory.stat"] = fmt.Sprintf("inactive_file 7\ntotal_inactive_file %d\ntotal_active_file "+
		"999999999\ntotal_mapped_file 999999999\ntotal_dirty 4096", inactive+4096)
}

func memoryOfV2(files map[string]string, dir, limit string, used, inactive int) {
	files[dir+"/memory.max"], files[dir+"/memory.current"] = limit, strconv.Itoa(used)
	files[dir+"/memory.stat"] = fmt.Sprintf("anon %d\ninactive_file %d\nfile_dirty 1000\nfile_writeback 96",
		used-inactive, inactive+1096)
}

// What is found in the trees that drivers and versions make.
func TestFind(t *testing.T) {
	const m1, m2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
	cgroupfs := "/kubepods/burstable/podu-1/" + id
	systemd := "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podu_1.slice/cri-containerd-" + id +
		".scope"
	v1 := func(at string) string {
		return "9:name=systemd:" + at + "\n8:pids:" + at + "\n4:memory:" + at + "\n2:cpu,cpuacct:" + at + "\n0::/"
	}
	for _, tc := range []struct {
		name, groups, mounts string
		files                func(map[string]string)
		want                 Room
	}{
		{
			name: "v1, cgroupfs", groups: v1(cgroupfs), mounts: mountsV1,
			files: func(f map[string]string) {
				memoryOfV1(f, m1+cgroupfs, "1", 1, 0) // its own says nothing of the next one
				memoryOfV1(f, m1+"/kubepods/burstable/podu-1", "67108864", 60*mib, 2*mib)
				memoryOfV1(f, m1+"/kubepods/burstable", unlimitedV1, 99*mib, 0)
				memoryOfV1(f, m1+"/kubepods", "1073741824", 100*mib, 0)
				memoryOfV1(f, m1, unlimitedV1, 5, 0)
			},
			want: Room{Free: 6 * mib, Limit: 64 * mib, Used: 60 * mib, Reclaimable: 2 * mib,
				At: "/kubepods/burstable/podu-1"},
		},
		{
			name: "v1, systemd, with cgroups of the container's own", groups: v1(systemd + "/init.scope"),
			mounts: mountsV1,
			files: func(f map[string]string) {
				memoryOfV1(f, m1+filepath.Dir(systemd), "67108864", 60*mib, 0)
				memoryOfV1(f, m1+"/kubepods.slice/kubepods-burstable.slice", unlimitedV1, 60*mib, 0)
				memoryOfV1(f, m1+"/kubepods.slice", unlimitedV1, 60*mib, 0)
			},
			want: Room{Free: 4 * mib, Limit: 64 * mib, Used: 60 * mib, At: filepath.Dir(systemd)},
		},
		{
			name: "v1, a limit of memory and swap together", groups: v1(cgroupfs), mounts: mountsV1,
			files: func(f map[string]string) {
				memoryOfV1(f, m1+"/kubepods/burstable/podu-1", "67108864", 10*mib, 0)
				f[m1+"/kubepods/burstable/podu-1/memory.memsw.limit_in_bytes"] = "67108864"
				f[m1+"/kubepods/burstable/podu-1/memory.memsw.usage_in_bytes"] = "66060288"
				memoryOfV1(f, m1+"/kubepods/burstable", unlimitedV1, 60*mib, 0)
				memoryOfV1(f, m1+"/kubepods", unlimitedV1, 60*mib, 0)
			},
			want: Room{Free: mib, Limit: 64 * mib, Used: 63 * mib, At: "/kubepods/burstable/podu-1"},
		},
		{
			name: "hybrid", groups: v1(cgroupfs), mounts: mountHybrid,
			files: func(f map[string]string) {
				memoryOfV1(f, m1+"/kubepods/burstable/podu-1", unlimitedV1, 60*mib, 0)
				memoryOfV1(f, m1+"/kubepods/burstable", unlimitedV1, 60*mib, 0)
				memoryOfV1(f, m1+"/kubepods", "62914560", 59*mib, mib)
			},
			want: Room{Free: 2 * mib, Limit: 60 * mib, Used: 59 * mib, Reclaimable: mib, At: "/kubepods"},
		},
		{
			name: "v1, mounted from a cgroup on", groups: v1("/machine/a" + cgroupfs),
			mounts: strings.ReplaceAll(mountsV1, " / /sys/fs/cgroup/memory", " /machine/a /sys/fs/cgroup/memory"),
			files: func(f map[string]string) {
				memoryOfV1(f, m1+"/kubepods/burstable/podu-1", "67108864", 60*mib, 0)
				memoryOfV1(f, m1+"/kubepods/burstable", unlimitedV1, 60*mib, 0)
				memoryOfV1(f, m1+"/kubepods", unlimitedV1, 60*mib, 0)
			},
			want: Room{Free: 4 * mib, Limit: 64 * mib, Used: 60 * mib, At: "/kubepods/burstable/podu-1"},
		},
		{
			name: "v2, systemd", groups: "0::" + systemd, mounts: mountV2,
			files: func(f map[string]string) {
				memoryOfV2(f, m2+filepath.Dir(systemd), "67108864", 60*mib, 1*mib)
				memoryOfV2(f, m2+"/kubepods.slice/kubepods-burstable.slice", "max", 60*mib, 0)
				memoryOfV2(f, m2+"/kubepods.slice", "1073741824", 60*mib, 0)
			},
			want: Room{Free: 5 * mib, Limit: 64 * mib, Used: 60 * mib, Reclaimable: mib, At: filepath.Dir(systemd)},
		},
		{
			name: "v2, cgroupfs, memory that the container keeps", groups: "0::" + cgroupfs, mounts: mountV2,
			files: func(f map[string]string) {
				memoryOfV2(f, m2+"/kubepods/burstable/podu-1", "67108864", 60*mib, 20*mib)
				f[m2+cgroupfs+"/memory.min"] = strconv.Itoa(58 * mib)
				memoryOfV2(f, m2+"/kubepods/burstable", "max", 60*mib, 0)
				memoryOfV2(f, m2+"/kubepods", "max", 60*mib, 0)
			},
			want: Room{Free: 6 * mib, Limit: 64 * mib, Used: 60 * mib, Reclaimable: 2 * mib,
				At: "/kubepods/burstable/podu-1"},
		},
		{
			name: "v2, a cache that is in use", groups: "0::" + cgroupfs, mounts: mountV2,
			files: func(f map[string]string) {
				memoryOfV2(f, m2+"/kubepods/burstable/podu-1", "67108864", 64*mib, 0)
				f[m2+"/kubepods/burstable/podu-1/memory.stat"] = fmt.Sprintf(
					"inactive_file %d\nactive_file %d\nfile_mapped %d\nfile_dirty %d", 8*mib, 50*mib, 20*mib, mib)
			},
			want: Room{Free: 37 * mib, Limit: 64 * mib, Used: 64 * mib, Reclaimable: 37 * mib,
				At: "/kubepods/burstable/podu-1"},
		},
		{
			name: "v2, a cache that was dirty at the last count", groups: "0::" + cgroupfs, mounts: mountV2,
			files: func(f map[string]string) {
				memoryOfV2(f, m2+"/kubepods/burstable/podu-1", "67108864", 64*mib, 0)
				f[m2+"/kubepods/burstable/podu-1/memory.stat"] = fmt.Sprintf(
					"anon %d\nshmem %d\ninactive_file %d\nfile_dirty %d", 3*mib, mib, 50*mib, 45*mib)
			},
			want: Room{Free: 5 * mib, Limit: 64 * mib, Used: 64 * mib, Reclaimable: 5 * mib, Unsettled: 55 * mib,
				At: "/kubepods/burstable/podu-1"},
		},
		{
			name: "v2, nothing limits", groups: "0::" + cgroupfs, mounts: mountV2,
			files: func(f map[string]string) {
				memoryOfV2(f, m2+"/kubepods/burstable/podu-1", "max", 60*mib, 20*mib)
				// The controllers end above: kubelet does not enable what it does not enforce.
			},
			want: unlimited(),
		},
		{
			name: "v2, more is used than the limit", groups: "0::" + cgroupfs, mounts: mountV2,
			files: func(f map[string]string) { memoryOfV2(f, m2+"/kubepods/burstable/podu-1", "67108864", 65*mib, 0) },
			want:  Room{Free: -mib, Limit: 64 * mib, Used: 65 * mib, At: "/kubepods/burstable/podu-1"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			files := map[string]string{"proc/7/cgroup": tc.groups, "proc/self/mountinfo": tc.mounts}
			tc.files(files)
			p, err := tree(t, files).Find(7, id)
			must(t, err)
			got, err := p.Memory()
			must(t, err)
			if got != tc.want {
				t.Errorf("got  %+v\nwant %+v", got, tc.want)
			}
			if pids, err := p.Pids(); err != nil || pids != unlimited() {
				t.Errorf("pids: %+v, %v", pids, err)
			}
		})
	}
}

func TestFindNot(t *testing.T) {
	for name, tc := range map[string]struct{ groups, mounts, want string }{
		"another container": {"4:memory:/kubepods/podu/" + strings.Repeat("f", 64), mountsV1,
			"is none of container"},
		"in one hierarchy only": {"8:pids:/kubepods/podu/" + id + "\n4:memory:/system.slice", mountsV1,
			"of memory is none of container"},
		"no pod": {"4:memory:/" + id, mountsV1, "has no pod"},
		"outside the namespace": {"4:memory:/../../kubepods/podu/" + id, mountsV1,
			"outside of this process' cgroup namespace"},
		"beside what is mounted": {"4:memory:/other/podu/" + id,
			strings.ReplaceAll(mountsV1, " / /sys/fs/cgroup/memory", " /machine /sys/fs/cgroup/memory"),
			"is not below /machine"},
		"a sibling of that": {"4:memory:/machine2/podu/" + id,
			strings.ReplaceAll(mountsV1, " / /sys/fs/cgroup/memory", " /machine /sys/fs/cgroup/memory"),
			"is not below /machine"},
	} {
		t.Run(name, func(t *testing.T) {
			s := tree(t, map[string]string{"proc/7/cgroup": tc.groups, "proc/self/mountinfo": tc.mounts})
			if _, err := s.Find(7, id); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want one that says %q", err, tc.want)
			}
		})
	}
	s := tree(t, map[string]string{"proc/7/cgroup": "4:memory:/k/podu/" + id, "proc/self/mountinfo": mountsV1})
	if _, err := s.Find(8, id); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of no process: %v", err)
	}
	if _, err := s.Find(7, ""); err == nil {
		t.Error("of no container: no error")
	}
	p, err := s.Find(7, id)
	must(t, err)
	if room, err := p.Memory(); err != nil || room != unlimited() {
		t.Errorf("a cgroup without the files: %+v, %v", room, err)
	}
}

func TestPidsAndHugepages(t *testing.T) {
	for version, f := range map[string]map[string]string{
		"v1": {
			"proc/7/cgroup": "4:pids:/kubepods/podu/" + id + "\n5:hugetlb:/kubepods/podu/" + id,
			"proc/self/mountinfo": mountsV1 + "\n" +
				"38 31 0:36 / /sys/fs/cgroup/hugetlb rw - cgroup cgroup rw,hugetlb",
			"sys/fs/cgroup/pids/kubepods/podu/" + id + "/pids.current":       "33",
			"sys/fs/cgroup/pids/kubepods/podu/pids.max":                      "40",
			"sys/fs/cgroup/pids/kubepods/podu/pids.current":                  "35",
			"sys/fs/cgroup/pids/kubepods/pids.max":                           "max",
			"sys/fs/cgroup/pids/kubepods/pids.current":                       "300",
			"sys/fs/cgroup/hugetlb/kubepods/podu/hugetlb.2MB.limit_in_bytes": "8388608",
			"sys/fs/cgroup/hugetlb/kubepods/podu/hugetlb.2MB.usage_in_bytes": "6291456",
			"sys/fs/cgroup/hugetlb/kubepods/podu/hugetlb.1GB.limit_in_bytes": unlimitedV1,
			"sys/fs/cgroup/hugetlb/kubepods/podu/hugetlb.1GB.usage_in_bytes": "0",
		},
		"v2": {
			"proc/7/cgroup":       "0::/kubepods/podu/" + id,
			"proc/self/mountinfo": mountV2,
			"sys/fs/cgroup/kubepods/podu/" + id + "/pids.current": "33",
			"sys/fs/cgroup/kubepods/podu/pids.max":                "max",
			"sys/fs/cgroup/kubepods/podu/pids.current":            "35",
			"sys/fs/cgroup/kubepods/pids.max":                     "305",
			"sys/fs/cgroup/kubepods/pids.current":                 "300",
			"sys/fs/cgroup/kubepods/podu/hugetlb.2MB.max":         "8388608",
			"sys/fs/cgroup/kubepods/podu/hugetlb.2MB.current":     "6291456",
			"sys/fs/cgroup/kubepods/podu/hugetlb.1GB.max":         "max",
			"sys/fs/cgroup/kubepods/podu/hugetlb.1GB.current":     "0",
		},
	} {
		t.Run(version, func(t *testing.T) {
			p, err := tree(t, f).Find(7, id)
			must(t, err)
			pids, err := p.Pids()
			must(t, err)
			if pids.Free != 5 {
				t.Errorf("pids: %+v", pids)
			}
			if n, err := p.PidsUsed(); n != 33 || err != nil {
				t.Errorf("the container has %d pids, %v", n, err)
			}
			for size, want := range map[string]int64{"2MB": 2 * mib, "1GB": Unlimited, "64KB": Unlimited} {
				if r, err := p.Hugepages(size); r.Free != want || err != nil {
					t.Errorf("pages of %s: %+v, %v", size, r, err)
				}
			}
		})
	}
}

func TestMemoryAbove(t *testing.T) {
	files := map[string]string{
		"proc/7/cgroup": "4:memory:/kubepods/podu/" + id, "proc/self/mountinfo": mountsV1,
		"proc/meminfo": "MemTotal:       1024 kB\nMemFree: 1 kB\nMemAvailable:    512 kB",
	}
	memoryOfV1(files, "sys/fs/cgroup/memory/kubepods/podu", "10", 10, 0)
	memoryOfV1(files, "sys/fs/cgroup/memory/kubepods", "1000000", 1000, 0)
	memoryOfV1(files, "sys/fs/cgroup/memory/kubepods/podu/"+id, unlimitedV1, 30*mib, 2*mib)
	s := tree(t, files)
	p, err := s.Find(7, id)
	must(t, err)
	if r, err := p.MemoryAbove(); err != nil ||
		r != (Room{Free: 512 << 10, Limit: 1024 << 10, Used: 512 << 10, At: "the node"}) {
		t.Errorf("got %+v, %v", r, err)
	}
	must(t, os.WriteFile(s.at("proc/meminfo"), []byte("MemTotal: 2048 kB\nMemAvailable: 1024 kB\n"), 0o600))
	if r, err := p.MemoryAbove(); err != nil || r != (Room{Free: 999000, Limit: 1000000, Used: 1000, At: "/kubepods"}) {
		t.Errorf("got %+v, %v", r, err)
	}
	if used, err := p.MemoryUsed(); err != nil || used != 28*mib-4096 {
		t.Errorf("used: %d, %v", used, err)
	}
}

// A limit is raised and taken back, but not when somebody else has set it meanwhile.
func TestRaise(t *testing.T) {
	page := int64(os.Getpagesize())
	for version, v2 := range map[string]bool{"v1": false, "v2": true} {
		t.Run(version, func(t *testing.T) {
			files := map[string]string{"proc/7/cgroup": "4:memory:/kubepods/podu/" + id,
				"proc/self/mountinfo": mountsV1}
			dir, limit := "sys/fs/cgroup/memory/kubepods/podu", "memory.limit_in_bytes"
			if v2 {
				files = map[string]string{"proc/7/cgroup": "0::/kubepods/podu/" + id, "proc/self/mountinfo": mountV2}
				dir, limit = "sys/fs/cgroup/kubepods/podu", "memory.max"
				memoryOfV2(files, dir, strconv.Itoa(64*mib), 60*mib, 0)
			} else {
				memoryOfV1(files, dir, strconv.Itoa(64*mib), 60*mib, 0)
				files[dir+"/memory.memsw.limit_in_bytes"] = strconv.Itoa(80 * mib)
			}
			s := tree(t, files)
			has := func(file, want string) {
				t.Helper()
				if b, err := os.ReadFile(s.at(dir, file)); err != nil || strings.TrimSpace(string(b)) != want {
					t.Errorf("%s is %q, want %s (%v)", file, b, want, err)
				}
			}
			swapIs := func(want int) {
				t.Helper()
				if !v2 {
					has("memory.memsw.limit_in_bytes", strconv.Itoa(want))
				}
			}
			p, err := s.Find(7, id)
			must(t, err)
			apply := func(r *Raise, want bool, others ...Raise) {
				t.Helper()
				if is, err := r.Apply(others); is != want || err != nil {
					t.Errorf("applied: %v, %v", is, err)
				}
			}
			r, err := p.PlanRaise(int64(16*mib)-1, nil)
			must(t, err)
			if r.Base != 64*mib || r.By != 16*mib || r.By%page != 0 {
				t.Fatalf("planned %+v", r)
			}
			must(t, r.TakeBack(nil)) // a process that died before it raised it
			has(limit, strconv.Itoa(64*mib))
			apply(r, true)
			apply(r, true)
			has(limit, strconv.Itoa(80*mib))
			swapIs(96 * mib)
			must(t, r.TakeBack(nil))
			must(t, r.TakeBack(nil))
			has(limit, strconv.Itoa(64*mib))
			swapIs(80 * mib)

			// Of two containers of the pod, in any order.
			apply(r, true)
			r2, err := p.PlanRaise(4*mib, []Raise{{Dir: "/another", Base: 64 * mib, By: 1}, *r})
			must(t, err)
			if r2.Base != r.Base || r2.Swap != r.Swap {
				t.Fatalf("planned %+v beside %+v", r2, r)
			}
			must(t, r2.TakeBack([]Raise{*r})) // died before it raised it
			has(limit, strconv.Itoa(80*mib))
			apply(r2, true, *r)
			has(limit, strconv.Itoa(84*mib))
			swapIs(100 * mib)
			must(t, r.TakeBack([]Raise{*r2}))
			has(limit, strconv.Itoa(68*mib))
			swapIs(84 * mib)
			must(t, r2.TakeBack(nil))
			has(limit, strconv.Itoa(64*mib))
			swapIs(80 * mib)

			apply(r, true)
			must(t, os.WriteFile(s.at(dir, limit), []byte("99999744"), 0o600)) // kubelet, for a resize
			apply(r, false)
			if r3, err := p.PlanRaise(mib, []Raise{*r}); err != nil || r3.Base != 99999744 {
				t.Errorf("planned %+v, %v", r3, err)
			}
			must(t, r.TakeBack(nil))
			has(limit, "99999744")
			swapIs(80 * mib)
			must(t, os.WriteFile(s.at(dir, limit), []byte(strconv.Itoa(64*mib)), 0o600))

			if v2 { // the kernel of v1 refuses by itself
				apply(r, true)
				must(t, os.WriteFile(s.at(dir, "memory.current"), []byte(strconv.Itoa(70*mib)), 0o600))
				if err := r.TakeBack(nil); !errors.Is(err, ErrInUse) {
					t.Errorf("with more in use than that: %v", err)
				}
				has(limit, strconv.Itoa(80*mib))
				must(t, os.WriteFile(s.at(dir, "memory.stat"),
					[]byte(fmt.Sprintf("active_file %d\ninactive_file %d\n", 4*mib, 4*mib)), 0o600))
				must(t, r.TakeBack(nil))
				has(limit, strconv.Itoa(64*mib))
			}

			must(t, os.RemoveAll(s.at(dir)))
			must(t, r.TakeBack(nil)) // the pod is gone
			apply(r, false)
			if again, err := p.PlanRaise(1, nil); again != nil || err != nil {
				t.Errorf("planned for a pod that is gone: %v, %v", again, err)
			}
			if _, err := os.Stat(s.at(dir)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("it has come about again: %v", err)
			}
		})
	}
}

func TestNoRaise(t *testing.T) {
	files := map[string]string{"proc/7/cgroup": "4:memory:/kubepods/podu/" + id, "proc/self/mountinfo": mountsV1}
	memoryOfV1(files, "sys/fs/cgroup/memory/kubepods/podu", unlimitedV1, 60*mib, 0)
	p, err := tree(t, files).Find(7, id)
	must(t, err)
	if r, err := p.PlanRaise(mib, nil); r != nil || err != nil {
		t.Errorf("a pod without a limit: %v, %v", r, err)
	}
}

// On this machine's own cgroups, whatever they are: the kernel's files are as this package reads
// and writes them.
func TestKernel(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("makes cgroups, which is root's")
	}
	groups, err := os.ReadFile("/proc/self/cgroup")
	must(t, err)
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	mine := func(controller string) string {
		for line := range strings.Lines(string(groups)) {
			if f := strings.SplitN(strings.TrimSpace(line), ":", 3); len(f) == 3 &&
				strings.Contains(","+f[1]+",", ","+controller+",") {
				return f[1]
			}
		}
		return ""
	}
	v2 := mine("memory") == ""
	name := fmt.Sprintf("/cri-proxy-test-%d", os.Getpid())
	made := map[string]bool{}
	pod := func(controller string) string {
		mount, _ := mountOf(controller, v2, mounts)
		if mount == "" {
			t.Skipf("no cgroups of %s are mounted here", controller)
		}
		pod := mount + name
		if made[pod] {
			return pod
		}
		if err := os.MkdirAll(filepath.Join(pod, id), 0o755); err != nil {
			t.Skipf("no cgroups can be made here: %v", err)
		}
		made[pod] = true
		t.Cleanup(func() { must(t, errors.Join(os.Remove(filepath.Join(pod, id)), os.Remove(pod))) })
		if v2 {
			if err := os.WriteFile(filepath.Join(pod, "cgroup.subtree_control"), []byte("+memory +pids"),
				0); err != nil {
				t.Skipf("the controllers are not enabled here: %v", err)
			}
		}
		return pod
	}
	memory, pids := pod("memory"), pod("pids")
	child := exec.Command("cat")
	in, err := child.StdinPipe()
	must(t, err)
	must(t, child.Start())
	t.Cleanup(func() { must(t, errors.Join(in.Close(), child.Wait())) })
	for pod := range made {
		must(t, os.WriteFile(filepath.Join(pod, id, "cgroup.procs"), []byte(strconv.Itoa(child.Process.Pid)), 0))
	}
	p, err := System{}.Find(child.Process.Pid, id)
	must(t, err)
	if room, err := p.Memory(); err != nil {
		t.Errorf("memory without a limit: %+v, %v", room, err)
	} else if room.At == name {
		t.Errorf("a pod without a limit limits: %+v", room)
	}
	limit := filepath.Join(memory, "memory.limit_in_bytes")
	if v2 {
		limit = filepath.Join(memory, "memory.max")
	}
	must(t, os.WriteFile(limit, []byte(strconv.Itoa(32*mib)), 0))
	must(t, os.WriteFile(filepath.Join(pids, "pids.max"), []byte("5"), 0))
	room, err := p.Memory()
	must(t, err)
	if room.Limit != 32*mib || room.At != name || room.Free <= 0 || room.Free > 32*mib ||
		room.Free != room.Limit-room.Used+room.Reclaimable {
		t.Errorf("memory: %+v", room)
	}
	if room, err := p.Pids(); err != nil || room != (Room{Free: 4, Limit: 5, Used: 1, At: name}) {
		t.Errorf("pids: %+v, %v", room, err)
	}
	above, err := p.MemoryAbove()
	must(t, err)
	if above.At == name || above.Free <= 0 || above.Limit == Unlimited {
		t.Errorf("above: %+v", above)
	}
	r, err := p.PlanRaise(16*mib, nil)
	must(t, err)
	if is, err := r.Apply(nil); !is || err != nil {
		t.Fatalf("applied: %v, %v", is, err)
	}
	if b, err := os.ReadFile(limit); err != nil || strings.TrimSpace(string(b)) != strconv.Itoa(48*mib) {
		t.Errorf("the kernel has %q, %v", b, err)
	}
	must(t, r.TakeBack(nil))
	if b, err := os.ReadFile(limit); err != nil || strings.TrimSpace(string(b)) != strconv.Itoa(32*mib) {
		t.Errorf("the kernel has %q, %v", b, err)
	}
}

func FuzzLocate(f *testing.F) {
	f.Add([]byte("4:memory:/kubepods/podu/"+id), []byte(mountsV1))
	f.Add([]byte("0::/kubepods/podu/"+id+"/x"), []byte(mountV2))
	f.Fuzz(func(t *testing.T, groups, mounts []byte) {
		at, err := locate("memory", id, groups, mounts)
		if err != nil || at == nil {
			return
		}
		if at.mount == "" || !strings.Contains(filepath.Base(at.path), id) || !bytes.Contains(groups, []byte(id)) {
			t.Errorf("found %+v", at)
		}
		if len(at.above()) == 0 {
			t.Errorf("%+v has no pod", at)
		}
	})
}
