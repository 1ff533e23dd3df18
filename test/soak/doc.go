// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Command soak restarts containers of many pods over and over and looks for what only time shows:
// lost or doubled restarts, leaks, and a kubelet that believes something else than the runtime.
//
//	go run ./test/soak [-time 10m | -restarts 1000] [-pods 50] [-method gate] [-out FILE.json]
//
// A one-node cluster of real components runs the pods; every container is an HTTP server that is
// asked all the time. Restarts are commanded a few at a time, most on the proxy's admin socket,
// some with a ContainerRecreateRequest, in both orders, now and then twice at once or with the
// command repeated. What happened is judged by those who do not know of each other: the operations'
// own reports, containerd's container events, kubelet's pod status, and the answers of the servers,
// which say when their process began.
//
// The exit code is 1 when a check fails.
package main
