// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package listener

import (
	"fmt"
	"net"

	"github.com/coreos/go-systemd/v22/activation"
)

// FromSystemd returns the sockets that systemd has passed to this process (LISTEN_FDS,
// sd_listen_fds(3)), by their FileDescriptorName=; without one that is the name of the socket unit.
// It takes the variables out of the environment: the second call finds nothing.
func FromSystemd() (map[string][]net.Listener, error) {
	listeners := make(map[string][]net.Listener)
	for _, f := range activation.Files(true) {
		l, err := net.FileListener(f)
		f.Close() // net has made its own copy
		if err != nil {
			return nil, fmt.Errorf("socket %q from systemd is not a listening stream socket, "+
				"check ListenStream= of its unit: %w", f.Name(), err)
		}
		listeners[f.Name()] = append(listeners[f.Name()], l)
	}
	return listeners, nil
}
