// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package process_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/cri-proxy/cri-proxy/ops/process"
)

// The process that listens on a Unix socket is found from the dialling side.
func ExamplePeer() {
	dir, err := os.MkdirTemp("", "peer")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", filepath.Join(dir, "a.sock"))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer l.Close()
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close()
	peer, err := process.Peer("/proc", conn)
	fmt.Println(peer.PID == os.Getpid(), err)
	// Output: true <nil>
}
