// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package nodecondition writes on every Node that has cri-proxy whether kubelet is led past it: the condition CRIProxyBypassed.
//
// Nodes have no credentials for the API server, so they are asked, every few minutes and evenly spread: 5,000 nodes make 17 questions a second,
// and none of them has a connection kept open for it. The API server is written to when the answer is another one, and not for a heartbeat. Kubelet
// and the node lifecycle controller patch conditions by type and leave those of others alone.
package nodecondition
