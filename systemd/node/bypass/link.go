// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package bypass

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cri-proxy/cri-proxy/internal/atomicfile"
	"github.com/cri-proxy/cri-proxy/internal/config"
)

// socketDirMode is the mode of the directory of the sockets: other users may reach a socket in it
// that admits them.
const socketDirMode = 0o711

// links are the files beside the CRI socket.
type links struct {
	proxy   string // the CRI socket
	kubelet string // the symlink that kubelet dials: leads to the proxy or to the runtime
	runtime string // a symlink to the runtime's socket, for crash-guard
	crashes string // when the daemon has crashed, written by crash-guard
	target  string // the runtime's socket
}

func linksOf(c *config.Config) (links, error) {
	target, err := config.SocketPath(c.RuntimeEndpoint)
	if err != nil {
		return links{}, &config.InvalidError{Err: err}
	}
	dir := filepath.Dir(c.Listen.Path)
	return links{
		proxy: c.Listen.Path, kubelet: KubeletSocket(c), runtime: filepath.Join(dir, "runtime.sock"),
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
	return false, fmt.Errorf("%s leads to %s, which is neither the proxy's socket %s nor the runtime's %s",
		l.kubelet, to, l.proxy, l.target)
}

// lead makes the symlinks lead to the proxy or, with past, kubelet's past it. Each changes in one
// step: whoever dials finds the proxy or the runtime.
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

// symlink makes path lead to another one. It refuses to replace what is no symlink.
func symlink(to, path string) error {
	if now, err := os.Readlink(path); err == nil && now == to {
		return nil
	}
	if fi, err := os.Lstat(path); err == nil && fi.Mode().Type() != fs.ModeSymlink {
		return fmt.Errorf("%s is no symlink (%s), it is left alone: remove it", path, fi.Mode())
	}
	return atomicfile.Symlink(to, path)
}
