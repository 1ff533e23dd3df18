// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package install

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

	"github.com/pmezard/go-difflib/difflib"

	"github.com/cri-proxy/cri-proxy/internal/atomicfile"
)

// action is a thing to do.
type action struct {
	what string // for people
	diff string
	do   func(context.Context) error
	undo func(context.Context) error // nil: nothing to put back
	// holds says that nothing before this action may be undone unless this one has been: kubelet
	// uses it.
	holds bool
}

// plan has actions to do in order, and to undo in reverse order.
type plan struct {
	actions []action
	undone  func(context.Context) error // comes last when all is undone
	out     io.Writer
}

func (p *plan) add(a ...action) { p.actions = append(p.actions, a...) }

func (p *plan) say(format string, args ...any) { _, _ = fmt.Fprintf(p.out, format+"\n", args...) }

// show prints what would be done.
func (p *plan) show() {
	if len(p.actions) == 0 {
		p.say("nothing to do")
	}
	for _, a := range p.actions {
		p.say("would %s", a.what)
		for line := range strings.Lines(a.diff) {
			_, _ = fmt.Fprint(p.out, "    "+line)
		}
	}
}

// run does all actions. If one fails, or ctx ends, run undoes what it has done.
func (p *plan) run(ctx context.Context) error {
	for i, a := range p.actions {
		err := ctx.Err()
		if err == nil {
			p.say("%s", a.what)
			err = a.do(ctx)
		}
		if err == nil {
			continue
		}
		what, _, _ := strings.Cut(a.what, "; ")
		err = fmt.Errorf("%s: %w", what, err)
		return p.putBack(ctx, err, p.actions[:i+1]) // the last one may have been done in part
	}
	return nil
}

// putBack undoes what has been done, because of err.
func (p *plan) putBack(ctx context.Context, err error, done []action) error {
	if !slices.ContainsFunc(done, func(a action) bool { return a.undo != nil }) {
		return err
	}
	p.say("that went wrong; putting everything back")
	ctx = context.WithoutCancel(ctx)
	uerr := undo(ctx, done)
	if p.undone != nil {
		uerr = errors.Join(uerr, within(ctx, p.undone))
	}
	if uerr != nil {
		return errors.Join(err, fmt.Errorf("not everything was put back, cri-proxy uninstall tries again: %w", uerr))
	}
	return fmt.Errorf("%w\neverything is as it was", err)
}

func undo(ctx context.Context, done []action) error {
	var errs []error
	for _, a := range slices.Backward(done) {
		if a.undo == nil {
			continue
		}
		err := within(ctx, a.undo)
		errs = append(errs, err)
		if err != nil && a.holds {
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

// diff is the change of a file, for people. Nil is a file that is not there.
func diff(path string, before, after []byte) string {
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

// read returns the content of a file, nil if there is none.
func read(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if b == nil {
		b = []byte{}
	}
	return b, err
}

// put writes a file, or removes it if b is nil.
func put(path string, b []byte, mode os.FileMode) error {
	if b != nil {
		return atomicfile.Write(path, b, mode)
	}
	if err := atomicfile.Remove(path); err != nil {
		return err
	}
	// Directories of units' drop-ins go with the last drop-in. Others must stay: kubelet does not
	// start without its --config-dir.
	dir := filepath.Dir(path)
	if strings.HasSuffix(dir, ".d") && (filepath.Dir(dir) == unitDir || filepath.Dir(dir) == runUnitDir) {
		_ = os.Remove(dir)
	}
	return nil
}

// writing returns the action that puts a file. ok is false if the file is right already.
func writing(path string, after []byte, mode os.FileMode) (a action, ok bool, err error) {
	before, err := read(path)
	if err != nil || before == nil && after == nil || before != nil && after != nil && bytes.Equal(before, after) {
		return action{}, false, err
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
	return action{
		what: verb + path, diff: diff(path, before, after),
		do:   func(context.Context) error { return put(path, after, mode) },
		undo: func(context.Context) error { return put(path, before, was) },
	}, true, nil
}
