// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// Raise is by how much the limit of a pod's memory has been raised, or is about to be. It is kept
// in a journal, so that whoever finds it can take it back. Several may be in force for one pod, of
// one container each: what the limit was before all of them is the same Base then. The caller lets
// only one call on the raises of a pod happen at a time.
type Raise struct {
	// Dir is the pod's cgroup.
	Dir string `json:"dir"`
	// V2 is the version of the kernel's interface.
	V2 bool `json:"v2,omitempty"`
	// Base is the limit without any raise, in bytes.
	Base int64 `json:"base"`
	// By is what this one adds.
	By int64 `json:"by"`
	// Swap is Base for memory and swap together, which v1 does not let be below that of memory; 0
	// for none.
	Swap int64 `json:"swap,omitempty"`
}

// maxRaises bounds those of one pod that are told from limits that others have set. A pod has as
// many as containers are replaced in it at once.
const maxRaises = 12

const swapFile = "memory.memsw.limit_in_bytes"

func (r *Raise) file() string {
	if r.V2 {
		return memoryV2.limits[0].limit
	}
	return memoryV1.limits[0].limit
}

// PlanRaise returns the raise of the pod's own limit by that many bytes; nil if the pod has none.
// others are those that are in force, of this pod and of others.
func (p *Pod) PlanRaise(by int64, others []Raise) (*Raise, error) {
	if p.memory.path == "" {
		return nil, nil
	}
	r := &Raise{Dir: p.dir(p.memory, filepath.Dir(p.memory.path)), V2: p.memory.v2}
	limit, err := readNumber(r.Dir, r.file())
	if isGone(err) || err == nil && limit == Unlimited {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	page := int64(os.Getpagesize()) // in which the kernel counts, and tells
	if by < 0 || by > Unlimited/4 || limit > Unlimited/4 {
		return nil, fmt.Errorf("a limit of %d cannot be raised by %d", limit, by)
	}
	r.By = (by + page - 1) / page * page
	if !r.V2 { // in v2 swap has a limit of its own
		switch swap, err := readNumber(r.Dir, swapFile); {
		case err == nil && swap != Unlimited:
			r.Swap = swap
		case err != nil && !isGone(err):
			return nil, err
		}
	}
	r.Base = limit
	for _, o := range others {
		if o.Dir != r.Dir {
			continue
		}
		if with := o.among(others); is(limit, o.Base, with) {
			r.Base = o.Base
			if r.Swap != 0 && o.Swap != 0 && is(r.Swap, o.Swap, with) {
				r.Swap = o.Swap
			}
			break
		}
	}
	return r, nil
}

// among returns what the raises among all add that belong together with this one, which may be
// among them or not.
func (r *Raise) among(all []Raise) []int64 {
	var by []int64
	for _, o := range all {
		if o.Dir == r.Dir && o.Base == r.Base && len(by) < maxRaises {
			by = append(by, o.By)
		}
	}
	return by
}

// is reports whether the limit is base with some of the raises, or none: a process may have ended
// before it put one of them, or the end of one, into force. Any other limit has been set by
// somebody else.
func is(limit, base int64, by []int64) bool {
	if len(by) == 0 {
		return limit == base
	}
	return is(limit, base, by[1:]) || is(limit, base+by[0], by[1:])
}

func sum(base int64, by []int64) int64 {
	for _, n := range by {
		base += n
	}
	return base
}

// Apply puts the raise into force, beside others. It does nothing if somebody else has set another
// limit since it was planned, and says whether it has; nor if the pod is gone.
func (r *Raise) Apply(others []Raise) (applied bool, err error) {
	with := append(r.among(others), r.By)
	now, err := readNumber(r.Dir, r.file())
	if err != nil || !is(now, r.Base, with) {
		return false, gone(err)
	}
	if r.Swap != 0 {
		if swap, err := readNumber(r.Dir, swapFile); err != nil {
			return false, gone(err)
		} else if is(swap, r.Swap, with) {
			if err := r.write(swapFile, sum(r.Swap, with)); err != nil {
				return false, gone(err)
			}
		}
	}
	if err := r.write(r.file(), sum(r.Base, with)); err != nil {
		return false, gone(err)
	}
	return true, nil
}

// ErrInUse is returned by TakeBack when more memory is in use than the limit would be.
var ErrInUse = errors.New("more memory is in use")

// TakeBack takes the raise out of force, and leaves that of others. A limit that somebody else has
// set is left alone. It may be tried again after ErrInUse.
func (r *Raise) TakeBack(others []Raise) error {
	left := r.among(others)
	with := append([]int64{r.By}, left...)
	now, err := readNumber(r.Dir, r.file())
	if err != nil {
		return gone(err)
	}
	if to := sum(r.Base, left); now != to && is(now, r.Base, with) {
		if err := r.lower(to); err != nil {
			return err
		}
	}
	if r.Swap == 0 {
		return nil
	}
	now, err = readNumber(r.Dir, swapFile)
	if err != nil {
		return gone(err)
	}
	if to := sum(r.Swap, left); now != to && is(now, r.Swap, with) {
		return inUse(r.write(swapFile, to))
	}
	return nil
}

func (r *Raise) lower(to int64) error {
	if r.V2 {
		// The kernel kills what does not fit (cgroup-v2.rst, memory.max), where v1 refuses the
		// limit.
		used, err := readNumber(r.Dir, memoryV2.limits[0].used)
		if err != nil {
			return gone(err)
		}
		stat, err := readStat(r.Dir)
		if err != nil {
			return gone(err)
		}
		if held := used - stat["inactive_file"] - stat["active_file"]; held > to {
			return fmt.Errorf("%w: %d bytes", ErrInUse, held)
		}
	}
	return inUse(r.write(r.file(), to))
}

func inUse(err error) error {
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%w: %w", ErrInUse, err)
	}
	return gone(err)
}

// isGone reports whether the cgroup is not there, or not any more.
func isGone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) }

// gone is err, but for that of a pod that is gone, which has no limit.
func gone(err error) error {
	if isGone(err) {
		return nil
	}
	return err
}

// write never makes a file: one that is not there is of a pod that is gone.
func (r *Raise) write(file string, n int64) error {
	f, err := os.OpenFile(filepath.Join(r.Dir, file), os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(strconv.FormatInt(n, 10))
	return errors.Join(err, f.Close())
}
