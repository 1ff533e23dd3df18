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
)

// action is a thing to do.
type action struct {
	what string // for people
	diff string
	do   func(context.Context) error
	undo func(context.Context) error // nil: nothing to put back
	// holds says that nothing before it may be undone unless it has been: kubelet uses it.
	holds bool
}

// plan is done in order, and undone the other way round.
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

// run does it all. If something fails, or ctx ends, what has been done is undone.
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

// within bounds the putting back of one thing.
func within(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, undoPatience)
	defer cancel()
	return f(ctx)
}

// diff is the change of a file as people read it. Nil is a file that is not there.
func diff(path string, before, after []byte) string {
	from, to := path, path
	if before == nil {
		from = "/dev/null"
	}
	if after == nil {
		to = "/dev/null"
	}
	s, err := difflib.GetUnifiedDiffString(difflib.UnifiedDiff{
		A: difflib.SplitLines(string(before)), B: difflib.SplitLines(string(after)), FromFile: from, ToFile: to, Context: 2,
	})
	if err != nil {
		return err.Error()
	}
	return s
}

// read returns what is in a file, nil if there is none.
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

// write makes a file in one step, and makes sure that it is on the disk.
func write(path string, b []byte, mode os.FileMode) (err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.Write(b)
	if err = errors.Join(err, f.Chmod(mode), keepOwner(f, path), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// keepOwner gives f the owner of the file that it is to replace.
func keepOwner(f *os.File, path string) error {
	uid, gid, ok := owner(path)
	if !ok {
		return nil
	}
	return f.Chown(uid, gid)
}

// put makes a file what it is to be, nil for none.
func put(path string, b []byte, mode os.FileMode) error {
	if b != nil {
		return write(path, b, mode)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// Directories of units' drop-ins go with the last one. Others may have to be there: kubelet does not start without its --config-dir.
	if dir := filepath.Dir(path); strings.HasSuffix(dir, ".d") && (filepath.Dir(dir) == unitDir || filepath.Dir(dir) == runUnitDir) {
		_ = os.Remove(dir)
	}
	return nil
}

// writing is the action that makes a file what it is to be; ok is false if it is.
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
