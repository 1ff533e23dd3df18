// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package bypassstate_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cri-proxy/cri-proxy/internal/bypassstate"
)

func TestState(t *testing.T) {
	dir := t.TempDir()
	if s := bypassstate.Read(dir); s != nil {
		t.Errorf("nothing is written: %s", s)
	}
	want := &bypassstate.State{Since: time.Now().Truncate(time.Second), Reason: "look for a fault", Automatic: true}
	if err := want.Write(dir); err != nil {
		t.Fatal(err)
	}
	s := bypassstate.Read(dir)
	if s == nil || !s.Since.Equal(want.Since) || s.Reason != want.Reason || !s.Automatic {
		t.Errorf("%+v", s)
	}
	for range 2 {
		if err := bypassstate.Forget(dir); err != nil || bypassstate.Read(dir) != nil {
			t.Error(err)
		}
	}
}

// A file of somebody else counts: kubelet is led past the proxy then, too.
func TestUnreadableState(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "bypass"), []byte("yes"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := bypassstate.Read(dir)
	if s == nil || !strings.Contains(s.String(), "its reason cannot be read") || time.Since(s.Since) > time.Minute {
		t.Errorf("%+v", s)
	}
}
