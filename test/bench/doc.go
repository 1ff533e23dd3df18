// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Command bench measures what cri-proxy costs.
//
//	go run ./test/bench passthrough [-out FILE.json] [-cri-proxy PATH] [-rounds N]
//
// Client, proxy and runtime are separate processes on Unix sockets, as on a
// node; the command starts itself in these roles. The variants run in turns, in
// short batches, so that other load on the machine hits all of them alike. Read
// the ratios, not the absolutes.
package main
