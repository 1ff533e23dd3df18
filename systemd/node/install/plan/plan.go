// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pmezard/go-difflib/difflib"

	"github.com/cri-proxy/cri-proxy/internal/atomicfile"
)

const (
	// UnitDir has the units of the administrator.
	UnitDir = "/etc/systemd/system"
	// RunUnitDir has units that go with the next boot.
	RunUnitDir = "/run/systemd/system"
	// undoTimeout bounds one undo: kubelet is restarted once more.
	undoTimeout = 2 * time.Minute
)

// Action is a thing to do.
type Action struct {
	What string // for people
	Diff string
	Do   func(context.Context) error
	Undo func(context.Context) error // nil: nothing to restore
	// Holds says that nothing before this action may be undone unless this one has been: kubelet
	// uses it.
	Holds bool
}

// Plan has actions to do in order, and to undo in reverse order.
type Plan struct {
	Actions []Action
	Undone  func(context.Context) error // comes last when everything is undone
	Out     io.Writer
}

// Add appends actions.
func (p *Plan) Add(a ...Action) { p.Actions = append(p.Actions, a...) }

func (p *Plan) say(format string, args ...any) { _, _ = fmt.Fprintf(p.Out, format+"\n", args...) }

// Show prints what would be done.
func (p *Plan) Show() {
	if len(p.Actions) == 0 {
		p.say("nothing to do")
	}
	for _, a := range p.Actions {
		p.say("would %s", a.What)
		for line := range strings.Lines(a.Diff) {
			_, _ = fmt.Fprint(p.Out, "    "+line)
		}
	}
}

// Run does all actions. If one fails, or ctx ends, run undoes what it has done.
func (p *Plan) Run(ctx context.Context) error {
	for i, a := range p.Actions {
		err := ctx.Err()
		if err == nil {
			p.say("%s", a.What)
			err = a.Do(ctx)
		}
		if err == nil {
			continue
		}
		what, _, _ := strings.Cut(a.What, "; ")
		err = fmt.Errorf("%s: %w", what, err)
		return p.putBack(ctx, err, p.Actions[:i+1]) // the last one may have been done in part
	}
	return nil
}

// putBack undoes what has been done, because of err.
func (p *Plan) putBack(ctx context.Context, err error, done []Action) error {
	if !slices.ContainsFunc(done, func(a Action) bool { return a.Undo != nil }) {
		return err
	}
	p.say("that went wrong; putting everything back")
	ctx = context.WithoutCancel(ctx)
	uerr := undo(ctx, done)
	if p.Undone != nil {
		uerr = errors.Join(uerr, within(ctx, p.Undone))
	}
	if uerr != nil {
		return errors.Join(err, fmt.Errorf("not everything was put back, cri-proxy uninstall tries again: %w", uerr))
	}
	return fmt.Errorf("%w\neverything is as it was", err)
}

func undo(ctx context.Context, done []Action) error {
	var errs []error
	for _, a := range slices.Backward(done) {
		if a.Undo == nil {
			continue
		}
		err := within(ctx, a.Undo)
		errs = append(errs, err)
		if err != nil && a.Holds {
			errs = append(errs, errors.New("so the rest stays as it is: kubelet may need it"))
			break
		}
	}
	return errors.Join(errs...)
}

// within bounds one undo.
func within(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, undoTimeout)
	defer cancel()
	return f(ctx)
}

// Diff is the change of a file, for people. Nil is a file that is not there.
func Diff(path string, before, after []byte) string {
	from, to := path, path
	if before == nil {
		from = "/dev/null"
	}
	if after == nil {
		to = "/dev/null"
	}
	s, err := difflib.GetUnifiedDiffString(difflib.UnifiedDiff{
		A: difflib.SplitLines(string(before)), B: difflib.SplitLines(string(after)),
		FromFile: from, ToFile: to, Context: 2,
	})
	if err != nil {
		return err.Error()
	}
	return s
}

// Read returns the content of a file, nil if there is none.
func Read(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if b == nil {
		b = []byte{}
	}
	return b, err
}

// Put writes a file, or removes it if b is nil.
func Put(path string, b []byte, mode os.FileMode) error {
	if b != nil {
		return atomicfile.Write(path, b, mode)
	}
	if err := atomicfile.Remove(path); err != nil {
		return err
	}
	// Directories of units' drop-ins go with the last drop-in. Others must stay: kubelet does not
	// start without its --config-dir.
	dir := filepath.Dir(path)
	if strings.HasSuffix(dir, ".d") && (filepath.Dir(dir) == UnitDir || filepath.Dir(dir) == RunUnitDir) {
		_ = os.Remove(dir)
	}
	return nil
}

// Writing returns the action that puts a file. ok is false if the file is right already.
func Writing(path string, after []byte, mode os.FileMode) (a Action, ok bool, err error) {
	before, err := Read(path)
	if err != nil || before == nil && after == nil || before != nil && after != nil && bytes.Equal(before, after) {
		return Action{}, false, err
	}
	verb, was := "write ", mode
	switch {
	case after == nil:
		verb = "remove "
	case before != nil:
		verb = "change "
	}
	if fi, err := os.Stat(path); err == nil {
		was = fi.Mode().Perm()
	}
	return Action{
		What: verb + path, Diff: Diff(path, before, after),
		Do:   func(context.Context) error { return Put(path, after, mode) },
		Undo: func(context.Context) error { return Put(path, before, was) },
	}, true, nil
}
