// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package nodecondition sets the condition CRIProxyBypassed on each Node that has cri-proxy:
// whether kubelet bypasses the proxy.
//
// Nodes have no credentials for the API server, so the controller asks them, every few minutes and
// evenly spread: 5,000 nodes make 17 questions a second, and no node keeps a connection open for
// it. The controller writes to the API server when the answer changes; there is no heartbeat.
// Kubelet and the node lifecycle controller patch conditions by type and leave other conditions
// alone.
package nodecondition
