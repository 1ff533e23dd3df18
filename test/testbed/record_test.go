// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// newLedger returns a ledger and a cache that are not the machine's.
func newLedger(t *testing.T) ledger {
	t.Helper()
	t.Setenv("CRI_PROXY_CACHE", t.TempDir())
	return ledger{root: t.TempDir()}
}

func allocateIn(t *testing.T, l ledger, nodes int, fill func(*record)) (record, func()) {
	t.Helper()
	if fill == nil {
		fill = func(*record) {}
	}
	r, release, err := l.allocate(t.Context(), nodes, io.Discard, fill)
	if err != nil {
		t.Fatal(err)
	}
	return r, release
}

func ids(t *testing.T, l ledger) []string {
	t.Helper()
	recs, err := l.records()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, r := range recs {
		out = append(out, r.ID)
	}
	return out
}

func TestAllocateInParallel(t *testing.T) {
	l := newLedger(t)
	var wg sync.WaitGroup
	var mu sync.Mutex
	subnets, names := map[int]string{}, map[string]bool{}
	for range 12 {
		wg.Go(func() {
			r, release, err := l.allocate(t.Context(), 2, io.Discard, func(*record) {})
			if err != nil {
				t.Error(err)
				return
			}
			defer t.Cleanup(release)
			mu.Lock()
			defer mu.Unlock()
			names[r.ID] = true
			for _, n := range r.Nodes {
				if other := subnets[n.Subnet]; other != "" {
					t.Errorf("subnet %d given to %s and %s", n.Subnet, other, r.ID)
				}
				subnets[n.Subnet] = r.ID
			}
		})
	}
	wg.Wait()
	if len(names) != 12 || len(subnets) != 24 {
		t.Errorf("%d beds and %d subnets", len(names), len(subnets))
	}
}

func TestAllocateWithoutFreeSubnets(t *testing.T) {
	l := newLedger(t)
	_, _, err := l.allocate(t.Context(), subnetCount+1, io.Discard, func(*record) {})
	if err == nil || !strings.Contains(err.Error(), "testbed down") {
		t.Errorf("got %v", err)
	}
}

func TestSweep(t *testing.T) {
	for _, tc := range []struct {
		name   string
		fill   func(*record)
		broken bool // the record is unreadable
		held   bool // the owner lives
		want   bool // the bed survives
	}{
		{name: "owner lives", held: true, want: true},
		{name: "owner is gone"},
		{name: "owner died while it wrote the record", broken: true},
		{name: "left running on purpose", fill: func(r *record) { r.Detached = true }, want: true},
		{name: "left running, before a reboot", fill: func(r *record) { r.Detached, r.Boot = true, "earlier" }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newLedger(t)
			dir := filepath.Join(t.TempDir(), "dir")
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			r, release := allocateIn(t, l, 1, func(r *record) {
				r.Dir = dir
				if tc.fill != nil {
					tc.fill(r)
				}
			})
			if tc.broken {
				if err := os.WriteFile(filepath.Join(l.runDir(r.ID), "bed.json"), []byte("{"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if !tc.held {
				release()
			}
			next, releaseNext := allocateIn(t, l, 1, nil)
			defer releaseNext()
			if got := slices.Contains(ids(t, l), r.ID); got != tc.want {
				t.Errorf("bed there: %v, want %v", got, tc.want)
			}
			if tc.want && next.Nodes[0].Subnet == r.Nodes[0].Subnet {
				t.Errorf("two beds got subnet %d", r.Nodes[0].Subnet)
			}
			if _, err := os.Stat(dir); (err == nil) != tc.want && !tc.broken {
				t.Errorf("directory of the bed: %v", err)
			}
			if tc.held {
				release()
			}
		})
	}
}

func TestSweepEndsProcesses(t *testing.T) {
	l := newLedger(t)
	r, release := allocateIn(t, l, 1, nil)
	pids := filepath.Join(l.runDir(r.ID), "pid")
	if err := os.Mkdir(pids, 0o755); err != nil {
		t.Fatal(err)
	}
	s := newSpawner(true)
	defer s.close()
	recorded := start(t, s, pids, "recorded", "/bin/sh", "-c", "sleep 100 & wait")
	other := start(t, s, t.TempDir(), "other", "/bin/sleep", "100")
	defer func() { _ = other.stop(t.Context(), 9) }()
	// A pid file whose process ended and whose pid now belongs to somebody else.
	stale, err := identify(other.PID)
	if err != nil {
		t.Fatal(err)
	}
	stale.Start--
	b, err := json.Marshal(stale)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(pids, "stale.json"), b, 0o644); err != nil {
		t.Fatal(err)
	}
	// A program among the bed's files that nobody recorded.
	own := filepath.Join(l.runDir(r.ID), "own")
	if err := copyFile("/bin/sleep", own); err != nil {
		t.Fatal(err)
	}
	unrecorded := start(t, s, t.TempDir(), "unrecorded", own, "100")
	release()

	_, releaseNext := allocateIn(t, l, 1, nil)
	defer releaseNext()
	for _, p := range []*Process{recorded, unrecorded} {
		select {
		case <-p.Done(): // once it has been waited for, which is a moment after its end
		case <-time.After(time.Minute):
			t.Errorf("%s still runs", p.Name)
		}
	}
	if !other.Running() {
		t.Error("a process that is not the bed's was killed")
	}
	if slices.Contains(ids(t, l), r.ID) {
		t.Error("the bed is still there")
	}
}

func TestSweepRemovesDirectoriesWithoutRecord(t *testing.T) {
	l := newLedger(t)
	cache, err := CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	r, release := allocateIn(t, l, 1, nil)
	defer release()
	for _, id := range []string{r.ID, "gone1"} {
		if err := os.MkdirAll(filepath.Join(cache, "runs", id, "etc"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	_, releaseNext := allocateIn(t, l, 1, nil)
	defer releaseNext()
	entries, err := os.ReadDir(filepath.Join(cache, "runs"))
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 1 || entries[0].Name() != r.ID {
		t.Errorf("directories left: %v", entries)
	}
}

// A bed that is being removed is nobody's to sweep, and what its owner did not come to remove goes
// with the next sweep.
func TestForget(t *testing.T) {
	l := newLedger(t)
	r, release := allocateIn(t, l, 1, nil)
	defer release()
	left := filepath.Join(l.root, gonePrefix+"left1", "n0")
	if err := os.MkdirAll(left, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := l.forget(r.ID); err != nil {
		t.Fatal(err)
	}
	if err := l.forget(r.ID); err != nil {
		t.Errorf("once more: %v", err)
	}
	if got := ids(t, l); len(got) > 0 {
		t.Errorf("beds: %q", got)
	}
	next, releaseNext := allocateIn(t, l, 1, nil)
	defer releaseNext()
	if got := ids(t, l); !slices.Equal(got, []string{next.ID}) {
		t.Errorf("beds: %q, want %s", got, next.ID)
	}
	if _, err := os.Stat(left); err == nil {
		t.Error("what was left is still there")
	}
}

func TestParseMounts(t *testing.T) {
	const mountinfo = `22 1 253:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:30 / /run/bed/abc/shm rw - tmpfs shm rw
31 22 0:31 / /run/bed/abc/n0/root\040fs rw shared:1 - overlay overlay rw
32 22 0:32 / /run/bed/abcd/shm rw - tmpfs shm rw
33 22 0:33 / /run/bed/abc rw - tmpfs shm rw
34 22 0:34 / /cache/abc/x\134y rw - tmpfs shm rw
`
	for _, tc := range []struct {
		name string
		dirs []string
		want []string
	}{
		{"one directory, latest first, no namesakes", []string{"/run/bed/abc"},
			[]string{"/run/bed/abc", "/run/bed/abc/n0/root fs", "/run/bed/abc/shm"}},
		{"two directories", []string{"/run/bed/abcd", "/cache/abc"}, []string{`/cache/abc/x\y`, "/run/bed/abcd/shm"}},
		{"none", []string{"/elsewhere"}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := parseMounts(mountinfo, tc.dirs...); !slices.Equal(got, tc.want) {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

func TestLockFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := lockFile(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan error, 1)
	go func() {
		unlock, err := lockFile(t.Context(), path)
		if err == nil {
			unlock()
		}
		got <- err
	}()
	select {
	case err := <-got:
		t.Fatalf("a second holder got in: %v", err)
	default:
	}
	unlock()
	if err := <-got; err != nil {
		t.Error(err)
	}
}
