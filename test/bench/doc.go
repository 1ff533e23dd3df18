// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Command bench measures what cri-proxy costs and what it saves.
//
//	go run ./test/bench passthrough [-out FILE.json] [-cri-proxy PATH] [-rounds N]
//	go run ./test/bench gap [-out FILE.json] [-plot FILE.svg] [-cri-proxy PATH] [-rounds N]
//		[-series N] [-ways LIST]
//	go run ./test/bench gap -from FILE.json [-plot FILE.svg]
//
// In both the variants run in turns, so that other load on the machine hits all of
// them alike. Read the ratios, not the absolutes.
//
// For passthrough, client, proxy and runtime are separate processes on Unix
// sockets, as on a node; the command starts itself in these roles.
//
// For gap, a cluster of four nodes runs on this machine (see package testbed, needs root):
// kubelet on containerd's own socket, and kubelets behind cri-proxy with each method
// of restart. Clients on the machine talk to the pods at their addresses while
// containers are restarted: one, at least once a millisecond on one connection, tells the
// time without an answer; another sends requests at a fixed rate, each on a
// connection of its own, and counts those that fail.
package main
