// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package bypassstate

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// State is the content of the file. The file is written before kubelet's symlink is changed, and
// removed after the symlink has been changed back. It outlives a reboot.
type State struct {
	Since  time.Time `json:"since"`
	Reason string    `json:"reason"`
	// Automatic is set when no person requested the bypass: the daemon crashed too often.
	Automatic bool `json:"automatic,omitempty"`
}

// String says since when and why.
func (s *State) String() string {
	return fmt.Sprintf("since %s: %s", s.Since.Local().Format(time.RFC3339), s.Reason)
}

func path(stateDir string) string { return filepath.Join(stateDir, "bypass") }

// Read returns the state, nil if the proxy is not bypassed. A file that cannot be read counts too:
// somebody has put it there.
func Read(stateDir string) *State {
	b, err := os.ReadFile(path(stateDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	s := &State{}
	if err == nil {
		err = json.Unmarshal(b, s)
	}
	if err != nil {
		s.Reason = "its reason cannot be read: " + err.Error()
	}
	if s.Since.IsZero() {
		if fi, err := os.Stat(path(stateDir)); err == nil {
			s.Since = fi.ModTime()
		}
	}
	return s
}

// Write writes the file. It does not wait for the disk: crash-guard bypasses the proxy when
// everything else hangs.
func (s *State) Write(stateDir string) error {
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	file := path(stateDir)
	if err := os.WriteFile(file+".new", append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

// Forget removes the file, if there is one.
func Forget(stateDir string) error {
	if err := os.Remove(path(stateDir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
