// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package plan_test

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cri-proxy/cri-proxy/systemd/node/install/plan"
)

func write600(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func contentOf(t *testing.T, path string) string {
	t.Helper()
	b, err := plan.Read(path)
	if err != nil {
		t.Fatal(err)
	}
	if b == nil {
		return "(none)"
	}
	return string(b)
}

func TestPlan(t *testing.T) {
	dir := t.TempDir()
	there, gone, fresh := filepath.Join(dir, "there"), filepath.Join(dir, "gone"), filepath.Join(dir, "x.d", "fresh")
	write600(t, there, "a\n")
	write600(t, gone, "b\n")
	var out strings.Builder
	p := &plan.Plan{Out: &out}
	for path, content := range map[string][]byte{there: []byte("A\n"), gone: nil, fresh: []byte("c\n")} {
		a, ok, err := plan.Writing(path, content, 0o644)
		if err != nil || !ok {
			t.Fatal(ok, err)
		}
		p.Add(a)
	}
	if _, ok, err := plan.Writing(there, []byte("a\n"), 0o644); ok || err != nil {
		t.Errorf("a file that is as it should be: %v, %v", ok, err)
	}
	p.Show()
	for _, want := range []string{"would change " + there, "-a", "+A", "would remove " + gone, "would write " + fresh,
		"--- /dev/null"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	state := func() [3]string { return [3]string{contentOf(t, there), contentOf(t, gone), contentOf(t, fresh)} }
	before := [3]string{"a\n", "b\n", "(none)"}
	if state() != before {
		t.Fatalf("showing has done something: %q", state())
	}
	boom := errors.New("boom")
	p.Add(plan.Action{What: "fail; at length", Do: func(context.Context) error { return boom }})
	if err := p.Run(t.Context()); !errors.Is(err, boom) || !strings.HasSuffix(err.Error(), "everything is as it was") ||
		state() != before {
		t.Errorf("%v: %q", err, state())
	}
	if _, err := os.Stat(filepath.Dir(fresh)); err != nil {
		t.Error("a directory is gone that kubelet may want") // a --config-dir that was empty
	}
	p.Actions = p.Actions[:3]
	if err := p.Run(t.Context()); err != nil || state() != [3]string{"A\n", "(none)", "c\n"} {
		t.Errorf("%v: %q", err, state())
	}
}

// What kubelet uses is not taken away before kubelet is led away from it.
func TestPutBackHolds(t *testing.T) {
	var undone []string
	step := func(name string, holds bool, err error) plan.Action {
		return plan.Action{
			What: name, Holds: holds, Do: func(context.Context) error { return nil },
			Undo: func(context.Context) error { undone = append(undone, name); return err },
		}
	}
	boom := errors.New("read-only file system")
	p := &plan.Plan{Out: io.Discard}
	p.Add(step("sockets", false, nil), step("kubelet", true, boom), step("label", false, nil))
	p.Add(plan.Action{What: "fail", Do: func(context.Context) error { return errors.New("no") }})
	err := p.Run(t.Context())
	if !errors.Is(err, boom) || !strings.Contains(err.Error(), "the rest stays as it is") ||
		!slices.Equal(undone, []string{"label", "kubelet"}) {
		t.Errorf("%v: undone %q", err, undone)
	}
}
