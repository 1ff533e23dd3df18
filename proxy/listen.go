// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"net"

	"github.com/cri-proxy/cri-proxy/proxy/internal/listener"
)

// ListenOptions say who may connect to a socket.
type ListenOptions = listener.Options

// Listen makes a Unix socket at path. Mode and owner hold from the first moment on: the socket is
// made under another name and moved into place. Missing directories are made with mode 0711, a
// socket that a dead process left behind is replaced. It is an error if a live process listens
// there or if path is anything but a socket. Closing the listener removes the socket unless another
// process has taken the path over.
func Listen(path string, o ListenOptions) (net.Listener, error) { return listener.Listen(path, o) }

// ListenersFromSystemd returns the sockets that systemd has passed to this process (LISTEN_FDS,
// sd_listen_fds(3)), by their FileDescriptorName=; without one that is the name of the socket unit.
// The map is empty if the process was not started by a socket unit. systemd keeps the sockets when
// the process ends, so clients queue instead of failing; closing them removes nothing. It takes the
// variables out of the environment: the second call finds nothing.
func ListenersFromSystemd() (map[string][]net.Listener, error) { return listener.FromSystemd() }

// Unblock sets O_NONBLOCK on a listening socket that other processes have too. Call it before every
// Accept, so that Accept waits where a deadline or Close can wake it. All these processes share the
// flag, and systemd clears it when it starts another process with the socket.
func Unblock(l net.Listener) { listener.Unblock(l) }
