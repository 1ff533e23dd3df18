// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package bypass

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/cri-proxy/cri-proxy/internal/config"
)

// socketDirMode is that of the directory of the sockets: others may reach a socket in it that they are let into.
const socketDirMode = 0o711

// State is the file that says that the proxy is bypassed. It is there from before the symlink is changed until after it has
// been changed back, and outlives a reboot.
type State struct {
	Since  time.Time `json:"since"`
	Reason string    `json:"reason"`
	// Automatic is set when nobody asked for it: the proxy ended too often.
	Automatic bool `json:"automatic,omitempty"`
}

// String says since when and why.
func (s *State) String() string {
	return fmt.Sprintf("since %s: %s", s.Since.Local().Format(time.RFC3339), s.Reason)
}

func statePath(stateDir string) string { return filepath.Join(stateDir, "bypass") }

// Read returns the state, nil if the proxy is not bypassed. A file that cannot be read counts as one that can: somebody has put it there.
func Read(stateDir string) *State {
	b, err := os.ReadFile(statePath(stateDir))
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
		if fi, err := os.Stat(statePath(stateDir)); err == nil {
			s.Since = fi.ModTime()
		}
	}
	return s
}

func (s *State) write(stateDir string) error {
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	path := statePath(stateDir)
	if err := os.WriteFile(path+".new", append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// links are what lies beside the CRI socket.
type links struct {
	proxy   string // the CRI socket
	kubelet string // what kubelet dials: leads to the one or the other
	runtime string // leads to the runtime's socket, for the guard of crashes
	crashes string // when the proxy has ended, written by that guard
	target  string // the runtime's socket
}

func linksOf(c *config.Config) (links, error) {
	target, err := config.SocketPath(c.RuntimeEndpoint)
	if err != nil {
		return links{}, &config.InvalidError{Err: err}
	}
	dir := filepath.Dir(c.Listen.Path)
	return links{
		proxy: c.Listen.Path, kubelet: filepath.Join(dir, "kubelet.sock"), runtime: filepath.Join(dir, "runtime.sock"),
		crashes: filepath.Join(dir, "crashes"), target: target,
	}, nil
}

// Past reports whether kubelet's symlink leads past the proxy.
//
// Errors: there is no such symlink, or it leads elsewhere.
func Past(c *config.Config) (bool, error) {
	l, err := linksOf(c)
	if err != nil {
		return false, err
	}
	return l.isBypassed()
}

// isBypassed reports where kubelet's symlink leads.
func (l links) isBypassed() (bool, error) {
	to, err := os.Readlink(l.kubelet)
	if err != nil {
		return false, err
	}
	if !filepath.IsAbs(to) {
		to = filepath.Join(filepath.Dir(l.kubelet), to)
	}
	switch to {
	case l.proxy:
		return false, nil
	case l.target, l.runtime:
		return true, nil
	}
	return false, fmt.Errorf("%s leads to %s, which is neither the proxy's socket %s nor the runtime's %s", l.kubelet, to, l.proxy, l.target)
}

// lead makes the symlinks what they should be, each in one step: whoever dials finds the one or the other.
func (l links) lead(past bool) error {
	if err := os.MkdirAll(filepath.Dir(l.kubelet), socketDirMode); err != nil {
		return err
	}
	to := l.proxy
	if past {
		to = l.target
	}
	return errors.Join(symlink(l.target, l.runtime), symlink(to, l.kubelet))
}

func symlink(to, path string) error {
	if now, err := os.Readlink(path); err == nil && now == to {
		return nil
	}
	if fi, err := os.Lstat(path); err == nil && fi.Mode().Type() != fs.ModeSymlink {
		return fmt.Errorf("%s is no symlink (%s), it is left alone: remove it", path, fi.Mode())
	}
	temporary := fmt.Sprintf("%s.%d", path, os.Getpid())
	if err := remove(temporary); err != nil {
		return err
	}
	if err := os.Symlink(to, temporary); err != nil {
		return err
	}
	return os.Rename(temporary, path)
}
