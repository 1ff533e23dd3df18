// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/fsnotify/fsnotify"
	"google.golang.org/grpc/connectivity"
)

// watchSocket cuts the reconnect back-off short when the runtime's socket
// appears. The directory need not exist yet: the nearest one that does is
// watched until the next step of the path turns up. Without inotify the back-off
// alone finds the runtime, at most 240 ms later.
func (u *Upstream) watchSocket(ctx context.Context, path string) {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		u.log.WithError(err).Warn("runtime socket is not watched, reconnects rely on back-off")
		return
	}
	defer w.Close()
	dir := filepath.Dir(path)
	watched := ""
	for {
		if now := nearestDir(dir); now != watched {
			if watched != "" {
				_ = w.Remove(watched) // gone with its directory, mostly
			}
			watched = ""
			switch err := w.Add(now); {
			case err == nil:
				watched = now
			case !errors.Is(err, fs.ErrNotExist):
				u.log.WithError(err).Warn("runtime socket is not watched, reconnects rely on back-off")
				return
			}
			// Whatever came or went between the look and the watch sent no event.
			if watched == "" || nearestDir(dir) != now {
				continue
			}
			if _, err := os.Lstat(path); err == nil {
				u.retryNow()
			}
		}
		select {
		case <-ctx.Done():
			return
		case e, ok := <-w.Events:
			if !ok {
				return
			}
			if e.Name == path && e.Has(fsnotify.Create|fsnotify.Rename|fsnotify.Chmod) {
				u.retryNow()
			}
			if e.Name == watched && e.Has(fsnotify.Remove|fsnotify.Rename) {
				watched = "" // the watch went with the directory
			}
		case err, ok := <-w.Errors:
			if !ok {
				return
			}
			u.log.WithError(err).Debug("watch of the runtime socket")
		}
	}
}

// retryNow makes gRPC dial at once if it is waiting to. Only then: gRPC walks its
// map of connections without a lock here, and while it waits for the next try of
// the only address that map is at rest.
func (u *Upstream) retryNow() {
	if u.conn.GetState() == connectivity.TransientFailure {
		u.conn.ResetConnectBackoff()
	}
}

// nearestDir returns dir or its nearest ancestor that is a directory.
func nearestDir(dir string) string {
	for {
		if fi, err := os.Stat(dir); err == nil && fi.IsDir() {
			return dir
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return dir
		}
		dir = parent
	}
}
